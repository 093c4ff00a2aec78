"""Grouped GEMMs of a mixture of experts, and the whole expert MLP in one op.

The mathematics, for row p of expert e, which is pair (t, k) of the plan::

    y[p, :]   = w[t, k] * activation(W[e] x[t, :] + b[e])          packed input: x[p, :] instead of x[t, :]
    out[t, :] = sum_k y[position[t, k], :]                         packed output: y itself

A dropped pair adds nothing; its packed row is zero. The gradients, with dy[p] = dout[t] (packed: dout[p])::

    dx[t]    = sum_k w[t, k] W[e]^T dy[p]                          packed input: a row each
    dW[e]    = sum_(p of e) w[t, k] dy[p] x[t]^T         db[e] = sum_(p of e) w[t, k] dy[p]
    dw[t, k] = (W[e]^T dy[p]) . x[t] + dy[p] . b[e]

so that dx is the same op with the weight transposed. The MLP is
``down(activation(up(x)))``, gathered at its input and combined at its output; where a gradient is needed it is
composed of grouped_linear, expert_activation, grouped_linear. ``_linear``, ``_weight_grad`` and ``_mlp`` are the
reference in plain PyTorch; the kernels have the same signatures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ... import backends, modes
from ...kernels.cpu import experts as cpp_experts
from ...plans import ExpertPlan
from ..epilogue import ACTIVATIONS
from ..registry import define
from . import checks
from .activations import _activation, expert_activation
from .checks import QuantizedExperts
from .rows import _combine, _gather, _weighted, combine, pair_dots

# ---------------------------------------------------------------------------------- reference


def _float_weight(weight: Tensor, scale: Tensor | None, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The weight itself, or ``weight * scale`` of eight bits."""
    if scale is None:
        return weight
    return (weight * (scale[:, None] if transposed else scale[:, :, None])).to(dtype)


def _spans(offsets: Tensor):
    """(e, begin, end) of the experts that have rows."""
    bounds = offsets.tolist()
    return [(e, b, c) for e, (b, c) in enumerate(itertools.pairwise(bounds)) if c > b]


def _linear(
    x: Tensor,  # [T, I], packed [P, I]
    weight: Tensor,  # [E, O, I], transposed [E, I, O]; int8 with a scale
    scale: Tensor | None,  # float32 [E, O]
    bias: Tensor | None,  # [E, O]
    row_weight: Tensor | None,  # [T, K], any floating dtype
    order: Tensor,  # int32 [P]
    offsets: Tensor,  # int32 [E + 1]
    position: Tensor,  # int32 [T, K]
    packed_in: bool,
    packed_out: bool,
    transposed: bool,
    activation: str,
) -> Tensor:  # [T, O], packed [P, O]
    plan = (order, offsets, position)
    rows = x if packed_in else _gather(x, None, *plan)
    weight = _float_weight(weight, scale, transposed, x.dtype)
    matrices = weight if transposed else weight.mT
    out = x.new_zeros(order.shape[0], matrices.shape[2])
    for e, begin, end in _spans(offsets):
        y = rows[begin:end] @ matrices[e]
        out[begin:end] = ACTIVATIONS[activation](y if bias is None else y + bias[e])
    if not packed_out:
        return _combine(out, row_weight, *plan)
    if row_weight is None:
        return out
    return _weighted(out, row_weight, order, offsets)


def _weight_grad(
    grad: Tensor,  # [T, O], packed [P, O]
    x: Tensor,  # [T, I], packed [P, I]
    row_weight: Tensor | None,  # [T, K]
    order: Tensor,
    offsets: Tensor,
    position: Tensor,
    packed_grad: bool,
    packed_x: bool,
    transposed: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:  # dW [E, O, I] or transposed [E, I, O]; db [E, O], or [0] where nobody asks
    plan = (order, offsets, position)
    if packed_grad:
        dy = grad if row_weight is None else _weighted(grad, row_weight, order, offsets)
    else:
        dy = _gather(grad, row_weight, *plan)
    rows = x if packed_x else _gather(x, None, *plan)
    dw = grad.new_zeros(offsets.shape[0] - 1, dy.shape[1], rows.shape[1])
    db = grad.new_zeros(dw.shape[:2] if bias else 0)
    for e, begin, end in _spans(offsets):
        dw[e] = dy[begin:end].t() @ rows[begin:end]
        if bias:
            db[e] = dy[begin:end].sum(0)
    return dw.mT.contiguous() if transposed else dw, db


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


# ---------------------------------------------------------------------- backends, fakes, schema


def _kernels(backend: str, x: Tensor):
    """The kernel module for ``x``, or None for the reference above."""
    name = backends.choose(backend, x.device, x.dtype)
    if name == "triton":
        from ...kernels.triton import experts

        return experts
    return cpp_experts if name == "cpp" else None


def _run_linear(*arguments):
    *arguments, backend = arguments
    kernels = _kernels(backend, arguments[0])
    return (_linear if kernels is None else kernels.linear)(*arguments)


def _run_weight_grad(*arguments):
    *arguments, backend = arguments
    kernels = _kernels(backend, arguments[0])
    return (_weight_grad if kernels is None else kernels.weight_grad)(*arguments)


def _run_mlp(*arguments):
    *arguments, backend = arguments
    kernels = _kernels(backend, arguments[0])
    return (_mlp if kernels is None else kernels.mlp)(*arguments)


def _fake_linear(x, weight, scale, bias, row_weight, order, offsets, position, *options):
    packed_in, packed_out, transposed, activation, backend = options
    outputs = weight.shape[2] if transposed else weight.shape[1]
    return x.new_empty(order.shape[0] if packed_out else position.shape[0], outputs)


def _fake_weight_grad(grad, x, row_weight, order, offsets, position, *options):
    packed_grad, packed_x, transposed, bias, backend = options
    shape = (x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])
    experts = offsets.shape[0] - 1
    return grad.new_empty(experts, *shape), grad.new_empty((experts, grad.shape[1]) if bias else (0,))


def _fake_mlp(x, up, down, *others):
    return x.new_empty(x.shape)


def _weight_grad_setup(ctx, inputs, output):
    grad, x, row_weight, *plan, ctx.packed_grad, ctx.packed_x, ctx.transposed, ctx.bias, ctx.backend = inputs
    ctx.save_for_backward(grad, x, row_weight, *plan)


def _weight_grad_backward(ctx, dw, db):
    """The gradients of a grouped linear layer's are such layers with ``dw`` and ``db`` as weight and bias."""
    grad, x, row_weight, *plan = ctx.saved_tensors
    need_grad, need_x, need_rw = ctx.needs_input_grad[:3]
    db = db if ctx.bias else None
    d_grad = dx = d_rows = None

    def forward(weights, packed):
        return _grouped(
            x, dw, None, db, weights, *plan, ctx.packed_x, packed, ctx.transposed, "", ctx.backend
        )

    if need_grad:
        d_grad = forward(row_weight, ctx.packed_grad)
    if need_x:
        options = (ctx.packed_grad, ctx.packed_x, not ctx.transposed, "", ctx.backend)
        dx = _grouped(grad, dw, None, None, row_weight, *plan, *options)
    if need_rw:
        d_rows = pair_dots(grad, forward(None, True), ctx.packed_grad, *plan, ctx.backend).to(
            row_weight.dtype
        )
    return d_grad, dx, d_rows, *[None] * 8


def _refuse(ctx, inputs, output):
    raise RuntimeError(
        "dynops::experts_mlp: has no gradient, and an argument needs one; dynops.ops.experts_mlp composes it from "
        "ops that have one"
    )


_PLAN = "Tensor order, Tensor offsets, Tensor position"
_weights_grad = define(
    f"grouped_weight_grad(Tensor grad, Tensor x, Tensor? row_weight, {_PLAN}, bool packed_grad, bool packed_x, "
    "bool transposed, bool bias, str backend) -> (Tensor, Tensor)",
    _run_weight_grad,
    _fake_weight_grad,
    _weight_grad_setup,
    _weight_grad_backward,
    terms="grad x row_weight; grad row_weight",
)

# ----------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    *tensors, packed_in, packed_out, transposed, activation, backend = inputs
    if activation:
        raise RuntimeError(
            "dynops::grouped_linear: the fused activation has no gradient; the public functions of dynops.ops "
            "compose it from ops that have one"
        )
    ctx.save_for_backward(*tensors)
    ctx.options = packed_in, packed_out, transposed, backend


def _backward(ctx, grad):
    x, weight, scale, bias, row_weight, *plan = ctx.saved_tensors
    packed_in, packed_out, transposed, backend = ctx.options
    need_x, need_w, _, need_b, need_rw = ctx.needs_input_grad[:5]
    dx = dw = db = d_rows = None
    if need_x or need_rw:
        weight_of_x = _float_weight(weight, scale, transposed, x.dtype)

        def input_grad(weights, packed):
            return _grouped(
                grad, weight_of_x, None, None, weights, *plan, packed_out, packed, not transposed, "", backend
            )

        if need_rw:  # which needs W^T dy of each pair without its weight
            rows = input_grad(None, True)
            d_rows = _row_weight_grad(grad, x, rows, bias, row_weight, plan, ctx.options)
            if need_x and packed_in:
                dx = _weighted(rows, row_weight, *plan[:2])
            elif need_x:
                dx = combine(rows, row_weight, *plan, backend)
        else:
            dx = input_grad(row_weight, packed_in)
    if need_w or need_b:
        dw, db = _weights_grad(grad, x, row_weight, *plan, packed_out, packed_in, transposed, need_b, backend)
    return dx, dw if need_w else None, None, db if need_b else None, d_rows, *[None] * 8


def _row_weight_grad(grad, x, rows, bias, row_weight, plan, options) -> Tensor:
    """``(W^T dy) . x + dy . b`` of each pair ``[T, K]``."""
    packed_in, packed_out, _, backend = options
    sums = pair_dots(x, rows, packed_in, *plan, backend)
    if bias is not None:
        last = plan[1].shape[0] - 2
        rows = torch.arange(plan[0].shape[0], dtype=torch.int32, device=x.device)
        expert = torch.searchsorted(plan[1][1:], rows, right=True).clamp(max=last)
        sums = sums + pair_dots(grad, bias[expert], packed_out, *plan, backend)
    return sums.to(row_weight.dtype)


_grouped = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? row_weight, "
    f"{_PLAN}, bool packed_in, bool packed_out, bool transposed, str activation, str backend) -> Tensor",
    _run_linear,
    _fake_linear,
    _setup_context,
    _backward,
    terms="x weight row_weight, bias row_weight",
)
_whole_mlp = define(
    "experts_mlp(Tensor x, Tensor up, Tensor down, Tensor? up_scale, Tensor? down_scale, Tensor? up_bias, "
    f"Tensor? down_bias, Tensor? row_weight, {_PLAN}, str activation, bool gated, bool interleaved, "
    "bool up_transposed, bool down_transposed, float alpha, float limit, str backend) -> Tensor",
    _run_mlp,
    _fake_mlp,
    _refuse,
    _refuse,
)

# ------------------------------------------------------------------------------ public functions


def quantize_experts(weight: Tensor, transposed: bool = False) -> QuantizedExperts:
    """Rounds the weights of experts to eight bits, with a scale for each output channel.

    Args:
        weight: ``[E, O, I]``, floating; ``transposed``: ``[E, I, O]``.

    Returns:
        ``QuantizedExperts(weight, scale)``: int8 of ``weight``'s shape, and float32 ``[E, O]``: the largest magnitude
        of the channel / 127. Where few rows share an expert the op's time is the weight's bytes, a quarter of
        float32's. Taken by ``grouped_linear`` and ``experts_mlp`` in place of a weight, without a gradient of it.
    """
    rows = weight.detach().float()
    dim = 1 if transposed else 2
    largest = rows.abs().amax(dim, keepdim=True) if rows.shape[dim] else rows.new_zeros(rows.mT.shape[:2])
    scale = largest / 127
    levels = (rows / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return QuantizedExperts(levels, scale.reshape(weight.shape[0], -1).contiguous())


def grouped_linear(
    x: Tensor,
    weight: Tensor | QuantizedExperts,
    plan: ExpertPlan,
    bias: Tensor | None = None,
    *,
    topk_weight: Tensor | None = None,
    packed_in: bool = False,
    packed_out: bool = True,
    transposed: bool = False,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of each row's own expert.

    Row p of expert e, pair (t, k) of the plan, is ``topk_weight[t, k] * activation(x[t] @ weight[e].T + bias[e])``.

    Args:
        x: ``[T, I]``, a row for each token, gathered as the kernel reads it; ``packed_in``: ``[P, I]``, a row for
            each pair in the plan's order.
        weight: ``[E, O, I]`` of ``x``'s dtype (``transposed``: ``[E, I, O]``), or :func:`quantize_experts` of it.
        plan: of T tokens and E experts.
        bias: ``[E, O]`` or None.
        topk_weight: ``[T, K]``, any floating dtype; None: 1.
        packed_in, packed_out: whether x, and the result, are packed in the plan's order.
        transposed: weights lie ``[E, I, O]``.
        activation: None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "relu2".
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[P, O]``, dropped rows zero; without ``packed_out`` their sums ``[T, O]``, accumulated in float32, the same in every
        run. Dtype of ``x``. ``x``, ``weight``, ``bias`` and ``topk_weight`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: MegaBlocks (MLSys 2023), scattered mixture of experts (2024).
    """
    checks.rows(x, "x")
    checks.plan_rows(x, "x", checks.plan_of(plan, x), packed_in)
    x, weight, bias = checks.autocast(x, weight, bias)
    matrix, scale, transposed = checks.weight_of(weight, "weight", x, transposed)
    checks.fits(matrix, "weight", transposed, plan.num_experts, x.shape[1])
    checks.bias_of(bias, "bias", x, plan.num_experts, checks.sizes_of(matrix, transposed)[0])
    checks.topk_weight_of(topk_weight, plan)
    activation = checks.activation(activation, gated=False)
    indices = (plan.order, plan.offsets, plan.position)
    tensors = (x, matrix, scale, bias)
    if not activation or not modes.differentiated(*tensors, topk_weight):
        options = (packed_in, packed_out, transposed, activation, backend or "")
        return _grouped(*tensors, topk_weight, *indices, *options)
    y = _grouped(*tensors, None, *indices, packed_in, True, transposed, "", backend or "")
    y = ACTIVATIONS[activation](y)
    if not packed_out:
        return combine(y, topk_weight, *indices, backend or "")
    if topk_weight is None:
        return y
    return _weighted(y, topk_weight, plan.order, plan.offsets)


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
    up_matrix, up_scale, up_transposed = checks.weight_of(up, "up", x, transposed)
    down_matrix, down_scale, down_transposed = checks.weight_of(down, "down", x, transposed)
    checks.fits(up_matrix, "up", up_transposed, plan.num_experts, x.shape[1])
    up_outputs = checks.sizes_of(up_matrix, up_transposed)[0]
    checks.bias_of(up_bias, "up_bias", x, plan.num_experts, up_outputs)
    checks.bias_of(
        down_bias, "down_bias", x, plan.num_experts, checks.sizes_of(down_matrix, down_transposed)[0]
    )
    checks.topk_weight_of(topk_weight, plan)
    indices, name = (plan.order, plan.offsets, plan.position), backend or ""
    ups, downs = (up_matrix, up_scale, up_bias), (down_matrix, down_scale, down_bias)

    def linear(rows, tensors, weights, packed_in, packed_out, flip):
        return _grouped(rows, *tensors, weights, *indices, packed_in, packed_out, flip, "", name)

    if callable(activation):
        rows = activation(linear(x, ups, None, False, True, up_transposed))
        checks.plan_rows(checks.rows(rows, "activation(rows)"), "activation(rows)", plan, packed=True)
        checks.fits(down_matrix, "down", down_transposed, plan.num_experts, rows.shape[1], "activation(rows)")
        return linear(rows.to(x.dtype), downs, topk_weight, True, False, down_transposed)
    activation = checks.activation(activation, gated)
    if gated and up_outputs % 2:
        raise ValueError(f"up: expected an even number of outputs, gate and up, got {up_outputs}")
    inner = up_outputs // 2 if gated else up_outputs
    checks.fits(down_matrix, "down", down_transposed, plan.num_experts, inner, "up")
    options = {"gated": gated, "interleaved": interleaved, "alpha": alpha, "limit": limit}
    if modes.differentiated(x, *ups, *downs, topk_weight):
        rows = linear(x, ups, None, False, True, up_transposed)
        rows = expert_activation(rows, activation or None, **options, backend=backend)
        return linear(rows, downs, topk_weight, True, False, down_transposed)
    tensors = (up_matrix, down_matrix, up_scale, down_scale, up_bias, down_bias, topk_weight)
    flips = (up_transposed, down_transposed)
    return _whole_mlp(x, *tensors, *indices, activation, gated, interleaved, *flips, float(alpha), float(limit), name)  # fmt: skip


__all__ = ["experts_mlp", "grouped_linear", "quantize_experts"]
