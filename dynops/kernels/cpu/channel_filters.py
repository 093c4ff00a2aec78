"""The C++ kernels of local filters. Same signatures as the references in ``ops/channels/filters.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import as_geometry
from ..layout import empty_map
from .engine import CHANNELS_LAST, CPP
from .rows import last


def _filters(kernels: Tensor) -> Tensor:
    """float32, the filters of a pixel side by side."""
    return kernels.to(torch.float32).contiguous(memory_format=CHANNELS_LAST)


def conv(x, kernels, geometry, upsample):
    """See ``ops.channels.filters._conv``."""
    out = empty_map(x, (*x.shape[:2], *kernels.shape[2:]), CHANNELS_LAST)
    CPP.local_conv(last(x), _filters(kernels), upsample, geometry, out)
    return out


def conv_input_grad(grad, kernels, geometry, upsample):
    """See ``ops.channels.filters._conv_input_grad``."""
    g = as_geometry(geometry)
    dx = empty_map(grad, (*grad.shape[:2], g.in_h, g.in_w), CHANNELS_LAST)
    CPP.local_conv_input_grad(last(grad), _filters(kernels), upsample, geometry, dx)
    return dx


def conv_kernel_grad(grad, x, geometry, upsample):
    """See ``ops.channels.filters._conv_kernel_grad``."""
    g = as_geometry(geometry)
    out = empty_map(grad, (grad.shape[0], g.groups * g.taps, *grad.shape[2:]), CHANNELS_LAST)
    CPP.local_conv_kernel_grad(last(grad), last(x), upsample, geometry, out)
    return out
