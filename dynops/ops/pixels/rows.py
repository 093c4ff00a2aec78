"""gather_pixels and scatter_pixels: a dense map to the packed rows of a plan, and back.

``rows[i] = x[n, :, y, x]`` at the plan's i-th pixel; each is the other's gradient. ``merge_rows`` adds rows to a base,
or mixes them with it. Samples (``ops/samples.py``) are rows too: those of a map of one pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import cpu
from ...kernels.layout import empty_map
from ...kernels.layout import in_format as in_format  # for those who import it from here
from ...kernels.layout import in_format_of as in_format_of
from ...kernels.layout import memory_format_of as memory_format_of
from ...plans import PixelPlan
from .. import batching, checks
from ..dispatch import Kernels
from ..registry import define


def zero_past_count(rows: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """``rows`` with zeros in the unused rows of a capacity plan."""
    return rows if count is None else rows.masked_fill((index < 0)[:, None], 0)


def _gather_rows(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """``[N, C, H, W]`` to ``[P, C]``; rows past the count are zero."""
    flat = x.permute(0, 2, 3, 1).flatten(0, 2)
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
    return empty_map(rows, (shape[0], rows.shape[1], shape[1], shape[2]), torch.channels_last)


def _scatter_planes(rows, index, count, shape, base) -> Tensor:
    """``[P, C]`` to NCHW."""
    return torch.ops.dynops.scatter_rows(rows, index, count, shape, base).contiguous()


def _scatter_planes_fake(rows, index, count, shape, base) -> Tensor:
    return rows.new_empty(shape[0], rows.shape[1], shape[1], shape[2])


def _merge_rows(
    rows: Tensor,  # [K, F]
    index: Tensor,  # [K]
    count: Tensor | None,
    base: Tensor,  # [N, F]
    scale: Tensor | None,  # [K], None: 1
    mix: bool,
) -> Tensor:  # [N, F]
    """``base[n] + scale[i] * rows[i]`` at ``n = index[i]``, or with ``mix`` ``(1 - scale[i]) * base[n] + scale[i] * rows[i]``.

    Elsewhere ``base``. Accumulates in float32 at least. Mixed at a scale of 1, a row stands there as it is.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    if base.shape[0] == 0:
        return base.clone()
    kept, value = base[index.clamp(min=0).long()].to(wide), rows.to(wide)
    share = value.new_ones(len(rows), 1) if scale is None else scale.to(wide)[:, None]
    value = share * value + ((1 - share) * kept if mix else kept)
    if mix:
        value = torch.where(share == 1, rows.to(wide), value)
    padded = torch.cat([base, base[:1]])
    padded[torch.where(index < 0, base.shape[0], index.long())] = value.to(base.dtype)
    return padded[:-1].clone()


def _merge_rows_fake(rows, index, count, base, scale, mix) -> Tensor:
    return base.new_empty(base.shape)


# on a GPU the binary's kernels go before these (define)
_KERNELS, _COPIES = Kernels(cpu.rows, "rows"), Kernels(cpu.rows, "rows", copies=True)


def _gather_setup(ctx, inputs, output):
    x, index, count = inputs
    ctx.save_for_backward(index, count)
    ctx.shape = [x.shape[0], x.shape[2], x.shape[3]]
    ctx.planes = memory_format_of(x) == torch.contiguous_format


def _gather_backward(ctx, grad):
    index, count = ctx.saved_tensors
    scatter = scatter_planes if ctx.planes else scatter_rows
    return scatter(grad, index, count, ctx.shape, None), None, None


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


def _merge_setup(ctx, inputs, output):
    rows, index, count, base, scale, mix = inputs
    ctx.save_for_backward(
        index, count, scale, rows if scale is not None else None, base if mix and scale is not None else None
    )
    ctx.mix = mix


def _merge_backward(ctx, grad):
    index, count, scale, rows, base = ctx.saved_tensors
    dkept = _gather(grad, index, count)  # [K, F], zero past the count
    drows = dbase = dscale = None
    if ctx.needs_input_grad[0]:
        drows = dkept
        if scale is not None:
            drows = zero_past_count(dkept * scale.to(dkept.dtype)[:, None], index, count)
    if ctx.needs_input_grad[3]:
        dbase = grad
        if ctx.mix:
            left = dkept.new_zeros(dkept.shape)
            if scale is not None:
                left = torch.where(scale[:, None] == 1, left, (1 - scale.to(dkept.dtype))[:, None] * dkept)
            dbase = scatter_rows(left, index, count, [grad.shape[0], 1, 1], grad[:, :, None, None])
            dbase = dbase[:, :, 0, 0]
    if scale is not None and ctx.needs_input_grad[4]:
        change = rows if base is None else rows - _gather(base, index, count)
        dscale = torch.linalg.vecdot(dkept, change.to(dkept.dtype)).to(scale.dtype)
        dscale = zero_past_count(dscale[:, None], index, count)[:, 0]
    return drows, None, None, dbase, dscale, None


def _merge_jvp(op, primals, tangents):
    """Linear in rows and base; times the scale stands their difference, or without ``mix`` the rows."""
    rows, index, count, base, scale, mix = primals
    d_rows, _, _, d_base, d_scale, _ = tangents
    out = None
    if d_rows is not None or d_base is not None:
        d_rows = torch.zeros_like(rows) if d_rows is None else d_rows
        out = op(d_rows, index, count, torch.zeros_like(base) if d_base is None else d_base, scale, mix)
    if d_scale is not None:
        change = (rows - _gather(base, index, count)) if mix else rows
        change = change * d_scale.to(change.dtype)[:, None]
        change = scatter_rows(change, index, count, [base.shape[0], 1, 1], None)[:, :, 0, 0]
        out = change if out is None else out + change
    return out


def _gather(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """Rows of ``[N, F]``."""
    return gather_rows(x[:, :, None, None], index, count)


gather_rows = define(
    "gather_rows(Tensor x, Tensor index, Tensor? count) -> Tensor",
    _COPIES.run("gather_rows", _gather_rows, backend=""),
    _gather_rows_fake,
    _gather_setup,
    _gather_backward,
    terms="x",
    vmap=batching.passive(1, "x"),
)
scatter_rows, scatter_planes = (
    define(
        f"{name}(Tensor rows, Tensor index, Tensor? count, SymInt[] shape, Tensor? base) -> Tensor",
        _COPIES.run(name, reference, backend=""),
        fake,
        _scatter_setup,
        _scatter_backward,
        terms="rows, base",
        vmap=batching.passive(1, "rows", "base"),
    )
    for name, reference, fake in (
        ("scatter_rows", _scatter_rows, _scatter_rows_fake),
        ("scatter_planes", _scatter_planes, _scatter_planes_fake),
    )
)
merge_rows = define(
    "merge_rows(Tensor rows, Tensor index, Tensor? count, Tensor base, Tensor? scale, bool mix) -> Tensor",
    _KERNELS.run("merge_rows", _merge_rows, backend=""),
    _merge_rows_fake,
    _merge_setup,
    _merge_backward,
    jvp=_merge_jvp,
    vmap=batching.passive(1, "rows", "base"),
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
    checks.pixel_plan(plan, "plan")
    checks.packed_rows(rows, plan, "rows")
    if base is not None:
        checks.dense_map(base, plan, "base", channels=rows.shape[1], dtype=rows.dtype)
    return scatter_rows(rows, plan.index, plan.count, list(plan.shape), base)
