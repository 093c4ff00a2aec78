"""A stack of convolutions on some samples of a batch, for inference: what is faster than calling the module.

Two ways. On rows, at the pixels of those samples, where they lie: nothing is gathered, as the first convolution reads the
map, and nothing is scattered, as the last one writes into the output, the residual sum and the samples that were skipped
included. Or folded, on the gathered samples, with norms in the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import gather_samples, scatter_samples
from ..plans import SamplePlan
from .bound import Bound
from .folded import folds, run_folded
from .rows import autocast_dtype, run_rows


class _Residual(nn.Module):
    """What is traced of a residual layer, so that the sum belongs to the last convolution."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class SampleStack:
    """``module(x)``, or with mode "residual" ``x + module(x)``, for the samples of a plan; the others stay as they are."""

    def __init__(self, module: nn.Module, mode: str):
        self.module, self.mode = module, mode
        self.bound: Bound | None = None
        try:
            bound = Bound(_Residual(module) if mode == "residual" else module)
        except (TypeError, AttributeError):  # cannot be traced, or is no module
            return
        if bound.rows and bound.stack.layers:
            self.bound = bound

    def holds(self, module: nn.Module, mode: str) -> bool:
        """Whether this is still what was traced."""
        same = module is self.module and mode == self.mode
        return same and (self.bound is None or self.bound.holds(self.bound.module))

    def path(self, x: Any, wanted: str | None) -> str | None:
        """How ``x`` runs: "rows", "folded", or None: the module is called. ``wanted``: "rows", or None for the fastest."""
        if self.bound is None or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return None
        try:
            self.bound.check_mode()
        except TypeError:  # a norm or dropout in training mode, a hook
            return None
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        if self.bound.output_shape(in_shape) != in_shape:
            return None
        if wanted == "rows":
            return "rows"
        if backends.choose(None, x.device, x.dtype) == "cpp" and self.bound.beats_dense(x, in_shape):
            return "rows"
        # narrower weights would be rounded once more
        plain = x.dtype in (torch.float32, torch.float64) and autocast_dtype(x) is None
        return "folded" if plain and folds(self.bound.stack) else None

    def run(self, path: str, x: Tensor, plan: SamplePlan) -> Tensor:
        if path == "folded":
            if plan.is_full:
                return run_folded(self.bound.stack, x)
            return scatter_samples(run_folded(self.bound.stack, gather_samples(x, plan)), plan, x)
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        base = None if plan.is_full else x
        return run_rows(self.bound.stack, self.bound.geometries(in_shape), x, plan.pixels(in_shape[1:]), base)
