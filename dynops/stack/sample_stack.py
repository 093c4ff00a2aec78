"""A stack of convolutions on some samples of a batch, or on all, for inference: faster than calling the module.

It runs in one of two ways. "rows" works at the pixels of those samples, where they lie. Nothing is gathered, as the first
convolution reads the map. Nothing is scattered, as the last one writes the output, with the residual sum and the samples
that were skipped. "folded" works on the gathered samples, with the norms in the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, context
from ..modes import autocast_dtype
from ..ops import gather_samples, scatter_samples
from ..plans import SamplePlan
from .activations import ELEMENTWISE
from .graph import KINDS
from .trace import dense_type
from .traced import Traced

_LAYERS = (*KINDS, *ELEMENTWISE, nn.Identity, nn.Dropout, nn.Dropout2d)


class _Residual(nn.Module):
    """A residual layer, as it is traced: its sum belongs to the last convolution."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x.clone())  # what it writes in place is not in the sum


class SampleStack:
    """``module(x)``, or with mode "residual" ``x + module(x)``, for the samples of a plan; the others stay as they are."""

    def __init__(self, module: nn.Module, mode: str):
        self.module, self.mode = module, mode
        self.bound: Traced | None = None
        if not _is_known(module):
            return
        try:
            bound = Traced(_Residual(module) if mode == "residual" else module)
        except Exception:  # a forward may raise anything on torch.fx's proxies: the module is called then
            return
        if bound.rows and bound.stack.layers:
            self.bound = bound

    def holds(self, module: nn.Module, mode: str) -> bool:
        """True where ``module`` is still the one that was traced, unchanged."""
        if module is not self.module or mode != self.mode:
            return False
        if self.bound is None:
            return True
        return self.bound.holds(self.bound.module)

    def path(self, x: Any, wanted: str | None) -> str | None:
        """The way in which some samples of ``x`` run: "rows", "folded", or None: the module is called.

        ``wanted``: "rows", or None for the fastest.
        """
        if not self._takes(x) or self.bound.output_shape(_map_shape(x)) != _map_shape(x):
            return None
        if wanted == "rows" or self._wins(x):
            return "rows"
        # narrower weights would be rounded once more
        plain = x.dtype in (torch.float32, torch.float64) and autocast_dtype(x) is None
        return "folded" if plain and not any(layer.transposed for layer in self.bound.stack.layers) else None

    def run(self, path: str, x: Tensor, plan: SamplePlan) -> Tensor:
        if path == "folded":
            if plan.is_full:
                return self._folded(x)
            return scatter_samples(self._folded(gather_samples(x, plan)), plan, x)
        return self._on_rows(x, plan, None if plan.is_full else x)

    def runs_all(self, x: Any) -> bool:
        """True where ``on_all`` is the faster way, if no gradient is needed."""
        return self._takes(x) and self._wins(x)

    def on_all(self, x: Tensor) -> Tensor:
        """``module(x)`` on rows, which leaves ``x`` as it is."""
        return self._on_rows(x, SamplePlan.full(x.shape[0]), None)

    def _takes(self, x: Any) -> bool:
        if self.bound is None or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return False
        # rows would round a sum that autocast leaves in x's dtype
        if autocast_dtype(x) not in (None, x.dtype):
            return False
        if context.current() is not None:  # converted layers inside compute the pixels of a mask
            return False
        try:
            self.bound.check_mode()
        except TypeError:  # a norm or dropout in training mode, a hook
            return False
        return True

    def _wins(self, x: Tensor) -> bool:
        cpu = backends.choose(None, x.device, x.dtype) == "cpp"
        return cpu and self.bound.beats_dense(x, _map_shape(x))

    def _on_rows(self, x: Tensor, plan: SamplePlan, base: Tensor | None) -> Tensor:
        return self.bound.on_rows(x, plan.pixels(self.bound.output_shape(_map_shape(x))[1:]), base)

    def _folded(self, x: Tensor) -> Tensor:
        """The output for whole maps, with norms in the weights of the convolutions before them; no gradients."""
        stack = self.bound.stack
        values = {0: x}
        for layer in stack.layers:
            values[layer.out] = layer.whole([values[value] for value in layer.inputs])
        return values[stack.output]


def _is_known(module: nn.Module) -> bool:
    """True for a module of layers that run on rows only. Another one is not traced, as that would call it."""
    if not isinstance(module, nn.Module):
        return False
    return all(next(m.children(), None) is not None or dense_type(m) in _LAYERS for m in module.modules())


def _map_shape(x: Tensor) -> tuple[int, int, int]:
    """``(N, H, W)``."""
    return x.shape[0], x.shape[2], x.shape[3]
