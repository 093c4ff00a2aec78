"""The C++ kernel of convolutions at selected outputs. Same signature as the reference in ``ops/channels/outputs.py``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import ConvGeometry
from ...kept import kept
from ..layout import empty_map
from .engine import CHANNELS_LAST, CPP, bf16_dot
from .rows import last

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


def wins(weight: Tensor, mask: Tensor, g: ConvGeometry) -> bool:
    """True if computing the selected outputs alone takes less time than the dense convolution."""
    if weight.shape[1] < _MIN_CHANNELS:
        return False
    share = _BREAK_EVEN * min(1.0, weight.shape[1] * g.taps / _FEW_PRODUCTS[weight.dtype])
    return CPP.count_selected(_dense(mask)) < share * mask.numel()


def _dense(mask: Tensor) -> Tensor:
    """A mask whose elements lie side by side, in either memory format."""
    return mask if mask.is_contiguous(memory_format=CHANNELS_LAST) else mask.contiguous()


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
    """See ``ops.channels.outputs._conv``. Accumulates in float32, whatever the dtype."""
    dot = x.dtype == torch.bfloat16 and bf16_dot()
    packed = _packed_weight(weight, torch.bfloat16 if dot else torch.float32, 32 if dot else 16)
    out = empty_map(x, mask.shape, CHANNELS_LAST)
    partial = None if partial is None else last(partial)
    CPP.masked_conv(last(x), packed, bias, mask, partial, begin, weight.shape[1], geometry, out)
    return out
