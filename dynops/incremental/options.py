"""The arguments of a stream."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor


class Options:
    """The arguments of a stream, checked."""

    def __init__(self, spread, threshold, relative, block, statistics, attention, keep):
        self.given = {
            "spread": spread, "threshold": threshold, "relative": relative, "block": block,
            "statistics": statistics, "attention": attention, "keep": keep,
        }  # fmt: skip
        if spread != "exact" and (type(spread) is not int or spread < 0):
            raise ValueError(f"spread: expected 'exact' or an int >= 0, got {spread!r}")
        for name in ("statistics", "attention"):
            if self.given[name] not in ("exact", "kept"):
                raise ValueError(f"{name}: expected 'exact' or 'kept', got {self.given[name]!r}")
        for value in threshold.values() if isinstance(threshold, Mapping) else [threshold]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"threshold: expected numbers >= 0, got {value!r}")
        if keep is not None and not callable(keep) and not isinstance(keep, (list, tuple)):
            raise TypeError(f"keep: expected a function, a list of patterns or None, got {keep!r}")
        pair = (block, block) if type(block) is int else block
        if pair is not None:
            pairs = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not pairs or not all(type(b) is int and b >= 1 for b in pair):
                raise ValueError(f"block: expected an int >= 1 or a pair of them, got {block!r}")
        self.spread, self.threshold, self.relative = spread, threshold, bool(relative)
        self.block, self.statistics, self.attention, self.keep = pair, statistics, attention, keep
        self.device = torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def threshold_of(self, name: str, leaves=()) -> float:
        """The threshold of a step, or of the input."""
        value = self.threshold
        if isinstance(value, Mapping):
            value = next((v for pattern, v in value.items() if fnmatch.fnmatch(name, pattern)), 0.0)
        if value and self.relative:
            maps = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
            return value * float(maps[0].float().square().mean().sqrt()) if maps else value
        return float(value)

    def keeps(self, value) -> bool:
        if self.keep is None or value.returned or value.axes is None or value.step.rule.compares:
            return True
        label, size = value.step.label, value.shape.numel() * value.dtype.itemsize
        if callable(self.keep):
            return bool(self.keep(label, size))
        return any(fnmatch.fnmatch(label, pattern) for pattern in self.keep)
