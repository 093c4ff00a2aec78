"""The C++ kernels of output masks and local filters for CPU tensors.

Same signatures as the references in ``ops/channel_outputs.py`` and ``ops/channel_filters.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..geometry import ConvGeometry, as_geometry


def wins(weight: Tensor, mask: Tensor, g: ConvGeometry) -> bool:
    """Whether the selected outputs alone take less time than the dense convolution."""
    return False


def conv(x, weight, bias, mask, partial, begin, geometry):
    """See ``ops.channel_outputs._conv``."""
    raise NotImplementedError


def local_conv(x, kernels, geometry, upsample):
    """See ``ops.channel_filters._conv``."""
    raise NotImplementedError


def local_conv_input_grad(grad, kernels, geometry, upsample):
    """See ``ops.channel_filters._conv_input_grad``."""
    raise NotImplementedError


def local_conv_kernel_grad(grad, x, geometry, upsample):
    """See ``ops.channel_filters._conv_kernel_grad``."""
    raise NotImplementedError
