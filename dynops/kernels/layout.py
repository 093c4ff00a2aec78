"""The memory format of maps, for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that an output in the format of ``x`` [N, C, H, W] has."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    # one channel, or one pixel, is contiguous both ways: then only the strides tell
    if x.is_contiguous() and not (x.stride(1) == 1 and x.stride(3) == x.shape[1]):
        return torch.contiguous_format
    return torch.channels_last
