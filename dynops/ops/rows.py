"""gather_pixels and scatter_pixels: a dense map to the packed rows of a plan, and back.

``rows[i] = x[n, :, y, x]`` at the plan's i-th pixel; each is the other's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..kernels import cpp
from ..kernels.layout import memory_format_of as memory_format_of  # for those who import it from here
from ..plans import PixelPlan
from .registry import define


def zero_past_count(rows: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """``rows`` with zeros in the unused rows of a capacity plan."""
    return rows if count is None else rows.masked_fill((index < 0)[:, None], 0)


def _gather_rows(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """``[N, C, H, W]`` to ``[P, C]``; rows past the count are zero."""
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    if count is None:
        return flat[index.long()]
    rows = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
    return rows[torch.where(index < 0, flat.shape[0], index.long())]


def _gather_rows_fake(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _scatter_rows(
    rows: Tensor, index: Tensor, count: Tensor | None, shape: list[int], base: Tensor | None
) -> Tensor:
    """``[P, C]`` to channels_last ``[N, C, H, W]``; elsewhere ``base``, or zero."""
    n, h, w = shape
    channels = rows.shape[1]
    flat = rows.new_zeros(n * h * w + 1, channels)
    if base is not None:
        flat[:-1] = base.permute(0, 2, 3, 1).reshape(-1, channels)
    flat[torch.where(index < 0, n * h * w, index.long())] = rows
    out = flat[:-1].view(n, h, w, channels).permute(0, 3, 1, 2)
    return out.clone(memory_format=torch.channels_last)


def _scatter_rows_fake(rows, index, count, shape, base) -> Tensor:
    out = rows.new_empty(shape[0], rows.shape[1], shape[1], shape[2])
    return out.contiguous(memory_format=torch.channels_last)


def _kernels(x: Tensor):
    """The kernel module for ``x``, or None for the reference above (on a GPU the binary's go before: ``define``)."""
    if x.device.type == "cpu" and backends.has_binary():
        return cpp
    if x.is_cuda and backends.has_triton() and x.element_size() <= 8:
        from ..kernels import rows

        return rows
    return None


def _run_gather_rows(x, index, count) -> Tensor:
    kernels = _kernels(x)
    return (_gather_rows if kernels is None else kernels.gather_rows)(x, index, count)


def _run_scatter_rows(rows, index, count, shape, base) -> Tensor:
    kernels = _kernels(rows)
    return (_scatter_rows if kernels is None else kernels.scatter_rows)(rows, index, count, shape, base)


def _gather_setup(ctx, inputs, output):
    x, index, count = inputs
    ctx.save_for_backward(index, count)
    ctx.shape = [x.shape[0], x.shape[2], x.shape[3]]


def _gather_backward(ctx, grad):
    index, count = ctx.saved_tensors
    return scatter_rows(grad, index, count, ctx.shape, None), None, None


def _scatter_setup(ctx, inputs, output):
    rows, index, count, shape, base = inputs
    ctx.save_for_backward(index, count)
    ctx.shape = shape


def _scatter_backward(ctx, grad):
    index, count = ctx.saved_tensors
    drows = gather_rows(grad, index, count) if ctx.needs_input_grad[0] else None
    dbase = None
    if ctx.needs_input_grad[4]:
        zeros = grad.new_zeros(index.shape[0], grad.shape[1])
        dbase = scatter_rows(zeros, index, count, ctx.shape, grad)
    return drows, None, None, None, dbase


gather_rows = define(
    "gather_rows(Tensor x, Tensor index, Tensor? count) -> Tensor",
    _run_gather_rows,
    _gather_rows_fake,
    _gather_setup,
    _gather_backward,
)
scatter_rows = define(
    "scatter_rows(Tensor rows, Tensor index, Tensor? count, SymInt[] shape, Tensor? base) -> Tensor",
    _run_scatter_rows,
    _scatter_rows_fake,
    _scatter_setup,
    _scatter_backward,
)


def gather_pixels(x: Tensor, plan: PixelPlan) -> Tensor:
    """The rows of ``x`` at the plan's pixels.

    Args:
        x: ``[N, C, H, W]``, any dtype, at the plan's resolution; channels_last is fastest.

    Returns:
        ``[plan.num_rows, C]``; in the capacity form rows past the count are zero.

    Raises:
        TypeError, ValueError: ``x`` is not a tensor of the plan's batch and size on its device.
    """
    from . import checks

    checks.pixel_plan(plan, "plan")
    checks.dense_map(x, plan, "x")
    return gather_rows(x, plan.index, plan.count)


def scatter_pixels(rows: Tensor, plan: PixelPlan, base: Tensor | None = None) -> Tensor:
    """The dense map with ``rows`` at the plan's pixels and ``base`` (or zero) elsewhere.

    Args:
        rows: ``[plan.num_rows, C]``.
        base: ``[N, C, H, W]`` of the same dtype, or None.

    Returns:
        ``[N, C, H, W]`` in channels_last.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the plan.
    """
    from . import checks

    checks.pixel_plan(plan, "plan")
    checks.packed_rows(rows, plan, "rows")
    if base is not None:
        checks.dense_map(base, plan, "base", channels=rows.shape[1], dtype=rows.dtype)
    return scatter_rows(rows, plan.index, plan.count, list(plan.shape), base)
