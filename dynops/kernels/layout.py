"""The memory format of maps, for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import modes


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format that an output in the format of ``x`` [N, C, H, W] has."""
    try:
        if torch.compiler.is_compiling():  # torch 2.11 says no where it would need a guard
            last = _is_channels_last(x)
        else:
            last = x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # under vmap, where a tensor has no such thing
        return torch.contiguous_format
    if not last:
        return torch.contiguous_format
    # one channel, or one pixel, is contiguous both ways: then only the strides tell
    if x.is_contiguous() and not (x.stride(1) == 1 and x.stride(3) == x.shape[1]):
        return torch.contiguous_format
    return torch.channels_last


def _is_channels_last(x: Tensor) -> bool:
    n, c, h, w = x.shape
    strides = zip(x.shape, x.stride(), (c * h * w, 1, c * w, c), strict=True)
    return all(size == 1 or stride == expected for size, stride, expected in strides)


def in_format(out: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``out`` in a memory format; under vmap, where a tensor or its tangent has none, as it is."""
    return out if modes.vmapped() else out.contiguous(memory_format=memory_format)


def in_format_of(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the memory format of ``x``."""
    return in_format(out, memory_format_of(x))


def empty_map(like: Tensor, shape: tuple, memory_format: torch.memory_format | None = None) -> Tensor:
    """An uninitialised map of the dtype and device of ``like``, by default in its memory format too."""
    layout = memory_format_of(like) if memory_format is None else memory_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def contiguous(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """An optional tensor, contiguous and of a dtype."""
    if t is None:
        return None
    same = dtype is None or t.dtype == dtype  # asking takes 0.1 us, to() 0.8
    return (t if same else t.to(dtype)).contiguous()
