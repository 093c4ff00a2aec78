"""Sets of taps: which taps of a row read something, as bits of an integer, and rows in the order of their sets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import UNSPECIALIZED, coordinate, load_pixels, split_pixel
from .launch import cdiv, launch

MAX_ORDERED_TAPS = 62  # a tap set is one integer; larger kernels walk over every tap
MAX_SET = tl.constexpr(MAX_ORDERED_TAPS)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def united(sets, SIZE: tl.constexpr):
    """The union of the rows' sets: as bits, and how many."""
    union = tl.reduce(sets, 0, _or)
    WIDTH: tl.constexpr = 32 if SIZE <= 31 else 64
    bits = (union >> tl.arange(0, WIDTH).to(union.dtype)) & 1
    return union, tl.sum(bits, 0).to(tl.int32)


@triton.jit
def tap_sets(
    pixel, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The taps of each output pixel that read something, as bits of one integer; see source_row. None of pixel -1."""
    _, y, x = split_pixel(pixel, out_h, out_w)
    columns = tl.zeros(pixel.shape, tl.int32 if TAPS <= 31 else tl.int64)
    for tap in tl.static_range(KERNEL_W):
        _, inside = coordinate(x, tap, in_w, STRIDE_W, pad_w, DIL_W, TRANSPOSED)
        columns |= inside.to(columns.dtype) << tap
    taps = tl.zeros_like(columns)
    for tap in tl.static_range(TAPS // KERNEL_W):
        _, inside = coordinate(y, tap, in_h, STRIDE_H, pad_h, DIL_H, TRANSPOSED)
        taps |= tl.where(inside & (pixel >= 0), columns << (tap * KERNEL_W), 0)
    if READS == "active" or READS == "packed":
        origin = tap_origin(
            pixel, in_h, in_w, out_h, out_w, pad_h, pad_w, STRIDE_H, STRIDE_W, TRANSPOSED, WIDE
        )
        for tap in range(TAPS):
            at = origin + tap_offset(tap, in_w, KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED)
            bit = tl.full(taps.shape, 1, taps.dtype) << tap
            mapped = tl.load(source + at, mask=(taps & bit) != 0, other=-1)
            taps = tl.where(mapped >= 0, taps, taps & ~bit)
    return taps


@triton.jit
def tap_origin(
    pixel, in_h, in_w, out_h, out_w, pad_h, pad_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A position such that a tap of an output pixel reads it plus tap_offset, which is the same for all pixels.

    Transposed, tap t reads (y + pad - t) / stride, if that is whole: then it is (y + pad) // stride - t // stride.
    """
    n, y, x = split_pixel(pixel, out_h, out_w)
    if TRANSPOSED:
        y, x = (y + pad_h) // STRIDE_H, (x + pad_w) // STRIDE_W
    else:
        y, x = y * STRIDE_H - pad_h, x * STRIDE_W - pad_w
    if WIDE:
        n = n.to(tl.int64)
    return (n * in_h + y) * in_w + x


@triton.jit
def tap_offset(
    tap, in_w, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """See tap_origin."""
    tap_y = tap // KERNEL_W
    y, x = tap_y * DIL_H, (tap - tap_y * KERNEL_W) * DIL_W
    if TRANSPOSED:
        y, x = -(y // STRIDE_H), -(x // STRIDE_W)
    return y * in_w + x


@triton.jit
def lowest_tap(taps):
    """The position of the lowest set bit: the exponent of that power of two as a float."""
    lowest = (taps & -taps).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tap_key_kernel(
    keys, index, source, rows, in_h, in_w, out_h, out_w, pad_h, pad_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keys[i] = the Gray rank of the set of taps for which row i reads something."""
    first = tl.program_id(0).to(tl.int64) * BLOCK if WIDE else tl.program_id(0) * BLOCK
    row = first + tl.arange(0, BLOCK)
    pixel = load_pixels(index, row, rows)
    taps = tap_sets(
        pixel, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
        KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, READS, WIDE,
    )  # fmt: skip
    for shift in tl.static_range(6 if TAPS > 31 else 5):  # Gray decoding: a prefix xor from the top
        taps ^= taps >> (1 << shift)
    tl.store(keys + row, taps.to(keys.dtype.element_ty), mask=row < rows)


def tap_order(
    index: Tensor | None, source: Tensor | None, rows: int, options: dict, device
) -> tuple[Tensor, Tensor]:
    """The rows' tap sets (as Gray ranks), descending, and the rows in that order."""
    dtype = torch.int16 if options["TAPS"] <= 15 else torch.int32 if options["TAPS"] <= 31 else torch.int64
    keys = torch.empty(rows, dtype=dtype, device=device)
    launch(tap_key_kernel, cdiv(rows, 256))(keys, index, source, rows, **options, BLOCK=256)
    return torch.sort(keys, descending=True)
