"""The C++ kernels of the pixel-sparse convolution. Same signatures as the references in ``ops/pixels/conv.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import ConvGeometry, as_geometry
from ..epilogue import Epilogue
from ..layout import contiguous, empty_map
from . import planes, rows
from .engine import (
    ACTIVATIONS,
    CHANNELS_LAST,
    CPP,
    packed_weight,
    quads_of,
    setup_of,
    winograd_weight,
)
from .rows import last

_NO_EPILOGUE = (0, None, None, None, None, None)  # activation to base


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor | None,
    source: Tensor | None,
    geometry,
    epilogue: Epilogue,
    base: Tensor | None,
    to_rows: bool,
    derived=None,
    to_planes: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """See ``ops.pixels.conv._conv``. The output has the format of ``x``.

    Args:
        derived: that of the plan, where there is one.
        into: a channels_last map of the output's size, in which the plan's pixels are written.
        to_planes: makes the output NCHW, whatever ``x`` is.
    """
    g = as_geometry(geometry)
    if into is None and x.dim() == 4 and planes.is_planes(x, g.out_h * g.out_w):  # so is a map of one channel
        return planes.conv(conv, x, weight, bias, index, count, g, epilogue, base, to_rows, derived)
    setup = setup_of(g, weight.shape, x.dtype, source is not None)
    quads = quads_of(index, count, g, derived) if setup.winograd else None
    packed = packed_weight(weight, g, setup, False) if quads is None else winograd_weight(weight, False)
    if into is not None:
        out = base = into
    elif to_rows:
        out = x.new_empty((index.shape[0], setup.out_channels))
    else:
        layout = torch.contiguous_format if to_planes else CHANNELS_LAST
        out = empty_map(x, (g.batch, setup.out_channels, g.out_h, g.out_w), layout)
    if base is not None:
        base = rows.nchw(base) if to_planes else last(base)
    activation, scale, shift, gate, residual = epilogue
    if gate is not None:
        gate = contiguous(gate, torch.float32)
    if residual is not None:
        residual = last(residual)
    finish = ACTIVATIONS[activation], scale, shift, gate, residual, base
    CPP.conv(last(x), packed, bias, index, count, source, g, *finish, setup.merged, quads, out)
    return out


def conv_input_grad(grad, weight, index, count, source, source_rows, geometry, from_rows) -> Tensor:
    """See ``ops.pixels.conv._conv_input_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    setup = setup_of(g, weight.shape, grad.dtype, True)
    if not from_rows and planes.is_planes(grad, g.in_h * g.in_w):
        if source is None:
            return planes.input_grad(conv_input_grad, grad, weight, index, count, g, setup.winograd)
        grad, from_rows = rows.gather(grad, index, count), True
    if setup.winograd and source is None:
        dx = _winograd_input_grad(grad, weight, index, count, g, from_rows)
        if dx is not None:
            return dx
    packed = packed_weight(weight, g, setup, True)
    shape = (g.batch, channels, g.in_h, g.in_w)
    if g.is_pointwise and source is None:  # each input is read once: a 1x1 convolution of the gradient
        if from_rows and not (count is None and grad.shape[0] == g.batch * g.out_h * g.out_w):
            source = torch.ops.dynops.inverse_index(index, count, g.out_shape)
        dx = empty_map(grad, shape, CHANNELS_LAST)
        CPP.conv(last(grad), packed, None, index, count, source, g, *_NO_EPILOGUE, False, None, dx)
        return dx
    # depthwise kernels write every pixel once; the others add up, in float32
    dtype = grad.dtype if setup.depthwise else torch.float32
    if source is not None:
        dx = torch.zeros((source_rows, channels), dtype=dtype, device="cpu")
    else:
        dx = torch.empty(shape, dtype=dtype, memory_format=CHANNELS_LAST, device="cpu")
        dx = dx if setup.depthwise else dx.zero_()
    CPP.conv_input_grad(last(grad), packed, index, count, source, g, dx)
    return dx.to(grad.dtype)


def _winograd_input_grad(grad, weight, index, count, g: ConvGeometry, from_rows: bool) -> Tensor | None:
    """The convolution of the gradient's rows with the turned kernel, at the pixels that any of them reached.

    None where those are too scattered.
    """
    if max(g.pad_h, g.pad_w) > 2 or quads_of(index, count, g) is None:
        return None
    back = g._replace(
        in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w, pad_h=2 - g.pad_h, pad_w=2 - g.pad_w
    )
    reached = torch.ops.dynops.mask_to_index.default(torch.ops.dynops.needed_mask(index, count, g))
    quads = quads_of(reached, None, back)
    if quads is None:
        return None
    source = torch.ops.dynops.inverse_index(index, count, g.out_shape)
    packed_grad = grad.contiguous() if from_rows else rows.gather_rows(grad, index, count)
    dx = empty_map(grad, (g.batch, weight.shape[1], g.in_h, g.in_w), CHANNELS_LAST)
    packed = winograd_weight(weight, True)
    CPP.conv(packed_grad, packed, None, reached, None, source, back, *_NO_EPILOGUE, False, quads, dx)
    return dx


def conv_weight_grad(grad, x, index, count, source, weight_shape, geometry, from_rows, bias=True):
    """See ``ops.pixels.conv._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    grad, x, index, count, source, g = planes.weight_grad_inputs(grad, x, index, count, source, g, from_rows)
    dw = grad.new_empty(weight_shape)
    channels = weight_shape[1] * g.groups if g.transposed else weight_shape[0]
    db = grad.new_empty(channels if bias else 0)
    CPP.conv_weight_grad(last(grad), last(x), index, count, source, g, dw, db if bias else None)
    return dw, db


def max_rows(x: Tensor, index: Tensor, source: Tensor, g: ConvGeometry, zeros: bool) -> Tensor:
    """The maximum over windows, from rows ``[R, C]`` to rows ``[P, C]``; float32 or bfloat16, no gradient.

    Args:
        zeros: pixels of the map without a row are 0; else no window sees them.
    """
    out = x.new_empty((index.shape[0], x.shape[1]))
    CPP.max_rows(x.contiguous(), index, source, g, zeros, out)
    return out
