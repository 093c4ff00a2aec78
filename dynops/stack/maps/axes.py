"""Functions that add, take away and move axes of maps, and join maps along a new one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout, spatial
from .value import SparseMap


def stack(tensors, dim: int = 0):
    """Maps of the same pixels, and dense tensors at them, along a new channel axis."""
    base = next((x for x in tensors if type(x) is SparseMap and not x.is_input), None)
    if base is None or any(not isinstance(x, Tensor) or x.shape != base.shape for x in tensors):
        return NotImplemented
    dim %= base.dim() + 1
    axes = (*base.axes[:dim], "c", *base.axes[dim:])
    rows = [
        x.at(base.plan, base.axes) if type(x) is SparseMap else layout.gathered(x, base.plan, base.axes)
        for x in tensors
    ]
    if any(r is None or r.shape != rows[0].shape for r in rows):
        return NotImplemented
    made = torch.stack(rows, 1 + base.axes[:dim].count("c"))
    return SparseMap.of_rows(made, base.plan, base.active, axes)


def select(x: SparseMap, dim: int, index: int):
    """One channel."""
    dim %= x.dim()
    axis = layout.channel_axis(x.axes, dim)
    if axis is None:
        return NotImplemented

    def put(old: Tensor, rows: Tensor) -> Tensor:
        return old.select_scatter(rows, axis, index)

    left = [size for d, size in enumerate(x.shape) if x.axes[d] == "c" and d != dim]
    axes = x.axes[:dim] + x.axes[dim + 1 :]
    return spatial.view_of(x, axes, tuple(left), lambda rows: rows.select(axis, index), put)


def unbind(x: SparseMap, dim: int = 0):
    if x.axes[dim] != "c":
        return NotImplemented
    return tuple([select(x, dim, i) for i in range(x.shape[dim])])


def squeeze(x: SparseMap, *dims):
    """Without axes of one channel."""
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    dims = [d % x.dim() for d in dims] if dims else list(range(x.dim()))
    dims = [d for d in dims if x.shape[d] == 1]
    if any(x.axes[d] != "c" for d in dims):
        return NotImplemented
    for d in sorted(dims, reverse=True):
        x = select(x, d, 0)
    return x


def movedim(x: SparseMap, source, destination):
    marks = torch.empty([i + 2 for i in range(x.dim())], device="meta")  # sizes that tell axes apart
    return spatial.permute(x, [size - 2 for size in marks.movedim(source, destination).shape])


def expand(x: SparseMap, *sizes):
    """More channels of one."""
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if len(sizes) != x.dim():
        return NotImplemented
    sizes = [own if size == -1 else size for size, own in zip(sizes, x.shape, strict=True)]
    if any(a != b and axis != "c" for a, b, axis in zip(sizes, x.shape, x.axes, strict=True)):
        return NotImplemented
    return x.like(
        x.rows().expand(-1, *[size for size, axis in zip(sizes, x.axes, strict=True) if axis == "c"])
    )


def repeat(x: SparseMap, *times):
    """Channels several times."""
    times = times[0] if len(times) == 1 and isinstance(times[0], (tuple, list)) else times
    if len(times) != x.dim() or any(n != 1 and axis != "c" for n, axis in zip(times, x.axes, strict=True)):
        return NotImplemented
    return x.like(x.rows().repeat(1, *[n for n, axis in zip(times, x.axes, strict=True) if axis == "c"]))


def matmul(x, weight):
    """A product with a matrix over the last axis, where that is the only one of channels."""
    if type(x) is not SparseMap or x.is_input or type(weight) is SparseMap or weight.dim() != 2:
        return NotImplemented
    if x.axes[-1] != "c" or x.axes.count("c") != 1 or x.shape[-1] != weight.shape[0]:
        return NotImplemented
    return x.like(x.rows() @ weight)
