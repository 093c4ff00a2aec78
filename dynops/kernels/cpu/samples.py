"""The C++ copies of whole samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_map
from .engine import CPP


def gather(x: Tensor, index: Tensor, count: Tensor | None, layout: torch.memory_format) -> Tensor:
    """``[N, ...]`` to ``[K, ...]``, both in ``layout``; samples past the count are zero."""
    out = empty_map(x, (index.shape[0], *x.shape[1:]), layout)
    CPP.gather_samples(x.contiguous(memory_format=layout), index, count, out)
    return out


def scatter(
    rows: Tensor, index: Tensor, count: Tensor | None, batch: int, base: Tensor | None, layout
) -> Tensor:
    """``[K, ...]`` to ``[N, ...]``, both in ``layout``; elsewhere ``base``, or zero."""
    out = empty_map(rows, (batch, *rows.shape[1:]), layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    CPP.scatter_samples(rows.contiguous(memory_format=layout), index, count, base, out)
    return out
