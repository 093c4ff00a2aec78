"""A layer of SwiGLU experts in PyTorch alone, as one writes it without a library. Ours is compared with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The pairs of ``index`` [T, K] sorted by expert, int64 ``[T*K]``, and the end of each expert's, int32 ``[E]``.

    Nothing waits for the device, unlike ``torch.bincount``: a CUDA graph can capture it.
    """
    expert, order = index.flatten().sort()
    ends = torch.searchsorted(expert, torch.arange(experts, device=index.device), right=True)
    return order, ends.to(torch.int32)


def grouped(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """torch's grouped_mm, sorting and summing included: ``x`` [T, H], ``index`` and ``weight`` [T, K], ``up`` [E, 2I, H],
    ``down`` [E, H, I] to ``[T, H]``.
    """
    order, ends = by_expert(index, len(up))
    gate, value = F.grouped_mm(x[order // index.shape[1]], up.mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, down.mT, offs=ends)
    out = torch.empty_like(rows)
    out[order] = rows * weight.flatten()[order, None]
    return out.view(*index.shape, -1).sum(1)


def loop(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A loop over the experts that have tokens; arguments as of :func:`grouped`."""
    out = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, value = (x[token] @ up[expert].T).chunk(2, -1)
        rows = (F.silu(gate) * value) @ down[expert].T
        out.index_add_(0, token, rows * weight[token, slot, None])
    return out
