"""Counts of a fixed size on a device, for each class and for what has none."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 100  # of the rates of single calls


class Tally:
    """Counts open gates. Slot C of ``[C + 1]`` is that of samples without a class."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        self.open = torch.zeros(classes + 1, dtype=torch.int64, device=device)
        self.all = torch.zeros(classes + 1, dtype=torch.int64, device=device)
        self.calls = torch.zeros(_BINS + 1, dtype=torch.int64, device=device)

    def add(self, is_open: Tensor, each: int, classes: Tensor | None) -> None:
        """``is_open``: int64 ``[n]``, of a row's ``each`` gates; ``classes``: int64 ``[n]``, or None."""
        if classes is None or self.classes == 0:
            self.open[-1] += is_open.sum()
            self.all[-1] += each * len(is_open)
        else:
            self.open.index_add_(0, classes, is_open)
            self.all.index_add_(0, classes, torch.full_like(is_open, each))
        rate = is_open.sum() * _BINS / max(each * len(is_open), 1)
        at = rate.round().long().reshape(1)
        self.calls.index_add_(0, at, torch.ones_like(at))

    def read(self) -> dict:
        open_, all_, calls = self.open.tolist(), self.all.tolist(), self.calls.cpu()
        return {
            "rate": sum(open_) / max(sum(all_), 1),
            "calls": int(calls.sum()),
            "p50": _quantile(calls, 0.5),
            "p99": _quantile(calls, 0.99),
            "classes": [o / a if a else None for o, a in zip(open_[:-1], all_[:-1], strict=True)],
        }


def _quantile(counts: Tensor, share: float) -> float:
    """The least rate that at least this share of the calls does not exceed."""
    cumulative = counts.cumsum(0)
    return int((cumulative < share * int(cumulative[-1])).sum()) / _BINS


class Histogram:
    """Counts each of 0 … bins - 1 for each class; other values (dropped choices) do not count."""

    def __init__(self, classes: int, bins: int, device: torch.device):
        self.classes, self.bins = classes, bins
        self.counts = torch.zeros((classes + 1) * (bins + 1), dtype=torch.int64, device=device)

    def add(self, values: Tensor, classes: Tensor | None) -> None:
        """``values``: ints ``[n, K]``; ``classes``: int64 ``[n]``, or None."""
        values = values.long()
        values = torch.where((values < 0) | (values >= self.bins), self.bins, values)
        row = self.classes if classes is None or self.classes == 0 else classes[:, None]
        slots = (row * (self.bins + 1) + values).flatten()
        self.counts.index_add_(0, slots, torch.ones_like(slots))

    def read(self) -> dict:
        table = self.counts.cpu().view(self.classes + 1, self.bins + 1)[:, :-1]
        counts = table.sum(0)
        mean = (counts * torch.arange(self.bins, device="cpu")).sum() / counts.sum().clamp(min=1)
        return {"counts": counts.tolist(), "mean": float(mean), "classes": table[:-1].tolist()}
