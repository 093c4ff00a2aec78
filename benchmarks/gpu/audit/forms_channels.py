"""The forms of the kernels over channels: convolutions on live channels, and channels moved by their lists."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from dynops import ChannelPlan
from dynops.geometry import ConvGeometry
from dynops.kernels.lists import Lists
from dynops.kernels.triton import channel_filters, channels, sample_conv
from dynops.kernels.triton.channel_lists import channel_index

from .launches import Form, wide


def _convolution(
    dtype: torch.dtype,
    width: int = 256,
    size: int = 28,
    batch: int = 8,
    kernel: int = 1,
    groups: int = 1,
    heads: int = 1,
    shared: bool = False,
    packed: bool = False,
    epilogue: bool = False,
    grads: bool = True,
) -> None:
    """A convolution and its gradients, with lists of each sample's own, or ``shared``.

    ``packed``: live channels in and out. ``epilogue``: everything that can be fused. Small maps of many samples
    are not worth compact copies: channels are then taken through lists.
    """
    g = ConvGeometry(
        batch, size, size, size, size, kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1, groups, 0
    )
    x = torch.zeros(batch, width, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(width, width // groups, kernel, kernel, dtype=dtype)
    lead = () if shared else (batch,)
    ins = ChannelPlan.from_mask(torch.ones((*lead, width) if heads == 1 else (*lead, heads, width)))
    outs = ChannelPlan.from_mask(torch.ones(*lead, width))
    lists = Lists(ins.index, ins.count, outs.index, outs.count)
    fused = (torch.zeros(batch, width, dtype=dtype), None if packed else x) if epilogue else (None, None)
    columns = width if packed else -1
    channels.conv(x, weight, weight[:, 0, 0, 0], lists, list(g), heads, "silu", *fused, packed, columns)
    if grads:
        channels.conv_input_grad(x, weight, lists, list(g), heads, columns, packed)
        channels.conv_weight_grad(x, x, lists, list(weight.shape), list(g), heads, packed, packed, True)


def _own(dtype: torch.dtype, width: int = 256, groups: int = 1, regions: int = 0, each: bool = True) -> None:
    """A 3x3 convolution and its gradients with weights of each sample, or of ``regions``, of ``each`` sample or of all."""
    g = list(ConvGeometry(8, 28, 28, 28, 28, 3, 3, 1, 1, 1, 1, 1, 1, groups, 0))
    x = torch.zeros(8, width, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
    lead = (8 if each else 1), max(1, regions)
    region = torch.zeros(8, 28, 28, dtype=torch.int32) if regions else None
    # its input channels side by side
    weight = torch.zeros(*lead, width, 3, 3, width // groups, dtype=dtype).permute(0, 1, 2, 5, 3, 4)
    with mock.patch.object(torch, "empty_like", torch.zeros_like):  # a recorded launch writes no keys
        sample_conv.conv(x, weight, torch.zeros(*lead, width, dtype=dtype), region, g, "silu")
        sample_conv.conv_input_grad(x, weight, region, g)
        sample_conv.conv_weight_grad(x, x, region, list(weight.shape), g, True)


def _local(dtype: torch.dtype, width: int = 64, groups: int = 4, upsample: int = 1) -> None:
    """Filters of pixels, in both memory formats, and the gradients."""
    g = list(ConvGeometry(2, 28, 28, 28, 28, 3, 3, 1, 1, 1, 1, 1, 1, groups, 0))
    x, dy = (torch.zeros(2, width, s, s, dtype=dtype).contiguous(memory_format=torch.channels_last) for s in (28, 28 * upsample))  # fmt: skip
    for layout in (torch.channels_last, torch.contiguous_format):
        kernels = torch.zeros(2, groups * 9, 28 * upsample, 28 * upsample, dtype=dtype)
        kernels = kernels.contiguous(memory_format=layout)
        channel_filters.conv(x, kernels, g, upsample)
        channel_filters.conv_input_grad(dy, kernels, g, upsample)
        channel_filters.conv_kernel_grad(dy.contiguous(memory_format=layout), x, g, upsample)


def _moved(dtype: torch.dtype) -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.zeros(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=layout)
        plan = ChannelPlan.from_mask(torch.ones(2, 64))
        packed = channels.gather(x, plan.index, plan.count, 64)
        channels.scatter(packed, plan.index, plan.count, 64, x)
        channels.scatter(packed, plan.index, plan.count, 64, None)


def _plans(dtype: torch.dtype) -> None:
    for width in (64, 261):
        channel_index(torch.ones(4, width, dtype=dtype), 64)


LISTED = {"size": 7, "batch": 64}  # maps too small for compact copies
HALF = (torch.bfloat16,)
FORMS = (
    Form("3x3, compact", partial(_convolution, kernel=3), every_tile=HALF, vectors=("conv_kernel",)),
    Form("1x1, listed", partial(_convolution, **LISTED)),
    Form("1x1, listed, packed, ragged, epilogue", partial(_convolution, width=261, packed=True, epilogue=True, grads=False, **LISTED)),
    Form("1x1, listed, ragged, epilogue", partial(_convolution, width=261, epilogue=True, grads=False, **LISTED)),
    Form("3x3, x compact", partial(_convolution, kernel=3, **LISTED), HALF),
    Form("3x3, two groups", partial(_convolution, width=64, kernel=3, groups=2), HALF),
    Form("3x3, two heads", partial(_convolution, width=64, kernel=3, heads=2), HALF),
    Form("3x3, shared lists", partial(_convolution, kernel=3, shared=True, epilogue=True), HALF),
    Form("3x3, float16", partial(_convolution, kernel=3), (torch.float16,)),
    Form("3x3, 64-bit offsets", wide(partial(_convolution, kernel=3)), HALF),
    Form("depthwise", partial(_convolution, width=64, kernel=3, groups=64, epilogue=True), (torch.float16, torch.float32)),
    Form("depthwise, packed", partial(_convolution, width=64, kernel=3, groups=64, packed=True), HALF),
    Form("own weights", _own, every_tile=HALF, vectors=("conv_kernel",)),
    Form("own weights, ragged", partial(_own, width=261)),
    Form("own weights, 64-bit offsets", wide(_own), HALF),
    Form("own weights, depthwise", partial(_own, width=64, groups=64)),
    Form("regions", partial(_own, regions=4, each=False), vectors=("conv_kernel",)),
    Form("regions of samples", partial(_own, regions=40), HALF),
    Form("regions, ragged", partial(_own, width=261, regions=4)),
    Form("regions, depthwise", partial(_own, width=64, groups=64, regions=4)),
    Form("filters of pixels", _local, vectors=("local_conv_kernel",)),
    Form("filters of pixels, upsampled, ragged", partial(_local, width=63, groups=1, upsample=2), HALF),
    Form("filters of pixels, 64-bit offsets", wide(_local), HALF),
    Form("plans", _plans, (torch.bool, torch.uint8, torch.float32)),
    Form("moved", _moved),
    Form("moved, 64-bit offsets", wide(_moved), HALF),
)  # fmt: skip
