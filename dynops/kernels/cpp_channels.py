"""The C++ channel kernels for CPU tensors: prepares memory for ``csrc/cpu``.

Same signatures as the references in ``ops/channels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..geometry import as_geometry
from .layout import memory_format_of

_CHANNELS_LAST = torch.channels_last

if backends.has_binary():  # the overloads themselves: looking one up costs 0.6 us a call
    _cpu_weight_grad = torch.ops.dynops.cpu_channel_weight_grad.default
    _cpu_gather = torch.ops.dynops.cpu_gather_channels.default
    _cpu_scatter = torch.ops.dynops.cpu_scatter_channels.default


def conv_weight_grad(
    grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, packed_in, packed_out, bias
):  # fmt: skip
    """See ``ops.channels._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    grad, x = (t.contiguous(memory_format=_CHANNELS_LAST) for t in (grad, x))
    dw = grad.new_empty(weight_shape)
    db = grad.new_empty(weight_shape[0] if bias else 0)
    lists = (in_index, in_count, out_index, out_count)
    g = as_geometry(geometry)
    _cpu_weight_grad(grad, x, *lists, g, heads, packed_in, packed_out, dw, db if bias else None)
    return dw, db


def gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """See ``ops.channels._gather``."""
    layout = memory_format_of(x)
    out = torch.empty((x.shape[0], width, *x.shape[2:]), dtype=x.dtype, memory_format=layout)
    _cpu_gather(x.contiguous(memory_format=layout), index, count, layout == _CHANNELS_LAST, out)
    return out


def scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """See ``ops.channels._scatter``."""
    layout = memory_format_of(packed)
    out = torch.empty(
        (packed.shape[0], channels, *packed.shape[2:]), dtype=packed.dtype, memory_format=layout
    )
    base = None if base is None else base.contiguous(memory_format=layout)
    packed = packed.contiguous(memory_format=layout)
    _cpu_scatter(packed, index, count, base, layout == _CHANNELS_LAST, out)
    return out
