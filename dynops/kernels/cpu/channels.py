"""The C++ kernels of convolutions on live channels, and the copies of channels.

Same signatures as the references in ``ops/channels/conv.py`` and ``ops/channels/rows.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...geometry import ConvGeometry, as_geometry
from ..layout import contiguous, empty_map, memory_format_of
from ..lists import Lists
from .engine import (
    ACTIVATIONS,
    CHANNELS_LAST,
    CPP,
    WINOGRAD_CHANNELS,
    packed_weight,
    setup_of,
    takes_winograd,
    winograd_weight,
)
from .rows import last


@functools.lru_cache(maxsize=4096)
def _backward_geometry(g: ConvGeometry) -> tuple[ConvGeometry, bool]:
    """The input gradient as a convolution of the output's, and whether the taps meet the weight in reverse.

    With stride 1 it is one; else it is a transposed one.
    """
    back = g._replace(in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w)
    if g.stride_h > 1 or g.stride_w > 1:
        return back._replace(transposed=1), False
    pads = {"pad_h": g.dil_h * (g.kernel_h - 1) - g.pad_h, "pad_w": g.dil_w * (g.kernel_w - 1) - g.pad_w}
    return back._replace(**pads), True


def _live(count: Tensor | None, channels: int) -> float:
    """The mean number of live channels of a list."""
    return channels if count is None else int(count.sum()) / max(count.numel(), 1)


def _takes_winograd(g: ConvGeometry, weight: Tensor, heads: int, lists: Lists) -> bool:
    """True if a sample runs as Winograd's F(2x2, 3x3): on maps of 100 pixels and lists of some length."""
    fits = heads == 1 and g.out_h * g.out_w >= 100 and takes_winograd(g, weight.shape, weight.dtype)
    return fits and all(  # counted last: it takes 4 us
        _live(count, weight.shape[i]) >= WINOGRAD_CHANNELS
        for i, count in ((1, lists.in_count), (0, lists.out_count))
    )


def _packed(weight: Tensor, g: ConvGeometry, heads: int, setup, winograd: bool, input_grad: bool) -> Tensor:
    if winograd:
        return winograd_weight(weight, input_grad)
    return packed_weight(weight, g if heads == 1 else g._replace(groups=heads), setup, input_grad)


def conv(
    x, weight, bias, lists: Lists, geometry, heads, activation, scale, base, packed_in, out_width
) -> Tensor:
    """See ``ops.channels.conv._conv``."""
    g = as_geometry(geometry)
    outputs, channels = weight.shape[0], weight.shape[1] * g.groups
    setup = setup_of(g, weight.shape, x.dtype, lists.in_index is not None)
    winograd = _takes_winograd(g, weight, heads, lists)
    packed = _packed(weight, g, heads, setup, winograd, False)
    out = empty_map(x, (g.batch, outputs if out_width < 0 else out_width, g.out_h, g.out_w), CHANNELS_LAST)
    base = None if base is None else last(base)
    finish = ACTIVATIONS[activation], contiguous(scale, torch.float32), base
    reads = packed_in, out_width >= 0, setup.merged and not winograd, False
    CPP.channel_conv(last(x), packed, bias, *lists, g, channels, outputs, heads, False, *finish, *reads, winograd, out)  # fmt: skip
    return out


def conv_input_grad(grad, weight, lists: Lists, geometry, heads, in_width, packed_out) -> Tensor:
    """See ``ops.channels.conv._conv_input_grad``."""
    g = as_geometry(geometry)
    if heads > 1 and grad.dtype != torch.float32:  # heads are summed: in float32
        wide = grad.float(), weight.float()
        return conv_input_grad(*wide, lists, geometry, heads, in_width, packed_out).to(grad.dtype)
    outputs, channels = weight.shape[0], weight.shape[1] * g.groups
    setup = setup_of(g, weight.shape, grad.dtype, True)
    back, turned = _backward_geometry(g)
    winograd = _takes_winograd(back, weight, heads, lists)
    packed = _packed(weight, g, heads, setup, winograd, True)
    dx = empty_map(grad, (g.batch, channels if in_width < 0 else in_width, g.in_h, g.in_w), CHANNELS_LAST)
    finish = ACTIVATIONS[""], None, None
    reads = packed_out, in_width >= 0, False, turned and not winograd
    CPP.channel_conv(last(grad), packed, None, *lists.outs, *lists.ins, back, outputs, channels, heads, True, *finish, *reads, winograd, dx)  # fmt: skip
    return dx


def conv_weight_grad(grad, x, lists: Lists, weight_shape, geometry, heads, packed_in, packed_out, bias):
    """See ``ops.channels.conv._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    dw = grad.new_empty(weight_shape)
    db = grad.new_empty(weight_shape[0] if bias else 0)
    g = as_geometry(geometry)
    CPP.channel_weight_grad(
        last(grad), last(x), *lists, g, heads, packed_in, packed_out, dw, db if bias else None
    )
    return dw, db


def gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """See ``ops.channels.rows._gather``."""
    layout = memory_format_of(x)
    out = empty_map(x, (x.shape[0], width, *x.shape[2:]), layout)
    CPP.gather_channels(x.contiguous(memory_format=layout), index, count, layout == CHANNELS_LAST, out)
    return out


def scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """See ``ops.channels.rows._scatter``."""
    layout = memory_format_of(packed)
    out = empty_map(packed, (packed.shape[0], channels, *packed.shape[2:]), layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    packed = packed.contiguous(memory_format=layout)
    CPP.scatter_channels(packed, index, count, base, layout == CHANNELS_LAST, out)
    return out
