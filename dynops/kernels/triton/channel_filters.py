"""Local convolution in Triton: a filter for each pixel and group of channels.

The signatures and the meaning are those of the references in ``dynops/ops/channels/filters.py``. A tile of pixels and
channels walks over the taps, and the filter of each pixel is read where it lies, in either memory format: every value
of the maps is moved once, plus the taps that the cache does not hold. There is no product for tensor cores in this: a
filter's number meets a group's channels of one pixel. Sums are float32, and nothing uses atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..layout import empty_map, memory_format_of
from . import gemm, tiling
from .channel_lists import map_strides
from .gemm import source_row, split_pixel, united
from .launch import cdiv, launch

# ------------------------------------------------------------------------------------- kernels


@triton.jit
def regions_met(
    region, pixel, inside, row, regions, in_h, in_w, out_h, out_w, pad_h, pad_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, REGIONS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The regions of all pixels that a tile reads: as bits, and how many."""
    met = (row * 0).to(tl.int32 if REGIONS <= 31 else tl.int64)
    for tap in range(TAPS):
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        place = tl.load(region + at, mask=valid, other=-1)
        known = (place >= 0) & (place < regions)
        met |= known.to(met.dtype) << tl.where(known, place, 0)
    return united(met, REGIONS)


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def local_conv_kernel(
    x, kernels, out, rows, in_h, in_w, out_h, out_w, pad_h, pad_w, channels, group_size, k_n, k_p, k_c,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, UPSAMPLE: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[p, c] = the sum over taps of kernels[g(c), tap, p] x[q(p // UPSAMPLE, tap), c].

    TRANSPOSED, on the adjoint geometry: out[q, c] = the sum over the p and taps with that q of kernels[g(c), tap, p]
    x[p, c]. ``k_n``, ``k_p``, ``k_c``: the strides of sample, pixel and channel of the kernels.
    """
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    row = first + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    inside = row < rows
    present = channel < channels
    filters = (channel // group_size) * TAPS
    pixel = row
    if not TRANSPOSED:
        n, y, x_ = split_pixel(row, out_h * UPSAMPLE, out_w * UPSAMPLE)
        pixel = (n * out_h + y // UPSAMPLE) * out_w + x_ // UPSAMPLE
        filter_at = n * k_n + (y * (out_w * UPSAMPLE) + x_) * k_p
    acc = tl.zeros([M, N], tl.float32)
    for tap in range(TAPS):
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        mask = valid[:, None] & present[None, :]
        filter_c = ((filters + tap) * k_c)[None, :]
        if TRANSPOSED:
            n, y, x_ = split_pixel(at, in_h, in_w)
            for part in range(UPSAMPLE * UPSAMPLE):
                fine_y = y * UPSAMPLE + part // UPSAMPLE
                fine = fine_y * (in_w * UPSAMPLE) + x_ * UPSAMPLE + part % UPSAMPLE
                f = tl.load(kernels + (n * k_n + fine * k_p)[:, None] + filter_c, mask=mask, other=0.0)
                fine += n * (in_h * UPSAMPLE) * (in_w * UPSAMPLE)
                a = tl.load(x + fine[:, None] * channels + channel[None, :], mask=mask, other=0.0)
                acc += a.to(tl.float32) * f.to(tl.float32)
        else:
            f = tl.load(kernels + filter_at[:, None] + filter_c, mask=mask, other=0.0)
            a = tl.load(x + at[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            acc += a.to(tl.float32) * f.to(tl.float32)
    at = row[:, None] * channels + channel[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & present[None, :])


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def local_kernel_grad_kernel(
    grad, x, dk, rows, in_h, in_w, out_h, out_w, pad_h, pad_w, channels, group_size, k_n, k_p, k_c,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, UPSAMPLE: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk[g, tap, p] = the sum over the channels of g of grad[p, c] x[q(p // UPSAMPLE, tap), c]; one group a program."""
    first = tl.program_id(0).to(tl.int64) * M if WIDE else tl.program_id(0) * M
    row = first + tl.arange(0, M)
    group = tl.program_id(1)
    inside = row < rows
    n, y, x_ = split_pixel(row, out_h * UPSAMPLE, out_w * UPSAMPLE)
    pixel = (n * out_h + y // UPSAMPLE) * out_w + x_ // UPSAMPLE
    target = n * k_n + (y * (out_w * UPSAMPLE) + x_) * k_p
    for tap in range(TAPS):
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        acc = tl.zeros([M, N], tl.float32)
        for start in range(0, group_size, N):
            c = start + tl.arange(0, N)
            mask = valid[:, None] & (c < group_size)[None, :]
            channel = (group * group_size + c)[None, :]
            a = tl.load(grad + row[:, None] * channels + channel, mask=mask, other=0.0)
            b = tl.load(x + at[:, None] * channels + channel, mask=mask, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)
        sums = tl.sum(acc, 1).to(dk.dtype.element_ty)
        tl.store(dk + target + (group * TAPS + tap) * k_c, sums, mask=inside)


# ----------------------------------------------------------------------------------- launchers


def conv(x, kernels, geometry, upsample: int) -> Tensor:
    """See ``ops.channels.filters._conv``."""
    g = ConvGeometry(*geometry)
    out = empty_map(x, (*x.shape[:2], *kernels.shape[2:]), torch.channels_last)
    _conv(x, kernels, out, g, g.groups, upsample)
    return out


def conv_input_grad(grad, kernels, geometry, upsample: int) -> Tensor:
    """See ``ops.channels.filters._conv_input_grad``."""
    g = ConvGeometry(*geometry)
    dx = empty_map(grad, (*grad.shape[:2], g.in_h, g.in_w), torch.channels_last)
    _conv(grad, kernels, dx, gemm.adjoint(g), g.groups, upsample)
    return dx


def conv_kernel_grad(grad, x, geometry, upsample: int) -> Tensor:
    """See ``ops.channels.filters._conv_kernel_grad``."""
    g = ConvGeometry(*geometry)
    dk = empty_map(grad, (grad.shape[0], g.groups * g.taps, *grad.shape[2:]))
    if dk.numel() == 0:
        return dk
    grad, x, size = gemm.rows_of(grad), gemm.rows_of(x), x.shape[1] // g.groups
    tile = _tile(size)
    rows = grad.shape[0] * grad.shape[2] * grad.shape[3]
    with gemm.on_device(x):
        launch(local_kernel_grad_kernel, cdiv(rows, tile["M"]), g.groups)(
            grad, x, dk, rows=rows, **_arguments(dk, x.shape[1], size, g, upsample), WIDE=gemm.is_wide(grad, x, dk), **tile
        )  # fmt: skip
    return dk


def _conv(x: Tensor, kernels: Tensor, out: Tensor, g: ConvGeometry, groups: int, upsample: int) -> None:
    if out.numel() == 0:
        return
    x, kernels = gemm.rows_of(x), kernels.contiguous(memory_format=memory_format_of(kernels))
    channels, tile = out.shape[1], _tile(out.shape[1])
    rows = out.numel() // channels
    with gemm.on_device(x):
        launch(local_conv_kernel, cdiv(rows, tile["M"]), cdiv(channels, tile["N"]))(
            x, kernels, out, rows=rows, **_arguments(kernels, channels, channels // groups, g, upsample),
            WIDE=gemm.is_wide(x, kernels, out), **tile,
        )  # fmt: skip


def _tile(channels: int) -> dict:
    """Half of the pixels where loads are not vectors: the addresses of all spilled on sm_80."""
    tile = tiling.direct_tile(channels)
    return tile if channels % 16 == 0 else tile | {"M": tile["M"] // 2}


def _arguments(kernels: Tensor, channels: int, group_size: int, g: ConvGeometry, upsample: int) -> dict:
    strides = zip(("k_n", "k_p", "k_c"), map_strides(kernels, memory_format_of(kernels)), strict=True)
    sizes = {"channels": channels, "group_size": group_size, "UPSAMPLE": upsample}
    return {**sizes, **dict(strides), **gemm.geometry_arguments(g)}
