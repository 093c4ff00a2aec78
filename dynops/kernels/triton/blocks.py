"""Blocks in Triton: a convolution from a map to a map, and gather_tiles and scatter_tiles for binaries without CUDA.

The signatures and the meaning are those of the references in ``dynops/ops/block_conv.py`` and ``ops/blocks.py``. Nothing here reads
the count on the host, and nothing uses atomics: every result is bitwise reproducible.

**Convolution.** An implicit GEMM whose rows are a box of pixels. TMA reads the box from the map for each tap, shifted,
with zeros outside of the map: no address and no mask is computed, and no list of pixels is needed.

**Tiles.** A program owns a run of the output in both directions, so that each byte is written once. A gather finds
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
from triton.tools.tensor_descriptor import TensorDescriptor

from ...geometry import BlockGeometry, ConvGeometry, as_block_geometry
from ..configs import bucket
from ..layout import contiguous, empty_map, memory_format_of
from . import gemm, tiling
from .gemm import activate, finish, rank, split_pixel
from .launch import cdiv, launch
from .rows import fill_rows, filled_by, words

_SIZES = [
    "total", "planes", "height", "width", "grid_h", "grid_w", "step_h", "step_w", "first_h", "first_w",
    "tile_h", "tile_w",
]  # fmt: skip
_CONV_SIZES = ["blocks", *_SIZES[2:], "pad_h", "pad_w"]
_VECTOR = 16  # bytes that a thread loads at once
_UNITS = 512  # that a program writes: 4 a thread
# The list of pixels takes a memset and three kernels of CUDA C++, at 2 us a launch in a graph. Not measured.
_PIXEL_PLAN_US = 8

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


@triton.jit(do_not_specialize=_CONV_SIZES)
def block_conv_kernel(
    x_box, w_box, residual_box, out, index, count, bias, scale, shift,
    blocks, height, width, grid_h, grid_w, step_h, step_w, first_h, first_w, tile_h, tile_w, pad_h, pad_w,
    k_size, n_size, KERNEL_W: tl.constexpr, TAPS: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The convolution of stride 1 at the blocks of ``index``, in boxes of pixels and tiles of output channels.

    A tap's input is the same box, shifted: TMA reads it from the map ``[N, H, W, C]``, with zeros for what lies
    outside. With a count on the device as many programs as run at once walk over the blocks that there are.
    """
    boxes_w = tl.cdiv(tile_w, BOX_W)
    boxes = tl.cdiv(tile_h, BOX_H) * boxes_w
    n_tiles = tl.cdiv(n_size, N)
    valid = blocks
    if count is not None:
        valid = tl.minimum(blocks, tl.load(count))
    m = tl.arange(0, BOX_H * BOX_W)
    for tile in range(tl.program_id(0), valid * boxes * n_tiles, tl.num_programs(0)):
        box = tile // n_tiles
        at = box // boxes
        block = tl.load(index + at)
        box -= at * boxes
        row = block // grid_w
        n = row // grid_h
        i = (box // boxes_w) * BOX_H  # within the block
        j = (box % boxes_w) * BOX_W
        y0 = first_h + (row - n * grid_h) * step_h + i
        x0 = first_w + (block - row * grid_w) * step_w + j
        first = (tile % n_tiles) * N
        acc = tl.zeros([BOX_H * BOX_W, N], tl.float32)
        tap = 0
        start = 0
        for _ in range(TAPS * tl.cdiv(k_size, K)):
            tap_y = tap // KERNEL_W
            to_y = tap_y * DIL_H - pad_h
            to_x = (tap - tap_y * KERNEL_W) * DIL_W - pad_w
            if TRANSPOSED:
                to_y = -to_y
                to_x = -to_x
            a = x_box.load([n, y0 + to_y, x0 + to_x, start]).reshape(BOX_H * BOX_W, K)
            if TRANSPOSED:
                b = w_box.load([start, tap * n_size + first])
            else:
                b = w_box.load([first, tap * k_size + start]).T
            acc = tl.dot(a, b, acc)
            tap += 1
            done = tap == TAPS
            tap = tl.where(done, 0, tap)
            start += tl.where(done, K, 0)
        channel = first + tl.arange(0, N)
        channel_mask = channel < n_size
        y = m // BOX_W
        x = m % BOX_W
        live = (i + y < tile_h) & (j + x < tile_w)
        y += y0
        x += x0
        live &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = ((n.to(tl.int64) if WIDE else n) * height + y) * width + x
        z = finish(acc, bias, scale, shift, None, None, pixel, channel, live, channel_mask, n_size, "", WIDE)
        if residual_box is not None:  # 37 registers fewer than by pointers, with 64 channels on sm_90
            z += residual_box.load([n, y0, x0, first]).reshape(BOX_H * BOX_W, N).to(tl.float32)
        z = activate(z, ACTIVATION)
        to = pixel[:, None] * n_size + channel[None, :]
        tl.store(out + to, z.to(out.dtype.element_ty), mask=live[:, None] & channel_mask[None, :])


@triton.jit(do_not_specialize=["pixels", *_CONV_SIZES[:-2]])
def fill_blocks_kernel(
    out, base, index, count, pixels, channels,
    blocks, height, width, grid_h, grid_w, step_h, step_w, first_h, first_w, tile_h, tile_w,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out = base, or zero, at the pixels of no block of the ascending index; the others are not touched."""
    pixel = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * M + tl.arange(0, M)
    last = blocks
    if count is not None:
        last = tl.minimum(blocks, tl.load(count))
    n, y, x = split_pixel(pixel, height, width)
    y -= first_h
    x -= first_w
    by = y // step_h
    bx = x // step_w
    inside = (y >= 0) & (x >= 0) & (by < grid_h) & (bx < grid_w)
    inside &= (y - by * step_h < tile_h) & (x - bx * step_w < tile_w)
    block = tl.where(inside, (n * grid_h + by) * grid_w + bx, -1)
    row = rank(index, last, block, 31, False) - 1
    entry = tl.load(index + row, mask=row >= 0, other=-2)
    bare = (entry != block) & (pixel < pixels)
    fill_rows(out, base, pixel, bare, channels, M, N)


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


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, count: Tensor | None, blocks, geometry,
    activation: str, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, base: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``ops.block_conv._run``; for what :func:`takes`."""
    g, b = ConvGeometry(*geometry), as_block_geometry(blocks)
    channels = weight.shape[1] if g.transposed else weight.shape[0]
    out = empty_map(x, (g.batch, channels, g.out_h, g.out_w), torch.channels_last)
    operands = [contiguous(t) for t in (bias, scale, shift)]
    with _filled(out, base, index, count, b), gemm.on_device(x):
        if index.shape[0] > 0 and out.numel() > 0:
            _conv(x, weight, residual, out, index, count, *operands, b, g, activation)
    return out.contiguous(memory_format=memory_format_of(x))


def _conv(x, weight, residual, out, index, count, bias, scale, shift, b: BlockGeometry, g: ConvGeometry, activation: str) -> None:  # fmt: skip
    """Chooses boxes and a tile, and launches."""
    c, o, size = x.shape[1], out.shape[1], (b.tile_h, b.tile_w)
    tile, _ = tiling.choose(
        x, index.shape[0] * size[0] * size[1], o, c, 1,
        family="blocks", indirect=False, residual=residual is not None, tallest=tiling.tallest_box(size),
    )  # fmt: skip
    box = tiling.box_of(size, tile.pop("M"))
    tile["K"] = min(tile["K"], c & -c)  # a box of weights ends with the tap
    w = _aligned(gemm.weight_rows(weight, x.dtype, 1)).flatten(1)
    sides = ("K", "N") if g.transposed else ("N", "K")
    w_box = TensorDescriptor.from_tensor(w, [tile[side] for side in sides])
    x_box = _map_box(x, box, tile["K"])
    residual_box = None if residual is None else _map_box(residual, box, tile["N"])
    programs = index.shape[0] * tiling.boxes_in(size, box) * cdiv(o, tile["N"])
    if count is not None:
        programs = min(programs, tiling.resident(x.device))
    arguments = gemm.geometry_arguments(g)
    sizes = {name: arguments[name] for name in ("pad_h", "pad_w", "KERNEL_W", "TAPS", "DIL_H", "DIL_W", "TRANSPOSED")}  # fmt: skip
    launch(block_conv_kernel, programs)(
        x_box, w_box, residual_box, out, index, count, bias, scale, shift, **_grid_of(index, b), **sizes,
        k_size=c, n_size=o, ACTIVATION=activation, WIDE=gemm.is_wide(out), BOX_H=box[0], BOX_W=box[1], **tile,
    )  # fmt: skip


def takes(device: torch.device, dtype: torch.dtype, weight: Tensor, blocks: int, b: BlockGeometry, g: ConvGeometry) -> bool:  # fmt: skip
    """True if :func:`conv` computes so many blocks, and is expected to be faster than the pixels' kernel.

    Both are priced by the multiply-adds of their tiles and the bytes that these load (``tiling.expected_us``). Boxes
    over the edge of a block count, and so do the launches that make a list of pixels.
    """
    if not fits(device, dtype, weight, g) or b.overlaps or blocks == 0:
        return False
    o, c = weight.shape[0], weight.shape[1]
    size, widest = (b.tile_h, b.tile_w), max(16, 1 << bucket(o))
    problem = blocks * size[0] * size[1], o, c, 1
    limits = tiling.Limits(128 * 256, widest, 256)
    theirs = tiling.built_in(device, "pixels", "half", limits, *problem)
    ours = tiling.built_in(
        device, "blocks", "half", limits._replace(tallest=tiling.tallest_box(size)), *problem
    )
    padded = blocks * tiling.boxes_in(size, tiling.box_of(size, ours.m)) * ours.m
    programs = cdiv(problem[0], theirs.m) * cdiv(o, theirs.n)
    parts = tiling.parts(device, programs, g.taps * cdiv(c, theirs.k), problem[0] * o)
    pixels_us = tiling.expected_us(device, theirs, problem[0], o, c * g.taps) / parts + _PIXEL_PLAN_US
    return tiling.expected_us(device, ours, padded, o, c * g.taps) <= pixels_us


def fits(device: torch.device, dtype: torch.dtype, weight: Tensor, g: ConvGeometry) -> bool:
    """True if :func:`conv` can compute this: what TMA reads, of groups and strides of one."""
    whole = g.groups == g.stride_h == g.stride_w == 1 and not any(n % 16 for n in weight.shape[:2])
    return whole and dtype.itemsize == 2 and tiling.device_facts(device)[0] >= 90


def _map_box(x: Tensor, box: tuple[int, int], channels: int) -> TensorDescriptor:
    """A map [N, C, H, W] as TMA reads it: in boxes of pixels and channels, zero outside."""
    rows = _aligned(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
    n, h, w, c = rows.shape
    # of a dimension of one pixel the stride may be anything
    return TensorDescriptor(rows, [n, h, w, c], [h * w * c, w * c, c, 1], [1, *box, channels])


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where it does not begin at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _filled(out: Tensor, base: Tensor | None, index: Tensor, count: Tensor | None, b: BlockGeometry):
    """As ``rows.filled``, where ``index`` has no block."""
    channels, tile = out.shape[1], tiling.direct_tile(out.shape[1])
    pixels = b.batch * b.height * b.width

    def fill(values: Tensor, base: Tensor | None) -> None:
        launch(fill_blocks_kernel, cdiv(pixels, tile["M"]))(
            values, base, index, count, pixels, channels, **_grid_of(index, b), WIDE=gemm.is_wide(out), **tile
        )

    return filled_by(out, base, fill)


def _grid_of(index: Tensor, b: BlockGeometry) -> dict:
    """The kernels' arguments about blocks."""
    return {"blocks": index.shape[0], **{name: getattr(b, name) for name in _SIZES[2:]}}


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
