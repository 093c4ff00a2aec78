"""The C++ kernels of the channel ops: prepares memory for ``csrc/cpu/channels``.

Same signatures as the references in ``ops/channels.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import backends
from ...geometry import ConvGeometry, as_geometry
from ..layout import memory_format_of
from . import pixels as cpp
from .pixels import _last

if backends.has_binary():
    _cpu_conv = torch.ops.dynops.cpu_channel_conv.default
    _cpu_weight_grad = torch.ops.dynops.cpu_channel_weight_grad.default
    _cpu_gather = torch.ops.dynops.cpu_gather_channels.default
    _cpu_scatter = torch.ops.dynops.cpu_scatter_channels.default


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


def _takes_winograd(g: ConvGeometry, weight: Tensor, heads: int, in_count, out_count) -> bool:
    """Whether a sample runs as Winograd's F(2x2, 3x3): on maps of 100 pixels and lists of some length."""
    fits = heads == 1 and g.out_h * g.out_w >= 100 and cpp.takes_winograd(g, weight.shape, weight.dtype)
    return fits and all(  # counted last: it takes 4 us
        _live(count, weight.shape[i]) >= cpp._WINOGRAD_CHANNELS
        for i, count in ((1, in_count), (0, out_count))
    )


def conv(x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, activation, scale, base, packed_in, out_width):  # fmt: skip
    """See ``ops.channels._conv``."""
    g = as_geometry(geometry)
    outputs, channels = weight.shape[0], weight.shape[1] * g.groups
    setup = cpp._setup(g, weight.shape, x.dtype, in_index is not None)
    winograd = _takes_winograd(g, weight, heads, in_count, out_count)
    headed = g if heads == 1 else g._replace(groups=heads)
    packed = (
        cpp._winograd_weight(weight, False) if winograd else cpp._packed_weight(weight, headed, setup, False)
    )
    shape = (g.batch, outputs if out_width < 0 else out_width, g.out_h, g.out_w)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last, device="cpu")
    _cpu_conv(
        _last(x),
        packed,
        bias,
        in_index,
        in_count,
        out_index,
        out_count,
        g,
        channels,
        outputs,
        heads,
        False,
        cpp._ACTIVATIONS[activation],
        None if scale is None else scale.to(torch.float32).contiguous(),
        None if base is None else _last(base),
        packed_in,
        out_width >= 0,
        setup.merged and not winograd,
        False,
        winograd,
        out,
    )
    return out


def conv_input_grad(
    grad, weight, in_index, in_count, out_index, out_count, geometry, heads, in_width, packed_out
):
    """See ``ops.channels._conv_input_grad``."""
    g = as_geometry(geometry)
    if heads > 1 and grad.dtype != torch.float32:  # heads are summed: in float32
        arguments = (in_index, in_count, out_index, out_count, geometry, heads, in_width, packed_out)
        return conv_input_grad(grad.float(), weight.float(), *arguments).to(grad.dtype)
    outputs, channels = weight.shape[0], weight.shape[1] * g.groups
    setup = cpp._setup(g, weight.shape, grad.dtype, True)
    back, turned = _backward_geometry(g)
    winograd = _takes_winograd(back, weight, heads, in_count, out_count)
    headed = g if heads == 1 else g._replace(groups=heads)
    packed = (
        cpp._winograd_weight(weight, True) if winograd else cpp._packed_weight(weight, headed, setup, True)
    )
    shape = (g.batch, channels if in_width < 0 else in_width, g.in_h, g.in_w)
    dx = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last, device="cpu")
    _cpu_conv(
        _last(grad),
        packed,
        None,
        out_index,
        out_count,
        in_index,
        in_count,
        back,
        outputs,
        channels,
        heads,
        True,
        0,
        None,
        None,
        packed_out,
        in_width >= 0,
        False,
        turned and not winograd,
        winograd,
        dx,
    )
    return dx


def conv_weight_grad(
    grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, packed_in, packed_out, bias
):  # fmt: skip
    """See ``ops.channels._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    dw = grad.new_empty(weight_shape)
    db = grad.new_empty(weight_shape[0] if bias else 0)
    lists = (in_index, in_count, out_index, out_count)
    g = as_geometry(geometry)
    _cpu_weight_grad(_last(grad), _last(x), *lists, g, heads, packed_in, packed_out, dw, db if bias else None)
    return dw, db


def gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """See ``ops.channels._gather``."""
    layout = memory_format_of(x)
    out = torch.empty((x.shape[0], width, *x.shape[2:]), dtype=x.dtype, memory_format=layout, device="cpu")
    _cpu_gather(x.contiguous(memory_format=layout), index, count, layout == torch.channels_last, out)
    return out


def scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """See ``ops.channels._scatter``."""
    layout = memory_format_of(packed)
    shape = (packed.shape[0], channels, *packed.shape[2:])
    out = torch.empty(shape, dtype=packed.dtype, memory_format=layout, device="cpu")
    base = None if base is None else base.contiguous(memory_format=layout)
    packed = packed.contiguous(memory_format=layout)
    _cpu_scatter(packed, index, count, base, layout == torch.channels_last, out)
    return out
