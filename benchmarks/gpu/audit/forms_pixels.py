"""The forms of the kernels over pixels: convolutions and their gradients, rows gathered and scattered."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from dynops import PixelPlan
from dynops.geometry import ConvGeometry
from dynops.kernels.epilogue import Epilogue
from dynops.kernels.triton import gemm, pixels, rows

from .launches import Form, wide

TYPES = (torch.bfloat16, torch.float32)


def _convolution(
    dtype: torch.dtype,
    channels: int = 256,
    outputs: int | None = None,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    transposed: bool = False,
    packed: bool = False,
    capacity: bool = False,
    epilogue: bool = False,
    norm: bool = False,
    grads: bool = True,
) -> None:
    """A convolution and its gradients over every pixel of a small map.

    ``packed``: rows in, rows out. ``capacity``: the count is on the device. ``epilogue``: everything that can be
    fused; with ``norm`` no gate. ``norm`` alone: scale and shift.
    """
    outputs, size = outputs or channels, 8
    out = size * stride if transposed else size // stride
    pad = kernel // 2 if not transposed else 1
    g = ConvGeometry(
        2, size, size, out, out, kernel, kernel, stride, stride, pad, pad, 1, 1, groups, transposed
    )
    x = torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    shape = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    weight = torch.zeros(*shape, kernel, kernel, dtype=dtype)
    y = torch.zeros(2, outputs, out, out, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plan = PixelPlan.full(g.out_shape)
    number, source = plan.index.shape[0], None
    count, fused = torch.tensor([number], dtype=torch.int32) if capacity else None, [None] * 4
    per_output = torch.zeros(outputs, dtype=dtype)
    residual = y.flatten(2).transpose(1, 2).flatten(0, 1)
    if packed:
        inputs = PixelPlan.full((2, size, size))
        source = inputs.index.view(2, size, size)
        x, y = (map_.flatten(2).transpose(1, 2).flatten(0, 1) for map_ in (x, y))
    if norm:
        fused = [per_output, per_output, None, residual if epilogue else None]
    elif epilogue:
        fused = [per_output, per_output, per_output[:1].expand(number), residual]
    finish, zero_tail = Epilogue("silu", *fused), not capacity
    pixels.conv(
        x, weight, per_output, plan.index, count, source, list(g), finish, None, packed, None, zero_tail
    )
    if grads:
        pixels.conv_input_grad(y, weight, plan.index, count, source, 2 * size * size, list(g), packed)
        pixels.conv_weight_grad(y, x, plan.index, count, source, list(weight.shape), list(g), packed)


def _same_rows(
    dtype: torch.dtype, channels: int = 256, residual: bool = True, capacity: bool = False
) -> None:
    """A 1x1 convolution from a plan's rows to the same rows, and its input gradient."""
    plan, rows = PixelPlan.full((1, 1, 512)), torch.zeros(512, channels, dtype=dtype)
    count = torch.tensor([512], dtype=torch.int32) if capacity else None
    g, weight = list(plan.pointwise(1)), torch.zeros(channels, channels, 1, 1, dtype=dtype)
    finish = Epilogue("silu", *[rows[0]] * 2, None, rows if residual else None)
    x = rows.t()[None, :, None]
    pixels.conv(x, weight, rows[0], plan.index, count, None, g, finish, None, True, None, not capacity, True)
    pixels.conv_input_grad(rows, weight, plan.index, count, None, 0, g, True)


def _filled(dtype: torch.dtype) -> None:
    """The pixels of a large map that are not computed, zero or base, are written beside the convolution."""
    x = torch.zeros(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plan = PixelPlan.full((2, 8, 8))
    with mock.patch.object(rows, "_LARGE", 0):
        for base, count in ((None, None), (x, None), (x, torch.tensor([128], dtype=torch.int32))):
            with rows.filled(x, base, plan.index, count):
                pass


def _rows(dtype: torch.dtype) -> None:
    x, plan = torch.zeros(2, 32, 8, 8, dtype=dtype), PixelPlan.full((2, 8, 8))
    for layout in (torch.contiguous_format, torch.channels_last):
        values = pixels.gather_rows(x.contiguous(memory_format=layout), plan.index, None)
    pixels.scatter_rows(values, plan.index, None, [2, 8, 8], None)
    for base in (None, x):
        rows.scatter_planes(values, plan.index, None, [2, 8, 8], base)
    rows.nearest_pixel(plan.index, None, [2, 8, 8])
    gemm.pack_rows(torch.zeros(8, 8, 3, 3), torch.float32, True)  # a weight for TF32


MANY = 2048  # SMs, so that reductions are split
HALF = (torch.bfloat16,)
FORMS = (
    Form("3x3", _convolution, every_tile=TYPES, vectors=("conv_kernel",)),
    Form("3x3, epilogue", partial(_convolution, epilogue=True)),
    Form("3x3, norm", partial(_convolution, norm=True, grads=False)),
    Form("1x1, norm, residual", partial(_convolution, kernel=1, norm=True, epilogue=True, grads=False)),
    Form("3x3, capacity, packed, norm", partial(_convolution, capacity=True, packed=True, norm=True, grads=False)),
    Form("3x3, ragged, epilogue", partial(_convolution, channels=261, epilogue=True)),
    Form("3x3, packed", partial(_convolution, packed=True)),
    Form("3x3, split, epilogue", partial(_convolution, epilogue=True), processors=MANY),
    Form("3x3, split, packed", partial(_convolution, packed=True), HALF, processors=MANY),
    Form("3x3, capacity", partial(_convolution, capacity=True)),
    Form("3x3, capacity, packed, epilogue", partial(_convolution, capacity=True, packed=True, epilogue=True)),
    Form("3x3, capacity, ragged", partial(_convolution, channels=261, capacity=True, grads=False)),
    Form("3x3, packed, ragged, epilogue", partial(_convolution, channels=261, packed=True, epilogue=True)),
    Form("3x3, 64-bit offsets", wide(_convolution), HALF),
    Form("1x1", partial(_convolution, kernel=1)),
    Form("1x1, packed, epilogue", partial(_convolution, kernel=1, packed=True, epilogue=True)),
    Form("1x1, same rows, epilogue", _same_rows, (torch.bfloat16, torch.float16, torch.float32), vectors=("conv_kernel",)),
    Form("1x1, same rows, capacity", partial(_same_rows, residual=False, capacity=True)),
    Form("1x1, same rows, ragged", partial(_same_rows, channels=261)),
    Form("1x1, same rows, 64-bit offsets", wide(_same_rows), HALF),
    Form("7x7 stride 2 of 3 channels", partial(_convolution, channels=3, outputs=64, kernel=7, stride=2)),
    Form("4x4 stride 2, transposed", partial(_convolution, kernel=4, stride=2, transposed=True, epilogue=True)),
    Form("3x3, float16", _convolution, (torch.float16,)),
    Form("depthwise", partial(_convolution, channels=64, groups=64, epilogue=True), (torch.float16, torch.float32)),
    Form("depthwise, transposed", partial(_convolution, channels=64, kernel=4, stride=2, groups=64, transposed=True), HALF),
    Form("depthwise, packed", partial(_convolution, channels=64, groups=64, packed=True), HALF),
    Form("filled", _filled, (torch.bfloat16, torch.float32)),
    Form("rows", _rows, (torch.uint8, torch.bfloat16, torch.float32, torch.float64)),
    Form("rows, 64-bit offsets", wide(_rows), HALF),
)  # fmt: skip
