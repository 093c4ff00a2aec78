"""The weight gradient of the pixel-sparse convolution in Triton.

A program reduces one slice of rows, for one tap and one tile of the weight, into that slice's own
float32 copy of the gradient; a second pass adds the copies. No atomics: the result is bitwise
reproducible. In a transposed convolution with a stride, whose taps are selective, the rows come sorted by their
taps. A block of rows that lacks the tap is skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from . import gemm, tiling
from .gemm import load_pixels, source_row
from .launch import cdiv, launch


@triton.jit
def _chunk(count, rows, chunk, BLOCK: tl.constexpr):
    """The rows [first, last) of this program's slice, of those before the count, in whole blocks.

    A capacity says little of the count: slices of it would leave a program in four with work at a density of 25 %.
    """
    last = rows
    if count is not None:
        last = tl.minimum(rows, tl.load(count))
        chunk = tl.cdiv(tl.cdiv(last, tl.num_programs(2)), BLOCK) * BLOCK
    first = tl.program_id(2) * chunk
    return first, tl.minimum(first + chunk, last)


@triton.jit
def _grad_position(row, pixel, GRAD_ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The row of grad: packed, or the pixel of a dense one."""
    at = row if GRAD_ROWS else pixel
    if WIDE:
        at = at.to(tl.int64)
    return at


@triton.jit(do_not_specialize=[*gemm.UNSPECIALIZED, "chunk"])
def weight_grad_kernel(
    grad, x, dw, index, count, order, keys, source,
    rows, chunk, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    GRAD_ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dw[slice, n, tap, k] = the sum over a slice of rows of grad[row, n] x[tap of row, k].

    M tiles n, N tiles k, K is how many rows are taken at a time. dw is laid out as the weight is
    (see conv_kernel), once for each slice.
    """
    k_tiles = tl.cdiv(k_size, N)
    tile = tl.program_id(0)
    tap = tl.program_id(1) % TAPS
    group = tl.program_id(1) // TAPS
    n = (tile // k_tiles) * M + tl.arange(0, M)
    k = (tile % k_tiles) * N + tl.arange(0, N)
    n_mask = n < n_size
    k_mask = k < k_size
    first, last = _chunk(count, rows, chunk, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, last, K):
        row = start + tl.arange(0, K)
        present = row < last
        some = True
        if order is not None:  # a block of rows without this tap costs nothing
            key = tl.load(keys + row, mask=present, other=0).to(tl.int32 if TAPS <= 31 else tl.int64)
            some = tl.max(((key ^ (key >> 1)) >> tap) & 1, 0) != 0
            row = tl.load(order + row, mask=present, other=0)
        if some:
            pixel = tl.load(index + row, mask=present, other=-1)
            live = pixel >= 0
            grad_at = _grad_position(row, pixel, GRAD_ROWS, WIDE)
            grad_at = grad_at[:, None] * out_channels + (group * n_size + n)[None, :]
            at, valid = source_row(
                pixel, live, row, tap, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
                KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE,
            )  # fmt: skip
            x_at = at[:, None] * in_channels + (group * k_size + k)[None, :]
            a = tl.load(grad + grad_at, mask=live[:, None] & n_mask[None, :], other=0.0)
            b = tl.load(x + x_at, mask=valid[:, None] & k_mask[None, :], other=0.0)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    groups = out_channels // n_size
    if TRANSPOSED:
        dw += tl.program_id(2).to(tl.int64) * groups * k_size * lead
        at = (group * k_size + k)[None, :] * lead + tap * n_size + n[:, None]
    else:
        dw += tl.program_id(2).to(tl.int64) * groups * n_size * lead
        at = (group * n_size + n)[:, None] * lead + tap * k_size + k[None, :]
    tl.store(dw + at, acc, mask=n_mask[:, None] & k_mask[None, :])


@triton.jit(do_not_specialize=[*gemm.UNSPECIALIZED, "chunk"])
def direct_weight_grad_kernel(
    grad, x, dw, index, count, source,
    rows, chunk, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, lead, in_channels, out_channels,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    GRAD_ROWS: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """weight_grad_kernel without a matrix product: one tap and one channel k of every group.

    M rows are taken at a time, N tiles the output channels; a tile spans groups.
    """
    tap = tl.program_id(1) % TAPS
    k = tl.program_id(1) // TAPS
    channel = tl.program_id(0) * N + tl.arange(0, N)
    channel_mask = channel < out_channels
    group = channel // n_size
    first, last = _chunk(count, rows, chunk, M)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, last, M):
        row = start + tl.arange(0, M)
        pixel = load_pixels(index, row, last)
        live = pixel >= 0
        grad_at = _grad_position(row, pixel, GRAD_ROWS, WIDE)
        grad_at = grad_at[:, None] * out_channels + channel[None, :]
        at, valid = source_row(
            pixel, live, row, tap, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE,
        )  # fmt: skip
        x_at = at[:, None] * in_channels + (group * k_size + k)[None, :]
        a = tl.load(grad + grad_at, mask=live[:, None] & channel_mask[None, :], other=0.0)
        b = tl.load(x + x_at, mask=valid[:, None] & channel_mask[None, :], other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    groups = out_channels // n_size
    if TRANSPOSED:
        dw += tl.program_id(2).to(tl.int64) * groups * k_size * lead
        at = (group * k_size + k) * lead + tap * n_size + channel % n_size
    else:
        dw += tl.program_id(2).to(tl.int64) * out_channels * lead
        at = channel * lead + tap * k_size + k
    tl.store(dw + at, tl.sum(acc, 0), mask=channel_mask)


def conv_weight_grad(
    grad, x, index, count, source, weight_shape, geometry, from_rows: bool, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """See ``ops.pixels.conv._conv_weight_grad``."""
    g = ConvGeometry(*geometry)
    db = _bias_grad(grad, index, count, from_rows) if bias else grad.new_empty(0)
    if index.shape[0] == 0:
        return grad.new_zeros(weight_shape), db
    lead, inner, kh, kw = weight_shape
    slices = _slices(
        gemm.rows_of(grad), gemm.rows_of(x), index, count, source, (lead, kh * kw, inner), g, from_rows
    )
    dw = slices.sum(0) if slices.shape[0] > 1 else slices[0]
    return gemm.as_weight(dw, weight_shape, grad.dtype), db


def _bias_grad(grad: Tensor, index: Tensor, count: Tensor | None, rows: bool) -> Tensor:
    if not rows:
        return torch.ops.dynops.gather_rows(grad, index, count).sum(0)
    return grad.sum(0) if count is None else torch.where((index >= 0)[:, None], grad, 0).sum(0)


def _slices(grad, x, index, count, source, shape, g: ConvGeometry, grad_rows: bool) -> Tensor:
    """The gradient of each slice of rows, float32 ``[slices, *shape]``; shape is (lead, taps, inner)."""
    rows = index.shape[0]
    sizes = gemm.product_sizes(x.shape[1], grad.shape[1], shape, g)
    reads = "pixels" if source is None else "packed"
    options = {"READS": reads, "WIDE": gemm.is_wide(x, grad, source), **gemm.geometry_arguments(g)}
    narrow = gemm.is_narrow(sizes, g.groups)
    if narrow:
        tile = tiling.direct_tile(grad.shape[1])
        grid = (cdiv(grad.shape[1], tile["N"]), g.taps * sizes["k_size"])
    else:
        tile, precision = tiling.choose(
            x, sizes["n_size"], sizes["k_size"], rows, g.groups * g.taps,
            family="pixels_weight", indirect=True, ragged=tiling.is_ragged(sizes),
        )  # fmt: skip
        tiles = cdiv(sizes["n_size"], tile["M"]) * cdiv(sizes["k_size"], tile["N"])
        grid = (tiles, g.taps * g.groups)
    chunk = chunk_rows(rows, grid[0] * grid[1], tile["M"] if narrow else tile["K"], x.device)
    grid = (*grid, cdiv(rows, chunk))
    dw = torch.empty((grid[2], *shape), dtype=torch.float32, device=x.device)
    with gemm.on_device(x):
        if narrow:
            launch(direct_weight_grad_kernel, *grid)(grad, x, dw, index, count, source, rows, chunk, **sizes, **options, GRAD_ROWS=grad_rows, **tile)  # fmt: skip
            return dw
        order = keys = None
        if g.transposed and g.stride_h * g.stride_w > 1 and g.taps <= gemm.MAX_ORDERED_TAPS:
            keys, order = gemm.tap_order(index, source, rows, options, x.device)
        launch(weight_grad_kernel, *grid)(
            grad, x, dw, index, count, order, keys, source, rows, chunk, **sizes, **options,
            GRAD_ROWS=grad_rows, PRECISION=precision, **tile,
        )  # fmt: skip
    return dw


def chunk_rows(rows: int, programs: int, block: int, device: torch.device) -> int:
    """Rows of a slice: so many slices that about four programs reach each SM, of 8 blocks at least."""
    slices = max(1, 4 * tiling.device_facts(device)[1] // programs)
    return block * max(8, cdiv(cdiv(rows, slices), block))
