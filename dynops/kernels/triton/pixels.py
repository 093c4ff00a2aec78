"""Pixel-sparse convolution in Triton: ``conv`` and ``conv_input_grad``.

``conv_weight_grad`` is in ``pixels_weight_grad.py``.

The signatures and the meaning are those of the reference in ``dynops/ops/pixels/conv.py``. Nothing here
reads the count on the host, and nothing uses atomics: every result is bitwise reproducible.

**Forward.** An implicit GEMM. A program owns a tile of plan rows and output channels and walks over
(channel block, tap), computing the pointers of each tap from the pixel; the product accumulates in
float32, the epilogue is applied in registers, and the tile is stored at its pixels. Weights come by TMA
where there is one. In the capacity form a few programs walk over the tiles that the count covers. Where rows
are so few that SMs would have nothing to do, the reduction is split into parts, added by a second kernel.

**Input gradient.** The same kernel on the adjoint geometry: input pixel q gathers ``W[t]^T dy[p]`` over
the active p that read it. Rows are first sorted by their active taps: one integer sort, in Gray-code order, so
that neighbours differ in few taps. A tile walks only over the taps that some row of it has. Where masks are clustered the work is that of the active outputs. For a random mask a
3x3 convolution walks over more, counted with tiles of 64 rows: 1.04 times the active MACs at 32x56x56
and 50 %, 1.14 at 8x56x56 (1.24 at 25 %), 1.4 at 8x28x28, 1.8 at 1x28x28 (2.8 at 25 %). A larger kernel
than 62 taps is not sorted and walks over all taps. A transposed convolution's forward uses the same
order: there it separates the phases.

Groups narrower than 16 channels (depthwise above all) use kernels without a matrix product.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..epilogue import Epilogue
from ..layout import contiguous, empty_map, memory_format_of
from . import gemm, tiling
from .gemm import (
    MAX_SET,
    finish_rows,
    finish_tile,
    load_pixels,
    lowest_tap,
    source_row,
    tap_offset,
    tap_origin,
    tap_sets,
    united,
)
from .launch import cdiv, launch
from .pixels_weight_grad import conv_weight_grad
from .rows import filled, gather_rows, scatter_rows

__all__ = ["conv", "conv_input_grad", "conv_weight_grad", "gather_rows", "scatter_rows"]

# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def conv_kernel(
    x, x_box, w, w_box, out, index, count, order, keys, source, target, bias, scale, shift, gate, residual,
    rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The convolution at the pixels of ``index``: a tile a program, or, with a count on the device, as many
    programs as run at once, which walk over the tiles that have rows. (A capacity may hold ten times the count,
    and a program without rows still has to be given its shared memory on an SM: expected to cost, not measured.)"""
    if count is None:
        _conv_tile(
            tl.program_id(0), x, x_box, w, w_box, out, index, order, keys, source, target, bias, scale, shift, gate, residual,
            rows, rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
            KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WRITES_ROWS, ZERO_TAIL,
            ACTIVATION, PRECISION, WIDE, PARTS, M, N, K,
        )  # fmt: skip
    else:
        valid = tl.minimum(rows, tl.load(count))
        covered = valid  # further where zeros are stored past the count, and rows without taps lie
        if (WRITES_ROWS and ZERO_TAIL and PARTS == 1) or order is not None:
            covered = rows
        for tile in range(tl.program_id(0), tl.cdiv(n_size, N) * tl.cdiv(covered, M), tl.num_programs(0)):
            _conv_tile(
                tile, x, x_box, w, w_box, out, index, order, keys, source, target, bias, scale, shift, gate, residual,
                rows, valid, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
                KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WRITES_ROWS, ZERO_TAIL,
                ACTIVATION, PRECISION, WIDE, PARTS, M, N, K,
            )  # fmt: skip


@triton.jit
def _conv_tile(
    tile, x, x_box, w, w_box, out, index, order, keys, source, target, bias, scale, shift, gate, residual,
    rows, valid_rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of rows and output channels of one group.

    The weight is ``[groups*n_size, taps, k_size]``, transposed ``[groups*k_size, taps, n_size]``;
    ``lead`` is the stride of its first dimension. ``w_box``: the same as a matrix that TMA reads, or None;
    ``x_box``: that of x, whose row i the output's row i reads.
    With ``order``, rows are taken in that order and ``keys`` are their tap sets in the same order. A result
    goes to its row, its pixel, or, with ``target`` (a row for each pixel, or -1), to that row. PARTS > 1: each
    part of the reduction stores float32 sums ``[PARTS, rows, out_channels]``, for finish_parts_kernel.
    """
    n_tiles = tl.cdiv(n_size, N)
    group = tl.program_id(1)
    first = (tile // n_tiles).to(tl.int64) * M if WIDE else (tile // n_tiles) * M
    slot = first + tl.arange(0, M)
    first_channel = (tile % n_tiles) * N
    channel = first_channel + tl.arange(0, N)  # within the group
    row = slot
    if order is not None:
        row = tl.load(order + slot, mask=slot < rows, other=rows).to(slot.dtype)
    pixel = load_pixels(index, row, rows)
    live = pixel >= 0
    if order is not None:
        key = tl.load(keys + slot, mask=slot < rows, other=0).to(tl.int32 if TAPS <= 31 else tl.int64)
        sets = key ^ (key >> 1)
        taps, walked = united(sets, TAPS)
        left = taps
        tap = lowest_tap(taps)
    else:
        sets = pixel
        if TAPS <= MAX_SET:
            sets = tap_sets(
                pixel, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
                KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
            )  # fmt: skip
        walked = tl.where(first < valid_rows, TAPS, 0)
        tap = 0
    start = 0
    steps = walked * tl.cdiv(k_size, K)
    if PARTS > 1:
        each = tl.cdiv(TAPS * tl.cdiv(k_size, K), PARTS)
        begin = tl.program_id(2) * each
        tap = begin % TAPS
        start = (begin // TAPS) * K
        steps = tl.maximum(0, tl.minimum(each, steps - begin))
    channel_mask = channel < n_size
    w_group = w + group.to(tl.int64) * lead * (k_size if TRANSPOSED else n_size)
    origin = row
    if READS != "aligned":
        origin = tap_origin(
            pixel, in_h, in_w, out_h, out_w, pad_h, pad_w, STRIDE_H, STRIDE_W, TRANSPOSED, WIDE
        )
    lane = (group * k_size + tl.arange(0, K))[None, :]
    if READS != "packed":
        lane += (origin * in_channels)[:, None]
    acc = tl.zeros([M, N], tl.float32)
    for _ in range(steps):
        k = start + tl.arange(0, K)
        k_mask = k < k_size
        if x_box is not None:
            a = x_box.load([first.to(tl.int32), group * k_size + start])
        else:
            a = _gathered(
                x, pixel, live, row, sets, origin, lane, tap, start, source, group * k_size + k, k_mask, in_channels,
                in_h, in_w, out_h, out_w, pad_h, pad_w,
                KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE, w_box is not None,
            )  # fmt: skip
        if w_box is None:
            if TRANSPOSED:
                w_at = k[:, None] * lead + tap * n_size + channel[None, :]
            else:
                w_at = channel[None, :] * lead + tap * k_size + k[:, None]
            b = tl.load(w_group + w_at, mask=k_mask[:, None] & channel_mask[None, :], other=0.0)
        elif TRANSPOSED:
            b = w_box.load([group * k_size + start, tap * n_size + first_channel])
        else:
            b = w_box.load([group * n_size + first_channel, tap * k_size + start]).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if TAPS == 1:
            start += K
        elif order is not None:
            left &= left - 1
            done = left == 0
            left = tl.where(done, taps, left)
            tap = lowest_tap(left)
            start += tl.where(done, K, 0)
        else:
            tap += 1
            done = tap == TAPS
            tap = tl.where(done, 0, tap)
            start += tl.where(done, K, 0)
    if PARTS > 1:
        channel += group * n_size
        at = (tl.program_id(2).to(tl.int64) * rows + slot)[:, None] * out_channels + channel[None, :]
        tl.store(out + at, acc, mask=(slot < rows)[:, None] & channel_mask[None, :])
    else:
        finish_tile(
            acc, out, row, pixel, live, first_channel, group, target, bias, scale, shift, gate, residual,
            rows, n_size, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE, M, N,
        )  # fmt: skip


@triton.jit
def _gathered(
    x, pixel, live, row, sets, origin, lane, tap, start, source, channel, k_mask, in_channels,
    in_h, in_w, out_h, out_w, pad_h, pad_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The channels from ``start`` on [M, K] that a tap of each row reads, zero where it reads nothing.

    A row's place and the set of its taps are known, and a tap moves all rows by as much: 120 instructions a step, where
    it takes 186 to come from coordinates (sm_90, 3x3, tiles of 128x256x64, Triton 3.6).

    WHOLE: blocks of the reduction are whole. (Of rows that are looked up a step has 155 instructions with the mask of k
    all the same, and 194 without it.)
    """
    if TAPS > MAX_SET:
        at, valid = source_row(
            pixel, live, row, tap, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE,
        )  # fmt: skip
        x_at = at[:, None] * in_channels + channel[None, :]
    else:
        valid = (sets & (tl.full([], 1, sets.dtype) << tap)) != 0
        offset = tap_offset(tap, in_w, KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED)
        if READS == "packed":
            at = tl.load(source + (origin + offset), mask=valid, other=-1)
            valid = at >= 0
            if WIDE:
                at = at.to(tl.int64)
            x_at = at[:, None] * in_channels + (lane + start)
        else:
            if WIDE:
                offset = offset.to(tl.int64)
            x_at = lane + (offset * in_channels + start)
    mask = valid[:, None]
    if READS == "packed" or not WHOLE:
        mask = mask & k_mask[None, :]
    return tl.load(x + x_at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def finish_parts_kernel(
    sums, out, index, target, bias, scale, shift, gate, residual, rows, out_channels,
    WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The parts of a reduction added in their order, then finished and stored as _conv_tile does it."""
    row = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * M + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    channel_mask = channel < out_channels
    pixel = load_pixels(index, row, rows)
    live = pixel >= 0
    z = tl.zeros([M, N], tl.float32)
    at = row.to(tl.int64)[:, None] * out_channels + channel[None, :]
    for part in range(PARTS):
        part_at = part * rows.to(tl.int64) * out_channels
        z += tl.load(sums + part_at + at, mask=live[:, None] & channel_mask[None, :], other=0.0)
    finish_rows(
        z, out, row, pixel, live, channel, channel_mask, target, bias, scale, shift, gate, residual,
        rows, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def direct_conv_kernel(
    x, w, out, index, count, source, target, bias, scale, shift, gate, residual,
    rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """conv_kernel without a matrix product, for narrow groups; a tile spans groups."""
    n_tiles = tl.cdiv(out_channels, N)
    tile = tl.program_id(0)
    first = (tile // n_tiles).to(tl.int64) * M if WIDE else (tile // n_tiles) * M
    row = first + tl.arange(0, M)
    channel = (tile % n_tiles) * N + tl.arange(0, N)
    channel_mask = channel < out_channels
    pixel = load_pixels(index, row, rows)
    live = pixel >= 0
    walked = TAPS
    if count is not None:
        walked = tl.where(first < tl.load(count), TAPS, 0)
    group = channel // n_size
    acc = tl.zeros([M, N], tl.float32)
    for tap in range(walked):
        at, valid = source_row(
            pixel, live, row, tap, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE,
        )  # fmt: skip
        for k in range(k_size):
            x_at = at[:, None] * in_channels + (group * k_size + k)[None, :]
            a = tl.load(x + x_at, mask=valid[:, None] & channel_mask[None, :], other=0.0)
            if TRANSPOSED:
                w_at = (group * k_size + k) * lead + tap * n_size + channel % n_size
            else:
                w_at = channel * lead + tap * k_size + k
            b = tl.load(w + w_at, mask=channel_mask, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    finish_rows(
        acc, out, row, pixel, live, channel, channel_mask, target, bias, scale, shift, gate, residual,
        rows, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- launchers


def conv(
    x, weight, bias, index, count, source, geometry, epilogue: Epilogue, base: Tensor | None, to_rows: bool,
    expected: int | None = None, zero_tail: bool = True, same_rows: bool = False,
) -> Tensor:  # fmt: skip
    """See ``ops.pixels.conv._conv``.

    Args:
        expected: about how many rows the count is, where somebody knows.
        zero_tail: rows past the count are zero; else they are left as they are.
        same_rows: row i of the output reads row i of ``x`` and no other: ``index[i]`` is i, or -1.
    """
    g = ConvGeometry(*geometry)
    channels = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
    reads = "aligned" if same_rows else "pixels" if source is None else "packed"
    ordered = bool(g.transposed) and g.stride_h * g.stride_w > 1
    operands = [contiguous(t) for t in (bias, *epilogue[1:])]
    options = g, reads, to_rows, ordered, operands, epilogue.activation, expected, zero_tail
    if to_rows:
        out = x.new_empty(index.shape[0], channels)
        _gather(x, weight, out, index, count, source, None, *options)
        return out
    out = empty_map(x, (g.batch, channels, g.out_h, g.out_w), torch.channels_last)
    with filled(out, base, index, count):
        _gather(x, weight, out, index, count, source, None, *options)
    return out if source is not None else out.contiguous(memory_format=memory_format_of(x))


def conv_input_grad(
    grad, weight, index, count, source, source_rows: int, geometry, from_rows: bool
) -> Tensor:
    """See ``ops.pixels.conv._conv_input_grad``."""
    g = ConvGeometry(*geometry)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    if source is None:
        out = empty_map(grad, (g.batch, channels, g.in_h, g.in_w), torch.channels_last)
    else:
        out = grad.new_zeros(source_rows, channels)
    if g.is_pointwise:  # every output pixel has an input pixel of its own
        reads = "aligned" if from_rows else "pixels"
        with filled(out, None, index, count) if source is None else contextlib.nullcontext():
            _gather(grad, weight, out, index, count, None, source, gemm.adjoint(g), reads)
    else:
        active = torch.ops.dynops.inverse_index(index, count, list(g.out_shape))
        reads = "packed" if from_rows else "active"
        _gather(grad, weight, out, None, None, active, source, gemm.adjoint(g), reads, ordered=True)
    if from_rows or source is not None:
        return out
    return out.contiguous(memory_format=memory_format_of(grad))


def _gather(
    x: Tensor,  # [N, C, H, W] or [R, C]
    weight: Tensor,
    out: Tensor,  # [N, O, out_h, out_w] channels_last or [P, O]
    index: Tensor | None,  # [P], or None for every pixel of the output
    count: Tensor | None,
    source: Tensor | None,
    target: Tensor | None,  # the row of out at each pixel, or -1
    g: ConvGeometry,  # of this product: the adjoint one for an input gradient
    reads: str,  # see gemm.source_row
    writes_rows: bool = False,
    ordered: bool = False,  # whether to sort the rows by their taps
    operands=(None,) * 5,  # bias, scale, shift, gate, residual
    activation: str = "",
    expected: int | None = None,  # as in conv, and so on
    zero_tail: bool = True,
) -> None:
    """Chooses the kernel and launches it: out = epilogue(sum over taps of weight x)."""
    rows = g.batch * g.out_h * g.out_w if index is None else index.shape[0]
    if rows == 0 or out.numel() == 0:
        return
    x, w = gemm.rows_of(x), gemm.weight_rows(weight, x.dtype, g.groups)
    sizes = gemm.product_sizes(x.shape[1], out.shape[1], w.shape, g)
    options = {"READS": reads, "WIDE": gemm.is_wide(x, w, out, source, target), **gemm.geometry_arguments(g)}
    if count is None or not writes_rows:
        zero_tail = True
    stored = {"WRITES_ROWS": writes_rows, "ZERO_TAIL": zero_tail, "ACTIVATION": activation}
    with gemm.on_device(x):
        if gemm.is_narrow(sizes, g.groups):
            tile = tiling.direct_tile(out.shape[1])
            grid = (cdiv(rows, tile["M"]) * cdiv(out.shape[1], tile["N"]),)
            launch(direct_conv_kernel, *grid)(x, w, out, index, count, source, target, *operands, rows, **sizes, **options, **stored, **tile)  # fmt: skip
            return
        order = keys = None
        if ordered and g.taps <= gemm.MAX_ORDERED_TAPS:
            keys, order = gemm.tap_order(index, source, rows, options, x.device)
        likely = rows if count is None or expected is None else max(1, min(expected, rows))
        # in a step: the rows of a single tap are looked up before, and an order knows which taps read something
        looks_up = source is not None and g.taps > 1 and (reads == "packed" or order is None)
        tile, precision = tiling.choose(
            x, likely, sizes["n_size"], sizes["k_size"], g.groups,
            family="pixels", indirect=looks_up, ragged=tiling.is_ragged(sizes), residual=operands[4] is not None,
            short=g.taps * sizes["k_size"] <= tiling.SHORT,
        )  # fmt: skip
        blocks = cdiv(likely, tile["M"]) * cdiv(sizes["n_size"], tile["N"])
        steps = 1 if order is not None else g.taps * cdiv(sizes["k_size"], tile["K"])
        parts = tiling.parts(x.device, blocks * g.groups, steps, rows * out.shape[1])
        sums = out
        if parts > 1:
            sums = torch.empty(parts * rows * out.shape[1], dtype=torch.float32, device=x.device)
        programs = cdiv(rows, tile["M"]) * cdiv(sizes["n_size"], tile["N"])
        if count is not None:
            walks_on = (writes_rows and zero_tail) or order is not None  # past the count
            # twice what is expected, as it may be more
            programs = min(programs, tiling.resident(x.device), programs if walks_on else 2 * blocks)
        options["WIDE"] |= gemm.is_wide(sums)
        x_box = gemm.row_box(x, sizes, tile) if reads == "aligned" else None
        launch(conv_kernel, programs, g.groups, parts)(
            x, x_box, w, gemm.weight_box(w, sizes, tile, g), sums, index, count, order, keys, source, target, *operands, rows,
            **sizes, **options, **stored, PRECISION=precision, PARTS=parts, **tile,
        )  # fmt: skip
        if parts > 1:
            _finish_parts(sums, out, index, target, operands, rows, options["WIDE"], stored, parts)


def _finish_parts(sums: Tensor, out: Tensor, index, target, operands, rows: int, wide: bool, stored: dict, parts: int) -> None:  # fmt: skip
    channels = out.shape[1]
    tile = tiling.direct_tile(channels)
    launch(finish_parts_kernel, cdiv(rows, tile["M"]), cdiv(channels, tile["N"]))(
        sums, out, index, target, *operands, rows, channels, **stored, WIDE=wide, PARTS=parts, **tile
    )
