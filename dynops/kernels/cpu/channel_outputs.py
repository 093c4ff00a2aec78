"""The C++ kernels of output masks and local filters: prepares memory for ``csrc/cpu/channels``.

Same signatures as the references in ``ops/channel_outputs.py`` and ``ops/channel_filters.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import ConvGeometry, as_geometry
from ...kept import kept
from .pixels import _bf16_dot, _last

_CHANNELS_LAST = torch.channels_last
# Of a pixel's input that lies in the cache at once: 128 float32 channels under a block of 7 x 7 outputs of 3x3
# take 42 KB. Half of it took 1.2 times as long.
_DEPTH_BYTES = 512
# Below this many channels a dot product has nothing to run along.
_MIN_CHANNELS = 16
# The share of the outputs from which the dense convolution is faster, and the products of an output below which
# that share shrinks. Measured: float32 0.22 for 64 products, 0.34 for 288, 0.5 to 0.9 from 576 on; bfloat16
# (where it has an instruction) 0.2 for 256, 0.35 for 576, 0.5 for 1152.
_BREAK_EVEN = 0.5
_FEW_PRODUCTS = {torch.float32: 400, torch.bfloat16: 800, torch.float16: 1}


# -------------------------------------------------------------------------------- output masks


def wins(weight: Tensor, mask: Tensor, g: ConvGeometry) -> bool:
    """Whether computing the selected outputs alone takes less time than the dense convolution."""
    if weight.shape[1] < _MIN_CHANNELS:
        return False
    share = _BREAK_EVEN * min(1.0, weight.shape[1] * g.taps / _FEW_PRODUCTS[weight.dtype])
    return torch.ops.dynops.cpu_count_selected(_dense(mask)) < share * mask.numel()


def _dense(mask: Tensor) -> Tensor:
    """A mask whose elements lie side by side, in either memory format."""
    return mask if mask.is_contiguous(memory_format=_CHANNELS_LAST) else mask.contiguous()


def _packed_weight(weight: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """``[chunks, O, taps, depth]``: the input channels in nearly equal runs, padded with zeros."""

    def make():
        outputs, inputs, *kernel = weight.shape
        most = _DEPTH_BYTES // dtype.itemsize * (2 if math.prod(kernel) == 1 else 1)
        chunks = math.ceil(inputs / most)
        depth = math.ceil(math.ceil(inputs / chunks) / step) * step
        chunks = math.ceil(inputs / depth)
        padded = F.pad(weight.detach().to(dtype), (0, 0, 0, 0, 0, chunks * depth - inputs))
        return padded.view(outputs, chunks, depth, -1).permute(1, 0, 3, 2).contiguous()

    return kept.get(("masked_output", dtype), make, weight)


def conv(x, weight, bias, mask, partial, begin, geometry):
    """See ``ops.channel_outputs._conv``. Accumulates in float32, whatever the dtype."""
    dot = x.dtype == torch.bfloat16 and _bf16_dot()
    packed = _packed_weight(weight, torch.bfloat16 if dot else torch.float32, 32 if dot else 16)
    out = torch.empty(mask.shape, dtype=x.dtype, memory_format=_CHANNELS_LAST, device="cpu")
    partial = None if partial is None else _last(partial)
    torch.ops.dynops.cpu_masked_conv(
        _last(x), packed, bias, mask, partial, begin, weight.shape[1], geometry, out
    )
    return out


# ------------------------------------------------------------------------------- local filters


def _filters(kernels: Tensor) -> Tensor:
    """float32, the filters of a pixel side by side."""
    return kernels.to(torch.float32).contiguous(memory_format=_CHANNELS_LAST)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=_CHANNELS_LAST, device="cpu")


def local_conv(x, kernels, geometry, upsample):
    """See ``ops.channel_filters._conv``."""
    out = _empty(x, *x.shape[:2], *kernels.shape[2:])
    torch.ops.dynops.cpu_local_conv(_last(x), _filters(kernels), upsample, geometry, out)
    return out


def local_conv_input_grad(grad, kernels, geometry, upsample):
    """See ``ops.channel_filters._conv_input_grad``."""
    g = as_geometry(geometry)
    dx = _empty(grad, *grad.shape[:2], g.in_h, g.in_w)
    torch.ops.dynops.cpu_local_conv_input_grad(_last(grad), _filters(kernels), upsample, geometry, dx)
    return dx


def local_conv_kernel_grad(grad, x, geometry, upsample):
    """See ``ops.channel_filters._conv_kernel_grad``."""
    g = as_geometry(geometry)
    out = _empty(grad, grad.shape[0], g.groups * g.taps, *grad.shape[2:])
    torch.ops.dynops.cpu_local_conv_kernel_grad(_last(grad), _last(x), upsample, geometry, out)
    return out
