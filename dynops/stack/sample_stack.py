"""A stack of convolutions on some samples of a batch, or on all, for inference: what is faster than calling the module.

Two ways. On rows, at the pixels of those samples, where they lie: nothing is gathered, as the first convolution reads the
map, and nothing is scattered, as the last one writes into the output, the residual sum and the samples that were skipped
included. Or folded, on the gathered samples, with norms in the weights.
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
from .folded import folds, run_folded
from .graph import KINDS
from .run_rows import run_rows
from .trace import dense_type
from .traced import Bound

_LAYERS = (*KINDS, *ELEMENTWISE, nn.Identity, nn.Dropout, nn.Dropout2d)


class _Residual(nn.Module):
    """What is traced of a residual layer, so that the sum belongs to the last convolution."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x.clone())  # what it writes in place is not in the sum


class SampleStack:
    """``module(x)``, or with mode "residual" ``x + module(x)``, for the samples of a plan; the others stay as they are."""

    def __init__(self, module: nn.Module, mode: str):
        self.module, self.mode = module, mode
        self.bound: Bound | None = None
        if not _is_known(module):
            return
        self._settings = _settings_of(module)
        try:
            bound = Bound(_Residual(module) if mode == "residual" else module)
        except Exception:  # a forward may raise anything on torch.fx's proxies: the module is called then
            return
        if bound.rows and bound.stack.layers:
            self.bound = bound

    def holds(self, module: nn.Module, mode: str) -> bool:
        """Whether this is still what was traced."""
        if module is not self.module or mode != self.mode:
            return False
        if self.bound is None:
            return True
        return self.bound.holds(self.bound.module) and all(
            len(now) == len(then) and all(now.get(name) is value for name, value in then.items())
            for now, then in self._settings
        )

    def path(self, x: Any, wanted: str | None) -> str | None:
        """How some samples of ``x`` run: "rows", "folded", or None: the module is called.

        ``wanted``: "rows", or None for the fastest.
        """
        if not self._takes(x) or self.bound.output_shape(_map_shape(x)) != _map_shape(x):
            return None
        if wanted == "rows" or self._wins(x):
            return "rows"
        # narrower weights would be rounded once more
        plain = x.dtype in (torch.float32, torch.float64) and autocast_dtype(x) is None
        return "folded" if plain and folds(self.bound.stack) else None

    def run(self, path: str, x: Tensor, plan: SamplePlan) -> Tensor:
        if path == "folded":
            if plan.is_full:
                return run_folded(self.bound.stack, x)
            return scatter_samples(run_folded(self.bound.stack, gather_samples(x, plan)), plan, x)
        return self._on_rows(x, plan, None if plan.is_full else x)

    def runs_all(self, x: Any) -> bool:
        """Whether ``on_all`` is the faster way; where no gradient is needed."""
        return self._takes(x) and self._wins(x)

    def on_all(self, x: Tensor) -> Tensor:
        """``module(x)`` on rows, which leaves ``x`` as it is."""
        return self._on_rows(x, SamplePlan.full(x.shape[0]), None)

    def _takes(self, x: Any) -> bool:
        if self.bound is None or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return False
        if autocast_dtype(x) not in (
            None,
            x.dtype,
        ):  # rows would round a sum that autocast leaves in x's dtype
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
        shape = _map_shape(x)
        pixels = plan.pixels(self.bound.output_shape(shape)[1:])
        return run_rows(self.bound.stack, self.bound.geometries(shape), x, pixels, base)


def _is_known(module: nn.Module) -> bool:
    """Whether it is made of layers that run on rows only; another one is not even traced, which would call it."""
    if not isinstance(module, nn.Module):
        return False
    return all(next(m.children(), None) is not None or dense_type(m) in _LAYERS for m in module.modules())


def _settings_of(module: nn.Module) -> list[tuple[dict, dict]]:
    """The attributes of modules with children, as they are from now on and as they are now: a forward may decide by
    them, and a trace holds what it decided."""
    return [(m.__dict__, dict(m.__dict__)) for m in module.modules() if next(m.children(), None) is not None]


def _map_shape(x: Tensor) -> tuple[int, int, int]:
    """``(N, H, W)``."""
    return x.shape[0], x.shape[2], x.shape[3]
