"""experts_mlp: the MLP of each token's experts, weighted and summed, in one op.

The mathematics is ``down(activation(up(x)))`` with the products of ``linear.py``, gathered at its input and combined
at its output. Where a gradient is needed it is composed of grouped_linear, expert_activation and grouped_linear.
``_mlp`` is the reference in plain PyTorch; the kernels have the same signature.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ... import modes
from ...plans import ExpertPlan
from ..registry import define
from . import checks
from .activations import _activation, expert_activation
from .linear import KERNELS, PLAN, _linear, linear
from .quantized import QuantizedExperts


def _mlp(
    x: Tensor,  # [T, H]
    up: Tensor,  # [E, 2 * I, H], not gated [E, I, H]; transposed [E, H, 2 * I]
    down: Tensor,  # [E, H, I]; transposed [E, I, H]
    up_scale: Tensor | None,
    down_scale: Tensor | None,
    up_bias: Tensor | None,  # [E, 2 * I]
    down_bias: Tensor | None,  # [E, H]
    row_weight: Tensor | None,  # [T, K]
    order: Tensor,
    offsets: Tensor,
    position: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,  # gate and up take turns along up's outputs
    up_transposed: bool,
    down_transposed: bool,
    alpha: float,
    limit: float,
) -> Tensor:  # [T, H]
    plan = (order, offsets, position)
    z = _linear(x, up, up_scale, up_bias, None, *plan, False, True, up_transposed, "")
    h = _activation(z, activation, gated, interleaved, alpha, limit)
    return _linear(h, down, down_scale, down_bias, row_weight, *plan, True, False, down_transposed, "")


def _fake_mlp(x, up, down, *others):
    return x.new_empty(x.shape)


def _refuse(ctx, inputs, output):
    raise RuntimeError(
        "dynops::experts_mlp: has no gradient, and an argument needs one; dynops.ops.experts_mlp composes it from "
        "ops that have one"
    )


_whole_mlp = define(
    "experts_mlp(Tensor x, Tensor up, Tensor down, Tensor? up_scale, Tensor? down_scale, Tensor? up_bias, "
    f"Tensor? down_bias, Tensor? row_weight, {PLAN}, str activation, bool gated, bool interleaved, "
    "bool up_transposed, bool down_transposed, float alpha, float limit, str backend) -> Tensor",
    KERNELS.run("mlp", _mlp),
    _fake_mlp,
    _refuse,
    _refuse,
)


def experts_mlp(
    x: Tensor,
    up: Tensor | QuantizedExperts,
    down: Tensor | QuantizedExperts,
    plan: ExpertPlan,
    topk_weight: Tensor | None = None,
    *,
    gated: bool = True,
    activation: str | Callable[[Tensor], Tensor] | None = "silu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    backend: str | None = None,
) -> Tensor:
    """The MLP of each token's experts, weighted and summed.

    Equals, over the choices k of token t that are not dropped, with e = index[t, k]::

        sum_k topk_weight[t, k] * (down[e] @ act(up[e] @ x[t] + up_bias[e]) + down_bias[e])

    Args:
        x: ``[T, H]``.
        up: ``[E, 2 * I, H]``, gate above up (``gated``), or ``[E, I, H]``; ``x``'s dtype, or :func:`quantize_experts`.
        down: ``[E, H, I]``, the same.
        plan: of T tokens and E experts.
        topk_weight: ``[T, K]``, any floating dtype; None: 1.
        gated: whether ``up`` holds gate and up.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU), "relu6", "hardswish", "relu2",
            None; gated only: "clamped_swiglu" (gpt-oss). Or a callable ``[P, 2 * I or I] -> [P, I]``, applied
            between the two GEMMs to the rows in the plan's order.
        up_bias, down_bias: ``[E, 2 * I]`` (or ``[E, I]``), ``[E, H]``, or None.
        interleaved: the outputs of ``up`` are gate and up by turns.
        transposed: weights lie ``[E, H, 2 * I]`` and ``[E, I, H]``.
        alpha, limit: of clamped_swiglu, see :func:`expert_activation`.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[T, H]``, dtype of ``x``, accumulated in float32, the same in every run. ``x``, the weights, the biases and
        ``topk_weight`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: sparsely-gated mixture of experts (ICLR 2017), Switch Transformers (2021), MegaBlocks (MLSys 2023).
    """
    checks.rows(x, "x")
    checks.plan_rows(x, "x", checks.plan_of(plan, x), packed=False)
    x, up, down, up_bias, down_bias = checks.autocast(x, up, down, up_bias, down_bias)
    experts = plan.num_experts
    ups = checks.weights_of(up, up_bias, ("up", "up_bias"), x, experts, x.shape[1], transposed)
    downs = checks.weights_of(down, down_bias, ("down", "down_bias"), x, experts, None, transposed)
    checks.topk_weight_of(topk_weight, plan)
    indices, name = (plan.order, plan.offsets, plan.position), backend or ""

    def product(rows, weights, topk_weight, packed_in, packed_out):
        *tensors, transposed = weights
        return linear(rows, *tensors, topk_weight, *indices, packed_in, packed_out, transposed, "", name)

    if callable(activation):
        rows = activation(product(x, ups, None, False, True))
        checks.plan_rows(checks.rows(rows, "activation(rows)"), "activation(rows)", plan, packed=True)
        checks.fits(downs, "down", experts, rows.shape[1], "activation(rows)")
        return product(rows.to(x.dtype), downs, topk_weight, True, False)
    activation = checks.activation(activation, gated)
    outputs = ups.outputs
    if gated and outputs % 2:
        raise ValueError(f"up: expected an even number of outputs, gate and up, got {outputs}")
    checks.fits(downs, "down", experts, outputs // 2 if gated else outputs, "up")
    if modes.differentiated(x, *ups, *downs, topk_weight):
        options = {"gated": gated, "interleaved": interleaved, "alpha": alpha, "limit": limit}
        rows = product(x, ups, None, False, True)
        rows = expert_activation(rows, activation or None, **options, backend=backend)
        return product(rows, downs, topk_weight, True, False)
    tensors = ups.matrix, downs.matrix, ups.scale, downs.scale, ups.bias, downs.bias, topk_weight
    flips = ups.transposed, downs.transposed
    options = activation, gated, interleaved, *flips, float(alpha), float(limit)
    return _whole_mlp(x, *tensors, *indices, *options, name)
