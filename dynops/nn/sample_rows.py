"""A stack of convolutions on some samples of a batch: on the pixels of those samples, where they lie.

Nothing is gathered: the first convolution reads the map; nothing is scattered: the last one writes into the output, the
residual sum and the samples that were skipped included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import backends
from ..plans import SamplePlan
from .bound import Bound
from .rows import run_rows


class _Residual(nn.Module):
    """What is traced of a residual layer, so that the sum belongs to the last convolution."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class SampleRows:
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

    def takes(self, x: Any, wanted: bool) -> bool:
        """Whether ``x`` can run so and, if it is not ``wanted``, whether that is the faster way."""
        if self.bound is None or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return False
        try:
            self.bound.check_mode()
        except TypeError:  # a norm or dropout in training mode, a hook
            return False
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        if self.bound.output_shape(in_shape) != in_shape:
            return False
        if wanted:
            return True
        return backends.choose(None, x.device, x.dtype) == "cpp" and self.bound.beats_dense(x, in_shape)

    def __call__(self, x: Tensor, plan: SamplePlan) -> Tensor:
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        base = None if plan.is_full else x
        return run_rows(self.bound.stack, self.bound.geometries(in_shape), x, plan.pixels(in_shape[1:]), base)
