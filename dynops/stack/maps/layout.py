"""Axes of a tensor whose pixels are rows ``[P, *channels]``: where batch, height, width and channels stand in its shape.

Axes are a tuple of letters: "n", "h", "w"; "s", height and width in one; "c", a channel axis. The k-th "c" is axis
``1 + k`` of the rows. A map ``[N, C, H, W]`` is ("n", "c", "h", "w"), tokens ``[N, H * W, C]`` are ("n", "s", "c").
"""

from __future__ import annotations

import math

from torch import Tensor

from ...ops.pixels.rows import gather_rows, scatter_rows
from ...plans import PixelPlan
from ..layers.pool import spread_over

NCHW, NCS = ("n", "c", "h", "w"), ("n", "c", "s")
_PIXELS = ("n", "h", "w", "s")


def sizes_of(plan: PixelPlan) -> dict[str, int]:
    """The size of each axis that is no channel."""
    n, h, w = plan.shape
    return {"n": n, "h": h, "w": w, "s": h * w}


def shape_of(axes: tuple[str, ...], plan: PixelPlan, channels: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    sizes, left = sizes_of(plan), iter(channels)
    return tuple([next(left) if axis == "c" else sizes[axis] for axis in axes])


def normalized(dims, rank: int) -> tuple[int, ...] | None:
    """Dimensions counted from the front; None where one is no dimension."""
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if not all(isinstance(d, int) and -rank <= d < rank for d in dims):
        return None
    return tuple([d % rank for d in dims])


def channel_axis(axes: tuple[str, ...], dim: int) -> int | None:
    """The axis of the rows that dimension ``dim`` is, or None."""
    return 1 + axes[:dim].count("c") if axes[dim] == "c" else None


def permuted(axes: tuple[str, ...], dims: tuple[int, ...]) -> tuple[tuple[str, ...], list[int]]:
    """The axes in another order, and the order of the rows' axes."""
    order = [0] + [channel_axis(axes, d) for d in dims if axes[d] == "c"]
    return tuple([axes[d] for d in dims]), order


def reshaped(
    axes: tuple[str, ...], old: tuple[int, ...], new: tuple[int, ...], size: tuple[int, int]
) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The axes and the channels of a tensor that is viewed in another shape.

    None where channels and pixels are mixed. Height and width, ``size``, may be joined, and parted again.
    """
    if not all(isinstance(size, int) for size in (*old, *new)) or new.count(-1) > 1:
        return None
    if -1 in new:
        rest = math.prod(size for size in new if size != -1)
        if rest == 0 or math.prod(old) % rest:
            return None
        new = tuple([math.prod(old) // rest if size == -1 else size for size in new])
    if math.prod(old) != math.prod(new):
        return None
    made, channels, i, j = [], [], 0, 0
    while i < len(axes) or j < len(new):
        if i < len(axes) and axes[i] == "c":
            run = i
            while run < len(axes) and axes[run] == "c":
                run += 1
            taken = _split(math.prod(old[i:run]), new[j:], old[run] if run < len(axes) else None)
            if taken is None:
                return None
            channels += new[j : j + taken]
            made += ["c"] * taken
            i, j = run, j + taken
        elif i < len(axes) and j < len(new) and new[j] == old[i]:
            made.append(axes[i])
            i, j = i + 1, j + 1
        elif (
            i + 1 < len(axes)
            and j < len(new)
            and axes[i : i + 2] == ("h", "w")
            and new[j] == old[i] * old[i + 1]
        ):
            made.append("s")
            i, j = i + 2, j + 1
        elif i < len(axes) and axes[i] == "s" and tuple(new[j : j + 2]) == size:
            made += ["h", "w"]
            i, j = i + 1, j + 2
        elif j < len(new) and new[j] == 1:  # a new axis of one channel
            made.append("c")
            channels.append(1)
            j += 1
        else:
            return None
    return tuple(made), tuple(channels)


def _split(product: int, sizes: tuple[int, ...], following: int | None) -> int | None:
    """How many of the first sizes have this product; those of 1 after it count where the next is not one too."""
    total = 1
    for taken, size in enumerate(sizes, 1):
        total *= size
        if total == product:
            while taken < len(sizes) and sizes[taken] == 1 and following != 1:
                taken += 1
            return taken
        if total > product:
            return None
    return 0 if product == 1 else None


def scattered(rows: Tensor, plan: PixelPlan, axes: tuple[str, ...]) -> Tensor:
    """The dense tensor of rows ``[P, *channels]``: zero where no row is."""
    channels = tuple(rows.shape[1:])
    dense = scatter_rows(
        rows.flatten(1) if channels else rows[:, None], plan.index, plan.count, list(plan.shape), None
    )
    if axes == NCHW:
        return dense
    dense = (
        dense.permute(0, 2, 3, 1).unflatten(3, channels) if len(channels) > 1 else dense.permute(0, 2, 3, 1)
    )
    dense = dense if channels else dense[..., 0]
    return _in_order(dense, axes, plan)


def _in_order(dense: Tensor, axes: tuple[str, ...], plan: PixelPlan) -> Tensor:
    """``[N, H, W, *channels]`` with its axes in this order."""
    joined = "s" in axes
    if joined:
        dense = dense.flatten(1, 2)
    now, channel = [], 2 if joined else 3
    for axis in axes:
        if axis == "c":
            now.append(channel)
            channel += 1
        else:
            now.append(("n", "s").index(axis) if joined else ("n", "h", "w").index(axis))
    return dense.permute(now)


def gathered(x: Tensor, plan: PixelPlan, axes: tuple[str, ...]) -> Tensor | None:
    """The rows of a tensor that broadcasts with one of these axes, or what broadcasts with such rows.

    Returns:
        ``[P, *channels]`` of a tensor that differs from pixel to pixel, ``[*channels]`` of one that does not, itself
        of one without dimensions. None where it does not fit.
    """
    if x.dim() == 0:
        return x
    if x.dim() > len(axes):
        return None
    x = x[(None,) * (len(axes) - x.dim())]
    sizes = sizes_of(plan)
    if any(axis != "c" and size not in (1, sizes[axis]) for axis, size in zip(axes, x.shape, strict=True)):
        return None
    places = [i for letter in _PIXELS for i, axis in enumerate(axes) if axis == letter]
    order = places + [i for i, axis in enumerate(axes) if axis == "c"]
    count = len(places)
    if axes == NCHW and tuple(x.shape[i] for i in places) == plan.shape:
        return gather_rows(x, plan.index, plan.count)
    if all(x.shape[i] == 1 for i in places):
        return x.permute(order).reshape([x.shape[i] for i in order[count:]])
    x = x.permute(order)
    if all(size == 1 for size in x.shape[1:count]):
        return spread_over(x.flatten(0, count - 1), plan)
    wanted = [sizes[axes[i]] for i in places]
    x = x.expand(*wanted, *x.shape[count:]).flatten(0, count - 1)
    return x[plan.derived("rows of pixels", lambda: plan.index.long().clamp(min=0))]


def mask_at(plan: PixelPlan, axes: tuple[str, ...]) -> Tensor:
    """The plan as a bool tensor that broadcasts with one of these axes."""
    mask = plan.inverse() >= 0
    mask = mask[(...,) + (None,) * axes.count("c")]
    return _in_order(mask, axes, plan)
