"""Rows of tokens to rows of a plan and back: the copies around experts that are modules of their own.

The mathematics, for row p of pair (t, k)::

    gather_pairs:   rows[p, :] = x[t, :], 0 where the pair is dropped
    combine_pairs:  out[t, :] = sum_k weight[t, k] * rows[position[t, k], :], over the pairs that are not dropped

Each is the other's gradient; the weight's is ``dweight[t, k] = dout[t] . rows[position[t, k]]``. ``_gather``,
``_combine`` and ``_dots`` are the reference; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import cpu
from ...plans import ExpertPlan
from .. import batching
from ..dispatch import Kernels
from ..registry import define, save_inputs, saved_inputs
from . import checks

# ---------------------------------------------------------------------------------- reference


def _kept(rows: Tensor, position: Tensor) -> Tensor:
    """``[T, K, C]``: the row of each pair, zero where it is dropped."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*position.shape, rows.shape[1])
    return torch.where((position < 0)[:, :, None], 0, rows[position.clamp(min=0).long()])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gather(
    x: Tensor,  # [T, C]
    weight: Tensor | None,  # [T, K], times the row; None: 1
    order: Tensor,
    offsets: Tensor,
    position: Tensor,
) -> Tensor:  # [P, C]
    order = order.long()
    live = torch.arange(order.shape[0], device=x.device) < offsets[-1]
    rows = x[order // position.shape[1]] if x.shape[0] else x.new_zeros(0, x.shape[1])
    if weight is not None:
        rows = (rows * weight.reshape(-1)[order][:, None]).to(x.dtype)
    return torch.where(live[:, None], rows, 0)


def _combine(rows: Tensor, weight: Tensor | None, order, offsets, position) -> Tensor:  # [T, C]
    """Accumulates in float32 at least, in the order of the choices."""
    pairs = _kept(rows, position).to(_wide(rows.dtype))
    if weight is not None:
        pairs = pairs * torch.where(position < 0, 0, weight)[:, :, None].to(pairs.dtype)
    return pairs.sum(1).to(rows.dtype)


def _dots(x: Tensor, rows: Tensor, packed: bool, order, offsets, position) -> Tensor:  # [T, K], float32
    """``x . rows[p]`` of each pair, 0 where it is dropped. ``x``: a row for each token, or packed for each pair."""
    pairs = _kept(rows, position).to(_wide(rows.dtype))
    sums = (pairs * (_kept(x, position) if packed else x[:, None])).sum(2)
    return torch.where(position < 0, 0, sums)


def weighted_rows(rows: Tensor, weight: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Packed rows times the weight ``[T, K]`` of their pair; dropped ones zero, whatever theirs is."""
    live = torch.arange(order.shape[0], device=rows.device) < offsets[-1]
    weighted = rows * weight.reshape(-1)[order.long()][:, None]
    return torch.where(live[:, None], weighted, 0).to(rows.dtype)


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.experts, "experts")


def _fake_gather(x, weight, order, offsets, position, backend):
    return x.new_empty(order.shape[0], x.shape[1])


def _fake_combine(rows, weight, order, offsets, position, backend):
    return rows.new_empty(position.shape[0], rows.shape[1])


def _fake_dots(x, rows, packed, order, offsets, position, backend):
    return rows.new_empty(position.shape, dtype=_wide(rows.dtype))


_PLAN = "Tensor order, Tensor offsets, Tensor position, str backend"


def _dots_backward(ctx, grad):
    x, rows, packed, *plan, backend = saved_inputs(ctx)
    need_x, need_rows = ctx.needs_input_grad[:2]
    dx = d_rows = None
    if need_x and packed:
        dx = weighted_rows(rows, grad, *plan[:2])
    elif need_x:
        dx = combine(rows, grad, *plan, backend).to(x.dtype)
    if need_rows:
        d_rows = weighted_rows(x, grad, *plan[:2]) if packed else gather(x, grad, *plan, backend)
        d_rows = d_rows.to(rows.dtype)
    return dx, d_rows, *[None] * 5


def _gather_backward(ctx, grad):
    x, weight, *plan = saved_inputs(ctx)
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx = combine(grad, weight, *plan) if need_x else None
    dw = pair_dots(x, grad, False, *plan).to(weight.dtype) if need_weight else None
    return dx, dw, *[None] * 4


def _combine_backward(ctx, grad):
    rows, weight, *plan = saved_inputs(ctx)
    need_rows, need_weight = ctx.needs_input_grad[:2]
    d_rows = gather(grad, weight, *plan) if need_rows else None
    dw = pair_dots(grad, rows, False, *plan).to(weight.dtype) if need_weight else None
    return d_rows, dw, *[None] * 4


pair_dots = define(
    f"pair_dots(Tensor x, Tensor rows, bool packed, {_PLAN}) -> Tensor",
    _KERNELS.run("dots", _dots),
    _fake_dots,
    save_inputs,
    _dots_backward,
    terms="x rows",
)


gather = define(
    f"gather_pairs(Tensor x, Tensor? weight, {_PLAN}) -> Tensor",
    _KERNELS.run("gather", _gather),
    _fake_gather,
    save_inputs,
    _gather_backward,
    terms="x weight",
    vmap=batching.passive(1, "x"),
)
combine = define(
    f"combine_pairs(Tensor rows, Tensor? weight, {_PLAN}) -> Tensor",
    _KERNELS.run("combine", _combine),
    _fake_combine,
    save_inputs,
    _combine_backward,
    terms="rows weight",
    vmap=batching.passive(1, "rows"),
)

# ------------------------------------------------------------------------------ public functions


def gather_pairs(x: Tensor, plan: ExpertPlan, *, backend: str | None = None) -> Tensor:
    """The rows of a plan: each token's row for each of its choices, sorted by expert.

    Args:
        x: ``[T, C]``, floating.
        plan: of T tokens.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[P, C]``, dtype of ``x``: rows ``plan.offsets[e]`` to ``plan.offsets[e + 1]`` are those of expert e; the
        dropped ones are zero. ``x`` gets its gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    checks.rows(x, "x")
    checks.plan_rows(x, "x", checks.plan_of(plan, x), packed=False)
    return gather(x, None, plan.order, plan.offsets, plan.position, backend or "")


def combine_pairs(
    rows: Tensor, plan: ExpertPlan, topk_weight: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The weighted sum of each token's rows.

    Args:
        rows: ``[P, C]`` in the plan's order, floating.
        plan: of T tokens.
        topk_weight: ``[T, K]``, any floating dtype; None: 1.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[T, C]``, dtype of ``rows``, accumulated in float32 in the order of the choices; dropped pairs add nothing.
        ``rows`` and ``topk_weight`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    checks.rows(rows, "rows")
    checks.plan_rows(rows, "rows", checks.plan_of(plan, rows), packed=True)
    checks.topk_weight_of(topk_weight, plan)
    return combine(rows, topk_weight, plan.order, plan.offsets, plan.position, backend or "")
