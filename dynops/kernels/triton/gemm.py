"""Parts that the Triton kernels share: where a tap reads, the epilogue, weights.

``tiling.py`` chooses tile sizes, ``taps.py`` has sets and the order of taps.

Works with Triton 3.6 to 3.9. Imported only where Triton is installed.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...geometry import ConvGeometry
from ...kept import kept
from . import tiling
from .launch import cdiv, launch

# Sizes that change from input to input: not specialised on, so a new one compiles nothing.
UNSPECIALIZED = ["rows", "in_h", "in_w", "out_h", "out_w", "pad_h", "pad_w"]
INT32_LIMIT = 2**31 - 2**16  # room for the lanes past the end of the last tile

# --------------------------------------------------------------------------- device functions


@triton.jit
def coordinate(out, tap, size, stride, pad, dilation, TRANSPOSED: tl.constexpr):
    """The input coordinate that ``tap`` of ``out`` reads, and whether it is inside the input."""
    if TRANSPOSED:
        shifted = out + pad - tap * dilation
        at = shifted // stride
        inside = (shifted >= 0) & (at * stride == shifted) & (at < size)
    else:
        at = out * stride - pad + tap * dilation
        inside = (at >= 0) & (at < size)
    return at, inside


@triton.jit
def split_pixel(pixel, h, w):
    """``n, y, x`` of the flat position ``n*h*w + y*w + x``."""
    line = pixel // w
    n = line // h
    return n, line - n * h, pixel - line * w


@triton.jit
def source_row(
    pixel, live, row, tap, source, in_h, in_w, out_h, out_w, pad_h, pad_w,
    KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, READS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The row of x that ``tap`` of an output pixel reads, and whether there is one.

    READS: "pixels", the row is the input pixel; "active", the same, where ``source`` has one;
    "packed", ``source`` names the row; "aligned", output row i reads row i.
    """
    if READS == "aligned":
        at = row
        valid = live
    else:
        n, y, x = split_pixel(pixel, out_h, out_w)
        tap_y = tap // KERNEL_W
        in_y, inside_y = coordinate(y, tap_y, in_h, STRIDE_H, pad_h, DIL_H, TRANSPOSED)
        in_x, inside_x = coordinate(x, tap - tap_y * KERNEL_W, in_w, STRIDE_W, pad_w, DIL_W, TRANSPOSED)
        valid = live & inside_y & inside_x
        if WIDE:
            n = n.to(tl.int64)
        at = (n * in_h + in_y) * in_w + in_x
        if READS != "pixels":
            mapped = tl.load(source + at, mask=valid, other=-1)
            valid = mapped >= 0
            if READS == "packed":
                at = mapped
    if WIDE:
        at = at.to(tl.int64)
    return at, valid


@triton.jit
def load_pixels(index, row, rows):
    """The output pixels of these rows, -1 where there is none; without an index, row i is pixel i."""
    if index is None:
        pixel = tl.where(row < rows, row, -1)
    else:
        pixel = tl.load(index + row, mask=row < rows, other=-1)
    return pixel


@triton.jit
def rank(entries, last, value, STEPS: tl.constexpr, GAPS: tl.constexpr):
    """The number of ascending ``entries[:last]`` that are <= value, by a binary search: ``last < 2**STEPS``.

    GAPS: of those that have at most ``value`` channels before them that are not in the list.
    """
    low = value * 0
    high = low + last
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        searching = low < high
        entry = tl.load(entries + middle, mask=searching, other=0)
        if GAPS:
            entry -= middle
        below = entry <= value
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (entry > value), middle, high)
    return low


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation in float32. NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "hardswish":
        z = z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3)) / 6
    elif ACTIVATION == "relu2":
        z = tl.where(z < 0, 0.0, z * z)
    else:
        tl.static_assert(ACTIVATION == "")
    return z


@triton.jit
def finish(z, bias, scale, shift, gate, residual, row, channel, row_mask, channel_mask, channels,
           ACTIVATION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """``activation(gate * (scale * (z + bias) + shift) + residual)`` of a tile, in float32."""
    if bias is not None:
        z += tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        z *= tl.load(scale + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        z += tl.load(shift + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        z *= tl.load(gate + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        if WIDE:
            row = row.to(tl.int64)
        at = row[:, None] * channels + channel[None, :]
        mask = row_mask[:, None] & channel_mask[None, :]
        z += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return activate(z, ACTIVATION)


@triton.jit
def finish_tile(
    acc, out, row, pixel, live, first_channel, group, target, bias, scale, shift, gate, residual,
    rows, n_size, out_channels, WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile and its store, one piece of the columns after another.

    What a whole one loads takes so many registers that one program fits an SM: 194 with a norm and a residual, in pieces
    120 (sm_90, 128x128, a capacity).
    """
    PIECE: tl.constexpr = 32 if residual is not None and out.dtype.element_ty.primitive_bitwidth == 16 else 64
    if N > PIECE:
        low, high = acc.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        finish_tile(
            low, out, row, pixel, live, first_channel, group, target, bias, scale, shift, gate, residual,
            rows, n_size, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE, M, N // 2,
        )  # fmt: skip
        finish_tile(
            high, out, row, pixel, live, first_channel + N // 2, group, target, bias, scale, shift, gate, residual,
            rows, n_size, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE, M, N // 2,
        )  # fmt: skip
    else:
        channel = first_channel + tl.arange(0, N)
        channel_mask = channel < n_size
        channel += group * n_size
        finish_rows(
            acc, out, row, pixel, live, channel, channel_mask, target, bias, scale, shift, gate, residual,
            rows, out_channels, WRITES_ROWS, ZERO_TAIL, ACTIVATION, WIDE,
        )  # fmt: skip


@triton.jit
def finish_rows(
    z, out, row, pixel, live, channel, channel_mask, target, bias, scale, shift, gate, residual, rows, channels,
    WRITES_ROWS: tl.constexpr, ZERO_TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, stored at its rows, with zeros past the count where they are asked for, at its pixels, or
    where ``target`` says."""
    z = finish(
        z, bias, scale, shift, gate, residual, row, channel, live, channel_mask, channels, ACTIVATION, WIDE
    )
    if WRITES_ROWS:
        at = row
        z = tl.where(live[:, None], z, 0.0)
        stored = row < rows if ZERO_TAIL else live
    elif target is not None:
        at = tl.load(target + pixel, mask=live, other=-1)
        stored = at >= 0
    else:
        at = pixel
        stored = live
    if WIDE:
        at = at.to(tl.int64)
    at = at[:, None] * channels + channel[None, :]
    tl.store(out + at, z.to(out.dtype.element_ty), mask=stored[:, None] & channel_mask[None, :])


# ------------------------------------------------------------------------------ layout, weights


@triton.jit
def round_kernel(x, out, size, taps, inner, BLOCK: tl.constexpr):
    """out [.., taps, inner] = x [.., inner, taps] rounded to TF32: to 10 bits of mantissa, halves away from zero. NaN stays NaN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lead = at // (taps * inner)
    left = (at - lead * (taps * inner)).to(tl.int32)
    tap = left // inner
    value = tl.load(x + lead * (taps * inner) + (left - tap * inner) * taps + tap, mask=at < size)
    bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    rounded = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    tl.store(out + at, rounded, mask=at < size)


def weight_rows(weight: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """``[A, B, kh, kw]`` as ``[A, kh*kw, B]`` of this dtype: no copy where it is channels_last.

    For products in TF32 it is rounded, as tensor cores cut off the low bits of what they get: then the error of a
    product is 1.6 times that of rounded operands instead of 2.6 times.

    A copy is kept for the next call (``dynops.kept``). Under CUDA graph capture it becomes part of the graph, so
    that a replay sees the weight as it is then.
    """
    tf32 = cuts_off({"k_size": weight.shape[0] // groups, "n_size": weight.shape[1]}, groups, weight, dtype)
    if not tf32 and weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        lead, inner, kh, kw = weight.shape  # one view, where pack_rows takes six steps and 10 us
        return weight.detach().as_strided((lead, kh * kw, inner), (kh * kw * inner, inner, 1))
    make = functools.partial(pack_rows, weight, dtype, tf32)
    return kept.get(("triton", dtype, tf32), make, weight)


def pack_rows(weight: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """See :func:`weight_rows`."""
    lead, inner, kh, kw = weight.shape
    weight = weight.detach().to(dtype)
    if tf32:
        return rounded_rows(weight)
    return weight.permute(0, 2, 3, 1).contiguous().view(lead, kh * kw, inner)


def cuts_off(sizes: dict, groups: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """True if the product with this weight is one in TF32, in which tensor cores cut off low bits."""
    return weight.is_cuda and not is_narrow(sizes, groups) and tiling.precision(dtype) == "tf32"


def rounded_rows(weight: Tensor) -> Tensor:
    """A float32 ``[..., B, kh, kw]`` as ``[..., kh*kw, B]``, rounded to TF32 in the same pass."""
    rows = weight.movedim(-3, -1)
    shape, in_order = rows.flatten(-3, -2).shape, rows.is_contiguous()
    source, out = (rows if in_order else weight.contiguous()), weight.new_empty(shape)
    if out.numel():
        with on_device(out):
            launch(round_kernel, cdiv(out.numel(), 1024))(
                source, out, out.numel(), 1 if in_order else shape[-2], shape[-1], BLOCK=1024
            )
    return out


def as_weight(dw: Tensor, weight_shape, dtype: torch.dtype) -> Tensor:
    """``dw`` ``[A, kh*kw, B]`` as ``[A, B, kh, kw]`` of this dtype, contiguous."""
    lead, inner, kh, kw = weight_shape
    dw = dw.view(lead, kh, kw, inner).permute(0, 3, 1, 2)
    return dw.to(dtype, memory_format=torch.contiguous_format)


def weight_box(w: Tensor, sizes: dict, tile: dict, g: ConvGeometry) -> TensorDescriptor | None:
    """``w`` of :func:`weight_rows` as a matrix that TMA reads in boxes of a tile, or None where it cannot.

    From sm_90 on one thread then fetches a weight tile, where 256 threads issued eight 16-byte copies each (and
    held their addresses: 206 registers became 194 on sm_90 with tiles of 128x256x64). A box must not run into the
    next tap's or group's part of the reduction: values there are multiplied by zero, and may be NaN.
    """
    if sizes["k_size"] % tile["K"] or not takes_boxes(w):
        return None
    box = (tile["K"], tile["N"]) if g.transposed else (tile["N"], tile["K"])
    return matrix_box(w, w.shape[0], w.stride(0), box)


def row_box(x: Tensor, sizes: dict, tile: dict) -> TensorDescriptor | None:
    """Rows of channels, or a channels_last map, as a matrix that TMA reads in boxes of a tile; see :func:`weight_box`."""
    matrix = x if x.dim() == 2 else x.permute(0, 2, 3, 1).view(-1, x.shape[1])
    if sizes["k_size"] % tile["K"] or not takes_boxes(matrix):
        return None
    return TensorDescriptor.from_tensor(matrix, [tile["M"], tile["K"]])


def takes_boxes(matrix: Tensor) -> bool:
    """True if TMA reads this matrix: half precision from sm_90 on, rows that begin at multiples of 16 bytes."""
    arch = tiling.device_facts(matrix.device)[0]
    half = matrix.element_size() == 2 and matrix.numel() > 0
    return arch >= 90 and half and matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0


def matrix_box(w: Tensor, rows: int, columns: int, box: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of contiguous memory, which :func:`takes_boxes`, as a matrix ``[rows, columns]``.

    What was checked for these sizes before is not checked again: that takes 4 us with the view that would be its base.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_box_fields(rows, columns, box), base=w)
    return made


@functools.lru_cache(4096)
def _box_fields(rows: int, columns: int, box: tuple[int, int]) -> dict:
    nothing = torch.empty(8, dtype=torch.float16, device="cpu")
    return vars(TensorDescriptor(nothing, [rows, columns], [columns, 1], list(box)))


def adjoint(g: ConvGeometry) -> ConvGeometry:
    """The geometry with input and output exchanged: tap t of q reads p where tap t of p read q."""
    return g._replace(in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w, transposed=1 - g.transposed)


@functools.lru_cache(4096)
def geometry_arguments(g: ConvGeometry) -> dict:
    """The kernels' geometry arguments, which no caller may write to."""
    sizes = {name: getattr(g, name) for name in UNSPECIALIZED[1:]}
    steps = {"STRIDE_H": g.stride_h, "STRIDE_W": g.stride_w, "DIL_H": g.dil_h, "DIL_W": g.dil_w}
    return {**sizes, **steps, "KERNEL_W": g.kernel_w, "TAPS": g.taps, "TRANSPOSED": bool(g.transposed)}


def rows_of(x: Tensor) -> Tensor:
    """Rows of channels: a map [N, C, H, W] as channels_last, packed rows as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def product_sizes(
    in_channels: int, out_channels: int, w_shape: tuple[int, int, int], g: ConvGeometry
) -> dict:
    """The kernels' channel arguments; ``w_shape`` as :func:`weight_rows` returns it."""
    k_size, n_size = in_channels // g.groups, out_channels // g.groups
    sizes = {"k_size": k_size, "n_size": n_size, "lead": w_shape[1] * w_shape[2]}
    return {**sizes, "in_channels": in_channels, "out_channels": out_channels}


def is_narrow(sizes: dict, groups: int) -> bool:
    """True if groups are too narrow for a matrix product (depthwise above all)."""
    return groups > 1 and min(sizes["k_size"], sizes["n_size"]) < 16


def is_wide(*tensors: Tensor | None) -> bool:
    """True if an element offset in one of these may pass 2**31."""
    for t in tensors:  # any() takes twice as long
        if t is not None and t.numel() >= INT32_LIMIT:
            return True
    return False


_HERE = contextlib.nullcontext()


def on_device(x: Tensor):
    """Launches go to the current CUDA device: makes it that of ``x``."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
