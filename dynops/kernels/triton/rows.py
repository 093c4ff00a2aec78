"""Rows in Triton: gather_rows and scatter_rows where the binary was built without CUDA, merge_rows, and ``filled``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous, empty_map
from . import gemm, tiling
from .gemm import rank, split_pixel
from .launch import cdiv, launch

# Columns from which a program takes a part of one row: a sample's may be millions, a grid's y 65535.
_LONG = 4096
_ROW = 256  # the longest row of channels, in words of 32 bits, that is loaded whole
# Bytes of a map from which it is filled beside the kernels that compute it. Not measured: by an H200's datasheet 32 MB
# take 7 us. Two events and a launch are expected to cost the host about as much.
_LARGE = 1 << 25
_threads = threading.local()
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def picked(words, at, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Columns ``at`` [N] of rows [M, ...] of 32-bit words, or of two 16-bit numbers each: by warp shuffles, as bits."""
    word = at // 2 if HALF else at
    value = tl.gather(words, tl.broadcast_to(word[None, :], [M, N]), 1)
    if HALF:
        value = (value >> ((at % 2) * 16)[None, :]).to(tl.int16)
    return value


@triton.jit
def row_values(
    x, at, step, channel, inside, present, size, ROW: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """x at ``at`` [M] plus ``step * channel`` [N], zero where it is not ``present``.

    ROW: x has 32-bit words of numbers that lie side by side, of two each if HALF. That many, a power of two, hold a
    row of ``size`` channels. It is loaded in vectors of 16 bytes and the channels are picked from registers. 0: x has
    the numbers themselves, which are loaded one by one.
    """
    mask = inside[:, None] & present[None, :]
    if ROW == 0:
        value = tl.load(x + (at[:, None] + channel[None, :] * step), mask=mask, other=0)
    else:
        word = tl.arange(0, ROW)
        each = 2 if HALF else 1
        held = tl.load(x + (at // each)[:, None] + word[None, :], mask=inside[:, None] & (word < size // each)[None, :], other=0)  # fmt: skip
        value = tl.where(
            present[None, :], picked(held, tl.where(present, channel, 0).to(tl.int32), HALF, M, N), 0
        )
    return value


@triton.jit(do_not_specialize=["rows", "h", "w"])
def gather_rows_kernel(
    x, out, index, rows, h, w, channels, stride_n, stride_c, stride_h, stride_w,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[i, :] = x at pixel index[i], zero where that is -1; x has any strides."""
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    row = first + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    pixel = tl.load(index + row, mask=row < rows, other=-1)
    if WIDE:
        channel = channel.to(tl.int64)
        pixel = pixel.to(tl.int64)
    n, y, x_ = split_pixel(pixel, h, w)
    at = (n * stride_n + y * stride_h + x_ * stride_w)[:, None] + channel[None, :] * stride_c
    value = tl.load(x + at, mask=inside & (pixel >= 0)[:, None], other=0)
    tl.store(out + row[:, None] * channels + channel[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scatter_rows_kernel(
    values, out, index, rows, channels, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """out[index[i], :] = values[i, :], but where the index is -1."""
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    row = first + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    pixel = tl.load(index + row, mask=row < rows, other=-1)
    live = (pixel >= 0)[:, None] & (channel < channels)[None, :]
    if WIDE:
        pixel = pixel.to(tl.int64)
    value = tl.load(values + row[:, None] * channels + channel[None, :], mask=live)
    tl.store(out + pixel[:, None] * channels + channel[None, :], value, mask=live)


@triton.jit(do_not_specialize=["pixels", "plane"])
def scatter_planes_kernel(
    values, out, row_of, base, pixels, plane, channels, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """out[n, c, p] = values[i, c] with i = row_of[n, p], where that is -1 base or zero; ``plane`` pixels a sample."""
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    pixel = first + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    row = tl.load(row_of + pixel, mask=pixel < pixels, other=-1)
    live = (row >= 0)[:, None]
    if WIDE:
        channel = channel.to(tl.int64)
        row = row.to(tl.int64)
    n = pixel // plane
    at = (n * channels * plane + pixel - n * plane)[:, None] + channel[None, :] * plane
    value = tl.load(values + row[:, None] * channels + channel[None, :], mask=inside & live, other=0)
    if base is not None:
        value = tl.where(live, value, tl.load(base + at, mask=inside & ~live, other=0))
    tl.store(out + at, value, mask=inside)


@triton.jit(do_not_specialize=["outputs"])
def merge_rows_kernel(
    rows, out, row_of, base, scale, outputs, columns,
    MIX: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out = base, at output n with row i = row_of[n] >= 0 scale[i] * rows[i] plus base (MIX: (1 - scale[i]) of it)."""
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    n = first + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = (n < outputs)[:, None] & (column < columns)[None, :]
    row = tl.load(row_of + n, mask=n < outputs, other=-1)
    kept = row >= 0
    share = tl.where(kept, 1.0, 0.0)
    if scale is not None:
        share = tl.load(scale + row, mask=kept, other=0).to(tl.float32)
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    at = n[:, None] * columns + column[None, :]
    # a row that stands alone must not read the base, which may be NaN
    alone = share == 1 if MIX else share != share
    below = tl.load(base + at, mask=inside & (~alone)[:, None], other=0).to(tl.float32)
    source = row[:, None] * columns + column[None, :]
    value = tl.load(rows + source, mask=inside & kept[:, None], other=0).to(tl.float32)
    left = (1 - share)[:, None] * below if MIX else below
    merged = tl.where(kept[:, None], share[:, None] * value + left, below)
    merged = tl.where(alone[:, None], value, merged)
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fill_rows(out, base, pixel, bare, channels, M: tl.constexpr, N: tl.constexpr):
    """out = base, or zero, at those of a program's pixels that are bare."""
    for start in range(0, channels, N):
        channel = start + tl.arange(0, N)
        mask = bare[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        value = tl.zeros([M, N], out.dtype.element_ty)
        if base is not None:
            value = tl.load(base + at, mask=mask)
        tl.store(out + at, value, mask=mask)


@triton.jit(do_not_specialize=["rows", "pixels"])
def fill_kernel(
    out, base, index, count, rows, pixels, channels, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """out = base, or zero, at the pixels that are not in the ascending index; the others are not touched."""
    pixel = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * M + tl.arange(0, M)
    last = rows
    if count is not None:
        last = tl.minimum(rows, tl.load(count))
    row = rank(index, last, pixel, 31, False) - 1
    entry = tl.load(index + row, mask=row >= 0, other=-1)
    bare = (entry != pixel) & (pixel < pixels)
    fill_rows(out, base, pixel, bare, channels, M, N)


@triton.jit(do_not_specialize=["columns", "h", "w"])
def nearest_row_kernel(row_of, nearest, columns, h, w, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """nearest[n, y, x] = the nearest row in column x of sample n that has a pixel, the upper of two; -1: none."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    n = column // w
    first = (n.to(tl.int64) if WIDE else n) * h * w + column - n * w
    above = tl.full([BLOCK], -1, tl.int32)
    for y in range(h):
        above = tl.where(tl.load(row_of + first + y * w, mask=inside, other=-1) >= 0, y, above)
        tl.store(nearest + first + y * w, above, mask=inside)
    tl.debug_barrier()
    below = tl.full([BLOCK], -1, tl.int32)
    for step in range(h):  # the row itself is where the last one was its own
        y = h - 1 - step
        above = tl.load(nearest + first + y * w, mask=inside, other=-1)
        below = tl.where(above == y, y, below)
        nearer = (above < 0) | ((below >= 0) & (below - y < y - above))
        tl.store(nearest + first + y * w, tl.where(nearer, below, above), mask=inside)


@triton.jit(do_not_specialize=["pixels", "h", "w"])
def nearest_pixel_kernel(nearest, out, pixels, h, w, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out[n, y, x] = the nearest of the pixels (nearest[n, y, c], c), of several the first in row-major order.

    Columns are looked at from x on outwards, until no nearer one can come for any pixel of the program.
    """
    pixel = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    n, y, x = split_pixel(pixel, h, w)
    best = tl.where(inside, tl.full([BLOCK], 2**62, tl.int64), 0)
    position = tl.full([BLOCK], -1, tl.int32)
    offset = tl.program_id(0).to(tl.int64) * 0
    while (offset < w) & (offset * offset <= tl.max(best, 0)):
        for side in tl.static_range(2):
            column = x - offset if side == 0 else x + offset
            there = inside & (column >= 0) & (column < w)
            row = tl.load(nearest + pixel - x + column, mask=there, other=-1)
            distance = (row - y).to(tl.int64) * (row - y) + offset * offset
            at = (row * w + column).to(tl.int32)
            nearer = (row >= 0) & ((distance < best) | ((distance == best) & (at < position)))
            best = tl.where(nearer, distance, best)
            position = tl.where(nearer, at, position)
        offset += 1
    position = tl.where(position >= 0, (position + n * h * w).to(tl.int32), -1)
    tl.store(out + pixel, position, mask=inside)


def nearest_pixel(index: Tensor, count: Tensor | None, shape: list[int]) -> Tensor:
    """See ``ops.pixels.interpolate._nearest_pixel``: three launches, where the reference has about 16 a column."""
    n, h, w = shape
    row_of = torch.ops.dynops.inverse_index(index, count, shape)
    nearest, out = torch.empty_like(row_of), torch.empty_like(row_of)
    if out.numel() == 0:
        return out
    wide = gemm.is_wide(out)
    with gemm.on_device(out):
        launch(nearest_row_kernel, cdiv(n * w, 32))(row_of, nearest, n * w, h, w, wide, BLOCK=32, num_warps=1)
        launch(nearest_pixel_kernel, cdiv(n * h * w, 256))(nearest, out, n * h * w, h, w, wide, BLOCK=256)
    return out


def gather_rows(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """See ``ops.pixels.rows._gather_rows``."""
    out = x.new_empty(index.shape[0], x.shape[1])
    if out.numel() == 0:
        return out
    tile = _tile(x.shape[1])
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    wide = gemm.is_wide(out) or reach >= gemm.INT32_LIMIT
    with gemm.on_device(x):
        launch(gather_rows_kernel, *tiling.grid(out, tile))(
            words(x), words(out), index, out.shape[0], x.shape[2], x.shape[3], x.shape[1], *x.stride(), wide, **tile
        )  # fmt: skip
    return out


def scatter_rows(
    rows: Tensor, index: Tensor, count: Tensor | None, shape: list[int], base: Tensor | None
) -> Tensor:
    """See ``ops.pixels.rows._scatter_rows``."""
    out = empty_map(rows, (shape[0], rows.shape[1], shape[1], shape[2]), torch.channels_last)
    return scatter_into(out.zero_() if base is None else out.copy_(base), rows, index)


def scatter_into(out: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Writes rows where the index says into ``out``, whose channels lie side by side; -1: nowhere."""
    if rows.numel() == 0 or out.numel() == 0:
        return out
    rows, tile = rows.contiguous(), _tile(rows.shape[1])
    with gemm.on_device(rows):
        launch(scatter_rows_kernel, *tiling.grid(rows, tile))(
            words(rows), words(out), index, rows.shape[0], rows.shape[1], gemm.is_wide(rows, out), **tile
        )  # fmt: skip
    return out


def scatter_planes(
    rows: Tensor, index: Tensor, count: Tensor | None, shape: list[int], base: Tensor | None
) -> Tensor:
    """See ``ops.pixels.rows._scatter_planes``: every value of the map is written once."""
    n, h, w = shape
    if h * w == 1 or rows.shape[1] > _LONG:
        return torch.ops.dynops.scatter_rows(rows, index, count, shape, base).contiguous()
    out = empty_map(rows, (n, rows.shape[1], h, w), torch.contiguous_format)
    if out.numel() == 0:
        return out
    row_of, tile = torch.ops.dynops.inverse_index(index, count, shape), {"M": 64, "N": 32, "num_warps": 4}
    base = None if base is None else words(base.contiguous())
    with gemm.on_device(rows):
        launch(scatter_planes_kernel, cdiv(n * h * w, tile["M"]), cdiv(rows.shape[1], tile["N"]))(
            words(rows.contiguous()), words(out), row_of, base, n * h * w, h * w, rows.shape[1],
            gemm.is_wide(rows, out), **tile,
        )  # fmt: skip
    return out


def merge_rows(
    rows: Tensor, index: Tensor, count: Tensor | None, base: Tensor, scale: Tensor | None, mix: bool
) -> Tensor:
    """See ``ops.pixels.rows._merge_rows``. Sums are float32."""
    out = base.new_empty(base.shape)
    if out.numel() == 0:
        return out
    row_of = torch.ops.dynops.inverse_index(index, count, [base.shape[0], 1, 1])
    rows, base, tile = rows.contiguous(), base.contiguous(), _tile(base.shape[1])
    scale = contiguous(scale)
    with gemm.on_device(rows):
        launch(merge_rows_kernel, *tiling.grid(out, tile))(
            rows, out, row_of, base, scale, out.shape[0], out.shape[1], mix, gemm.is_wide(rows, out), **tile
        )  # fmt: skip
    return out


def filled(out: Tensor, base: Tensor | None, index: Tensor, count: Tensor | None):
    """As :func:`filled_by`, where the ascending ``index`` has no pixel."""
    pixels, channels, tile = out.numel() // out.shape[1], out.shape[1], _tile(out.shape[1])

    def fill(values: Tensor, base: Tensor | None) -> None:
        launch(fill_kernel, cdiv(pixels, tile["M"]))(
            values, base, index, count, index.shape[0], pixels, channels, gemm.is_wide(out), **tile
        )

    return filled_by(out, base, fill)


@contextlib.contextmanager
def filled_by(
    out: Tensor, base: Tensor | None, fill: Callable[[Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Makes a channels_last map ``base``, or zero, where ``fill`` does so; the block writes the other pixels.

    A large map is filled on a stream of its own while the block's kernels run: they are bound by arithmetic, the fill
    by memory. It is launched after them: programs start in the order of their launches, and a fill of thousands would
    keep the others waiting. A small map is filled whole beforehand. (Not measured. By an H200's datasheet 256 channels
    at 64x56x56 in bfloat16 take 21 us to fill, and the products of a 3x3 at a density of 10 % 24 us.)
    """
    if out.numel() * out.element_size() < _LARGE:
        out.zero_() if base is None else out.copy_(base)
        yield
        return
    base = None if base is None else words(base.contiguous(memory_format=torch.channels_last))
    earlier = torch.cuda.current_stream(out.device).record_event() if out.is_cuda else None
    yield
    with _aside(out, earlier):
        fill(words(out), base)


@contextlib.contextmanager
def _aside(x: Tensor, earlier: torch.cuda.Event | None) -> Iterator[None]:
    """Context: launches go to the side stream of the device of ``x``, after an event; the current one waits for them."""
    if not x.is_cuda:
        yield
        return
    current, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_event(earlier)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of this thread: one of all threads would bring what one launches into what another one captures."""
    streams = _threads.__dict__
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _tile(columns: int) -> dict:
    return {"M": 1, "N": 2048, "num_warps": 4} if columns > _LONG else tiling.direct_tile(columns)


def words(x: Tensor) -> Tensor:
    """The same memory as integers: kernels move its bits and look at no value."""
    if x.element_size() not in _WORDS:
        raise TypeError(f"x: expected a dtype of at most 8 bytes, got {x.dtype}")
    return x.view(_WORDS[x.element_size()])


def whole_rows(x: Tensor, size: int) -> tuple[Tensor, dict] | None:
    """``x`` as the 32-bit words of its rows, and the tile that loads ``size`` channels whole; None where that does not pay.

    It pays up to 256 words. A warp shuffle brings one word of each lane, so wider rows take more of them: by the machine
    code for sm_90, 32 instructions for each number picked of 256 bfloat16 channels, 40 of 512, 97 of 1024. One that
    is loaded singly takes 14. (Not measured.)
    """
    each = 4 // x.element_size()
    if each not in (1, 2) or size % 16 or not 0 < size <= _ROW * each or x.data_ptr() % 16:
        return None
    rows = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    row = max(16, triton.next_power_of_2(size // each))
    tile = {"M": 2048 // row, "N": row, "num_warps": 4, "ROW": row, "HALF": each == 2}
    return rows.view(torch.int32), tile
