"""gather_tiles and scatter_tiles in Triton, for CUDA where the binary was built without it.

The signatures and the meaning are those of the reference in ``dynops/ops/blocks.py``. Nothing here reads
the count on the host, and nothing uses atomics: every result is bitwise reproducible.

A program owns a run of the output in both directions, so that each byte is written once. A gather finds
the pixel of each of its elements. A scatter finds the tiles over each of its pixels through the inverse of
the index, ``[N, GH, GW]``. It needs no output filled with the base beforehand, half of which would be
written twice at 50 % density. It sums in registers, in float32 and in the order of the plan.

A line of a map is contiguous in both memory formats: ``W`` pixels of ``C`` elements in channels_last, one
plane an image; ``W`` elements in NCHW, ``C`` planes. The kernels take lines in units, the largest vectors
of up to 16 bytes that no tile's edge cuts (:func:`in_units`).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import BlockGeometry, as_block_geometry
from ..layout import empty_map, memory_format_of
from . import gemm
from .launch import cdiv, launch
from .rows import words

_SIZES = [
    "total", "planes", "height", "width", "grid_h", "grid_w", "step_h", "step_w", "first_h", "first_w",
    "tile_h", "tile_w",
]  # fmt: skip
_VECTOR = 16  # bytes that a thread loads at once
_UNITS = 512  # that a program writes: 4 a thread

# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_SIZES)
def gather_tiles_kernel(
    x, out, index, total, planes, height, width, grid_h, grid_w, step_h, step_w, first_h, first_w, tile_h, tile_w,
    WIDE: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out = x where a unit of a tile lies in the map, else zero; ``total`` units in all."""
    first = tl.program_id(0).to(tl.int64) * P if WIDE else tl.program_id(0) * P
    at = first + tl.arange(0, P)
    line = at // tile_w
    plane = line // tile_h
    tile = plane // planes
    block = tl.load(index + tile, mask=at < total, other=-1).to(at.dtype)
    row = block // grid_w
    n = row // grid_h
    y_ = first_h + (row - n * grid_h) * step_h + (line - plane * tile_h)
    x_ = first_w + (block - row * grid_w) * step_w + (at - line * tile_w)
    inside = (block >= 0) & (y_ >= 0) & (y_ < height) & (x_ >= 0) & (x_ < width)
    source = ((n * planes + plane - tile * planes) * height + y_) * width + x_
    element = tl.arange(0, UNIT)[None, :]
    value = tl.load(x + (source[:, None] * UNIT + element), mask=inside[:, None], other=0)
    tl.store(out + (at[:, None] * UNIT + element), value, mask=(at < total)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def scatter_tiles_kernel(
    tiles, out, base, inverse,
    total, planes, height, width, grid_h, grid_w, step_h, step_w, first_h, first_w, tile_h, tile_w,
    OVER_H: tl.constexpr, OVER_W: tl.constexpr, ADD: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out = base (or zero) plus the tiles over each unit of the map, or, without ADD, the last of them.

    At most OVER_H x OVER_W tiles lie over a pixel.
    """
    first = tl.program_id(0).to(tl.int64) * P if WIDE else tl.program_id(0) * P
    at = first + tl.arange(0, P)
    live = at < total
    line = at // width
    plane = line // height
    n = plane // planes
    y_ = line - plane * height - first_h  # from the first block's first pixel
    x_ = at - line * width - first_w
    live_tile = live & (y_ >= 0) & (x_ >= 0)
    last_y = tl.minimum(y_ // step_h, grid_h - 1)
    last_x = tl.minimum(x_ // step_w, grid_w - 1)
    element = tl.arange(0, UNIT)[None, :]
    unit = at[:, None] * UNIT + element
    if ADD and base is not None:
        value = tl.load(base + unit, mask=live[:, None], other=0).to(tl.float32)
    else:
        value = tl.zeros([P, UNIT], tl.float32 if ADD else out.dtype.element_ty)
    bare = live
    for back_y in range(OVER_H):
        by = last_y - (OVER_H - 1 - back_y)
        i = y_ - by * step_h
        row_live = live_tile & (by >= 0) & (i < tile_h)
        for back_x in range(OVER_W):
            bx = last_x - (OVER_W - 1 - back_x)
            j = x_ - bx * step_w
            over = row_live & (bx >= 0) & (j < tile_w)
            tile = tl.load(inverse + ((n * grid_h + by) * grid_w + bx), mask=over, other=-1).to(at.dtype)
            active = tile >= 0
            source = ((tile * planes + plane - n * planes) * tile_h + i) * tile_w + j
            loaded = tl.load(tiles + (source[:, None] * UNIT + element), mask=active[:, None], other=0)
            if ADD:
                value += loaded.to(tl.float32)
            else:
                value = tl.where(active[:, None], loaded, value)
                bare = bare & (tile < 0)
    if base is not None and not ADD:
        value = tl.where(bare[:, None], tl.load(base + unit, mask=bare[:, None], other=0), value)
    tl.store(out + unit, value.to(out.dtype.element_ty), mask=live[:, None])


# ----------------------------------------------------------------------------------- launchers


def gather_tiles(x: Tensor, index: Tensor, count: Tensor | None, geometry) -> Tensor:
    """See ``ops.blocks._gather_tiles``."""
    g, layout = as_block_geometry(geometry), memory_format_of(x)
    out = empty_map(x, (index.shape[0], x.shape[1], g.tile_h, g.tile_w), layout)
    if out.numel() == 0:
        return out
    if x.numel() == 0:  # every index is -1
        return out.zero_()
    x = x.contiguous(memory_format=layout)
    with gemm.on_device(x):
        arguments, grid = _arguments(x, out, g, layout, out)
        launch(gather_tiles_kernel, *grid)(words(x), words(out), index, **arguments)
    return out


def scatter_tiles(
    tiles: Tensor, index: Tensor, count: Tensor | None, geometry, base: Tensor | None, add: bool
) -> Tensor:
    """See ``ops.blocks._scatter_tiles``."""
    g, layout = as_block_geometry(geometry), memory_format_of(tiles)
    out = empty_map(tiles, (g.batch, tiles.shape[1], g.height, g.width), layout)
    if out.numel() == 0:
        return out
    inverse = torch.ops.dynops.inverse_index(index, count, list(g.grid))
    tiles = tiles.contiguous(memory_format=layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    add = add and (base is not None or g.overlaps)  # zero and one tile: the tile
    over = {
        "OVER_H": _most_over(g.tile_h, g.step_h, g.grid_h),
        "OVER_W": _most_over(g.tile_w, g.step_w, g.grid_w),
    }
    values = (tiles, out, base)
    if not add:  # bits are moved, values are not looked at
        values = [None if t is None else words(t) for t in values]
    with gemm.on_device(tiles):
        arguments, grid = _arguments(out, tiles, g, layout, out)
        launch(scatter_tiles_kernel, *grid)(*values, inverse, **over, ADD=add, **arguments)
    return out


def in_units(g: BlockGeometry, elements: int, size: int) -> tuple[BlockGeometry, int]:
    """The geometry with columns counted in units, and the elements of a unit (a power of two).

    Args:
        elements: of a pixel of a line.
        size: bytes of an element.
    """
    columns = {name: elements * getattr(g, name) for name in ("width", "step_w", "first_w", "tile_w")}
    unit = math.gcd(_VECTOR // size, *columns.values())
    return g._replace(**{name: value // unit for name, value in columns.items()}), unit


def _arguments(x: Tensor, tiles: Tensor, g: BlockGeometry, layout, out: Tensor) -> tuple[dict, tuple[int]]:
    """The arguments and the grid of both kernels for a map and its tiles; ``out`` is one of the two."""
    last = layout == torch.channels_last
    units, unit = in_units(g, x.shape[1] if last else 1, x.element_size())
    sizes = {name: getattr(units, name) for name in _SIZES[2:]}
    total = out.numel() // unit
    wide = gemm.is_wide(x, tiles) or _reach(units) >= gemm.INT32_LIMIT
    arguments = {"total": total, "planes": 1 if last else x.shape[1], **sizes}
    return {**arguments, "WIDE": wide, "UNIT": unit, "P": _UNITS}, (cdiv(total, _UNITS),)


def _reach(g: BlockGeometry) -> int:
    """The largest coordinate, of either sign, that a pixel of a block may have."""
    return max(
        abs(g.first_h) + g.grid_h * g.step_h + g.tile_h,
        abs(g.first_w) + g.grid_w * g.step_w + g.tile_w,
    )


def _most_over(tile: int, step: int, grid: int) -> int:
    """The most tiles of one axis that lie over a coordinate."""
    return min(cdiv(tile, step), max(grid, 1))
