"""The C++ copies of pixels: maps of any strides to rows and back.

The functions that ops name have the signatures of the references in ``ops/pixels/rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import contiguous, empty_map
from .engine import CHANNELS_LAST, CPP


def gather_rows(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """See ``ops.pixels.rows._gather_rows``."""
    if not x.is_contiguous(memory_format=CHANNELS_LAST):
        return gather(x, index, count)
    out = x.new_empty((index.shape[0], x.shape[1]))
    CPP.gather(x, index, count, out)
    return out


def gather(x: Tensor, index: Tensor | None, count: Tensor | None) -> Tensor:
    """``[N, C, H, W]`` of any strides to rows ``[P, C]``; without an index those of all pixels."""
    rows = x.shape[0] * x.shape[2] * x.shape[3] if index is None else index.shape[0]
    out = torch.empty((rows, x.shape[1]), dtype=x.dtype, device="cpu")
    CPP.gather_planes(x, index, count, out)
    return out


def scatter_rows(rows: Tensor, index: Tensor, count: Tensor | None, shape, base: Tensor | None) -> Tensor:
    """See ``ops.pixels.rows._scatter_rows``."""
    out = empty_map(rows, (shape[0], rows.shape[1], shape[1], shape[2]), CHANNELS_LAST)
    CPP.scatter(rows.contiguous(), index, count, None if base is None else last(base), out)
    return out


def scatter_planes(rows: Tensor, index: Tensor, count: Tensor | None, shape, base: Tensor | None) -> Tensor:
    """See ``ops.pixels.rows._scatter_planes``."""
    if shape[1] * shape[2] == 1:  # a pixel's row is its planes
        return scatter_rows(rows, index, count, shape, base)
    return scatter(rows, index, count, shape, base)


def scatter(rows: Tensor, index: Tensor | None, count: Tensor | None, shape, base: Tensor | None) -> Tensor:
    """Rows ``[P, C]`` to NCHW for ``shape`` ``(N, H, W)``; without an index those of all pixels."""
    out = empty_map(rows, (shape[0], rows.shape[1], shape[1], shape[2]), torch.contiguous_format)
    CPP.scatter_planes(rows.contiguous(), index, count, None if base is None else nchw(base), out)
    return out


def keep_pixels(out: Tensor, index: Tensor, count: Tensor | None, base: Tensor | None) -> Tensor:
    """``out``, channels_last, with ``base`` (or zero) written at the pixels that are not in the index."""
    CPP.keep(index, count, None if base is None else last(base), out)
    return out


def merge_rows(
    rows: Tensor, index: Tensor, count: Tensor | None, base: Tensor, scale: Tensor | None, mix: bool
) -> Tensor:
    """See ``ops.pixels.rows._merge_rows``. float32, bfloat16 and float16."""
    out = torch.empty(base.shape, dtype=base.dtype, device="cpu")
    scale = contiguous(scale, torch.float32)
    CPP.merge(rows.contiguous(), index, count, base.contiguous(), scale, mix, out)
    return out


# --------------------------------------------------------------------------------- memory formats


def last(x: Tensor) -> Tensor:
    """A map in channels_last, rows contiguous."""
    if x.dim() != 4:
        return x.contiguous()
    return x if x.is_contiguous(memory_format=CHANNELS_LAST) else channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """A copy of a map in channels_last."""
    n, c, h, w = x.shape
    return gather(x, None, None).view(n, h, w, c).permute(0, 3, 1, 2)


def nchw(x: Tensor) -> Tensor:
    """A map in NCHW."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=CHANNELS_LAST):
        return planes(x)
    return x.contiguous()


def planes(x: Tensor) -> Tensor:
    """A copy of a channels_last map in NCHW."""
    n, c, h, w = x.shape
    return scatter(x.permute(0, 2, 3, 1).reshape(-1, c), None, None, (n, h, w), None)
