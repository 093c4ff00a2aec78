"""grouped_linear: a linear layer of each row's own expert.

The mathematics, for row p of expert e, which is pair (t, k) of the plan::

    y[p, :]   = w[t, k] * activation(W[e] x[t, :] + b[e])          packed input: x[p, :] instead of x[t, :]
    out[t, :] = sum_k y[position[t, k], :]                         packed output: y itself

A dropped pair adds nothing; its packed row is zero. The gradients, with dy[p] = dout[t] (packed: dout[p])::

    dx[t]    = sum_k w[t, k] W[e]^T dy[p]                          packed input: a row each
    dW[e]    = sum_(p of e) w[t, k] dy[p] x[t]^T         db[e] = sum_(p of e) w[t, k] dy[p]
    dw[t, k] = (W[e]^T dy[p]) . x[t] + dy[p] . b[e]

so that dx is the same op with the weight transposed. ``_linear`` and ``_weight_grad`` are the reference in plain
PyTorch; the kernels have the same signatures.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ... import modes
from ...kernels import cpu
from ...plans import ExpertPlan
from .. import checks as tensor_checks
from ..dispatch import Kernels
from ..epilogue import ACTIVATIONS
from ..registry import define, save_inputs, saved_inputs
from . import checks
from .quantized import QuantizedExperts, float_weight
from .rows import _combine, _gather, combine, pair_dots, weighted_rows

# ---------------------------------------------------------------------------------- reference


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
    weight = float_weight(weight, scale, transposed, x.dtype)
    matrices = weight if transposed else weight.mT
    out = x.new_zeros(order.shape[0], matrices.shape[2])
    for e, begin, end in _spans(offsets):
        y = rows[begin:end] @ matrices[e]
        out[begin:end] = ACTIVATIONS[activation](y if bias is None else y + bias[e])
    if not packed_out:
        return _combine(out, row_weight, *plan)
    if row_weight is None:
        return out
    return weighted_rows(out, row_weight, order, offsets)


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
        dy = grad if row_weight is None else weighted_rows(grad, row_weight, order, offsets)
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


# ---------------------------------------------------------------------- backends, fakes, schema


KERNELS = Kernels(cpu.experts, "experts")


def _fake_linear(x, weight, scale, bias, row_weight, order, offsets, position, *options):
    packed_in, packed_out, transposed, activation, backend = options
    outputs = weight.shape[2] if transposed else weight.shape[1]
    return x.new_empty(order.shape[0] if packed_out else position.shape[0], outputs)


def _fake_weight_grad(grad, x, row_weight, order, offsets, position, *options):
    packed_grad, packed_x, transposed, bias, backend = options
    shape = (x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])
    experts = offsets.shape[0] - 1
    return grad.new_empty(experts, *shape), grad.new_empty((experts, grad.shape[1]) if bias else (0,))


def _weight_grad_backward(ctx, dw, db):
    """The gradients of a grouped linear layer's are such layers with ``dw`` and ``db`` as weight and bias."""
    grad, x, row_weight, *plan, packed_grad, packed_x, transposed, bias, backend = saved_inputs(ctx)
    need_grad, need_x, need_rw = ctx.needs_input_grad[:3]
    db = db if bias else None
    d_grad = dx = d_rows = None

    def forward(weights, packed):
        return linear(x, dw, None, db, weights, *plan, packed_x, packed, transposed, "", backend)

    if need_grad:
        d_grad = forward(row_weight, packed_grad)
    if need_x:
        options = (packed_grad, packed_x, not transposed, "", backend)
        dx = linear(grad, dw, None, None, row_weight, *plan, *options)
    if need_rw:
        d_rows = pair_dots(grad, forward(None, True), packed_grad, *plan, backend).to(row_weight.dtype)
    return d_grad, dx, d_rows, *[None] * 8


PLAN = "Tensor order, Tensor offsets, Tensor position"
_weight_grad_op = define(
    f"grouped_weight_grad(Tensor grad, Tensor x, Tensor? row_weight, {PLAN}, bool packed_grad, bool packed_x, "
    "bool transposed, bool bias, str backend) -> (Tensor, Tensor)",
    KERNELS.run("weight_grad", _weight_grad),
    _fake_weight_grad,
    save_inputs,
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
        weight_of_x = float_weight(weight, scale, transposed, x.dtype)

        def input_grad(weights, packed):
            return linear(
                grad, weight_of_x, None, None, weights, *plan, packed_out, packed, not transposed, "", backend
            )

        if need_rw:  # which needs W^T dy of each pair without its weight
            rows = input_grad(None, True)
            d_rows = _row_weight_grad(grad, x, rows, bias, row_weight, plan, ctx.options)
            if need_x and packed_in:
                dx = weighted_rows(rows, row_weight, *plan[:2])
            elif need_x:
                dx = combine(rows, row_weight, *plan, backend)
        else:
            dx = input_grad(row_weight, packed_in)
    if need_w or need_b:
        dw, db = _weight_grad_op(
            grad, x, row_weight, *plan, packed_out, packed_in, transposed, need_b, backend
        )
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


linear = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? row_weight, "
    f"{PLAN}, bool packed_in, bool packed_out, bool transposed, str activation, str backend) -> Tensor",
    KERNELS.run("linear", _linear),
    _fake_linear,
    _setup_context,
    _backward,
    terms="x weight row_weight, bias row_weight",
)
# ------------------------------------------------------------------------------ public functions


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
    weights = checks.weights_of(weight, bias, ("weight", "bias"), x, plan.num_experts, x.shape[1], transposed)
    checks.topk_weight_of(topk_weight, plan)
    activation = tensor_checks.activation(activation)
    indices = (plan.order, plan.offsets, plan.position)
    *tensors, transposed = weights
    if not activation or not modes.differentiated(x, *tensors, topk_weight):
        options = (packed_in, packed_out, transposed, activation, backend or "")
        return linear(x, *tensors, topk_weight, *indices, *options)
    y = linear(x, *tensors, None, *indices, packed_in, True, transposed, "", backend or "")
    y = ACTIVATIONS[activation](y)
    if not packed_out:
        return combine(y, topk_weight, *indices, backend or "")
    if topk_weight is None:
        return y
    return weighted_rows(y, topk_weight, plan.order, plan.offsets)
