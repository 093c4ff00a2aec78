"""SpatialHalting: a stage of residual units of which each pixel runs as many as its halting scores ask
for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ...ops import gather_pixels
from ...ops.pixels.rows import in_format_of
from ...plans import PixelPlan, SamplePlan
from ..apart import apart
from ..halting import HaltingRule, run, score_of
from ..samples.halting import HaltingOutput


class SpatialHalting(nn.Module):
    """Spatially adaptive computation time: a stage of residual units, on pixels that leave it one by one.

    Called as ``output, ponder, steps = layer(x)``. Let ``x_0 = x``, and ``h_l = halt_l(x_l)``. At pixels that have not
    halted ``x_l = x_{l-1} + unit_l(x_{l-1})``, at the others ``x_l = x_{l-1}``. A pixel runs N units, the smallest N with
    ``h_1 + … + h_N >= 1 - epsilon``, at most all, and::

        R = 1 - (h_1 + … + h_{N-1})                                      the remainder
        output = h_1 x_1 + … + h_{N-1} x_{N-1} + R x_N                   or x_N with weighted=False
        ponder = N + R

    All at each pixel. A unit computes the pixels that have not halted only, from a map on which the others
    keep their value; so do its gradients, N taken as constant. The ponder cost of the stage is
    ``ponder.mean()``.

    Args:
        units: modules ``unit(x, plan=None) -> residual``: ``[N, C, H, W]``, computed at the pixels of a
            :class:`~dynops.PixelPlan` (elsewhere it is not read) or, without one, everywhere; for example
            :class:`SparseSequential`. Without an activation after the sum, as in a pre-activation residual
            unit. In training mode a BatchNorm takes its statistics from the pixels that are computed.
        halts: modules ``halt(x) -> score``, one for each unit but the last, after which all pixels halt. A score is
            a probability in [0, 1] for each pixel, ``[N, 1, H, W]``; NaN counts as 0. It may be a
            :class:`dynops.gates.Decision`: then its score counts, with ``weighted=False`` its mask. A score is computed
            everywhere and read at the pixels that run. :class:`dynops.gates.SpatialHaltingHead` is the paper's.
        first: a module ``x -> x_1`` that runs everywhere, before ``units``, and may change channels and
            resolution; it counts as a unit and has a halt. None: ``units[0]`` is it, and runs everywhere.
        epsilon: lets a pixel halt after one unit.
        weighted: False: the output is the last value, and the score a decision, as in :class:`Halting`. With
            scores that are 1 where a classifier is confident, confident pixels leave the stage (deep layer
            cascade).
        dense: calls ``unit(x)`` and masks the residual. The result is the same up to rounding, except with
            BatchNorm in training mode: its statistics are then those of the whole map, as published code
            trains it. An attribute: it may be changed at any time.
        max_fraction: the largest share of the batch's pixels that goes on after a unit,
            ``floor(max_fraction * N * H * W)``: the pixels with the smallest sums of scores; the others halt.
            None: no bound.

    Shape:
        - x: ``[N, C, H, W]``. Units see channels_last maps.
        - output: :class:`HaltingOutput` with the map ``[N, C, H, W]`` in the memory format of ``x``, the
          ponder map and the map of N ``[N, 1, H, W]``.

    On a GPU each unit reads the number of pixels that run back to the host, but with ``dense``.
    ``torch.compile`` of a surrounding model breaks its graph here, but with ``dense``.

    Raises:
        TypeError, ValueError: an argument, or what a unit or a halt returned, that does not fit.

    Paper: Figurnov et al., Spatially Adaptive Computation Time for Residual Networks (CVPR 2017). Li et al.,
    Not All Pixels Are Equal: Deep Layer Cascade (CVPR 2017).
    """

    def __init__(
        self,
        units: Iterable[nn.Module],
        halts: Iterable[nn.Module],
        *,
        first: nn.Module | None = None,
        epsilon: float = 0.01,
        weighted: bool = True,
        dense: bool = False,
        max_fraction: float | None = None,
    ):
        super().__init__()
        self.first, self.units, self.halts = first, nn.ModuleList(units), nn.ModuleList(halts)
        steps = len(self.units) + (first is not None)
        if steps == 0:
            raise ValueError("units: expected at least one module, got none")
        if len(self.halts) != steps - 1:
            raise ValueError(
                f"halts: expected {steps - 1} modules, one for each of {steps} units but the last, "
                f"got {len(self.halts)}"
            )
        HaltingRule(steps, epsilon, weighted, max_fraction)
        self.epsilon, self.weighted = epsilon, weighted
        self.dense, self.max_fraction = dense, max_fraction

    def forward(self, x: Tensor) -> HaltingOutput:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating tensor [N, C, H, W], got {what}")
        value = x if self.first is None else apart(self.first, x)
        n, c, h, w = value.shape
        rule = HaltingRule(len(self.halts) + 1, self.epsilon, self.weighted, self.max_fraction)
        size, rows = (n, h, w), value.permute(0, 2, 3, 1).reshape(n * h * w, c)
        out = run(rule, rows, n * h * w, self._step(size), self._score(size), mixes=True, dense=self.dense)
        output = in_format_of(_map(out.output, size), x)
        return HaltingOutput(output, out.ponder.view(n, 1, h, w), out.steps.view(n, 1, h, w))

    def _step(self, size: tuple[int, int, int]) -> Callable:
        def step(rows: Tensor, everything: Tensor, plan: SamplePlan, n: int) -> Tensor:
            if n == 1 and self.first is not None:
                return rows
            number, x = n - 1 - (self.first is not None), _map(everything, size)
            unit = functools.partial(apart, self.units[number])
            if self.dense:
                return rows + _residual(unit(x), x).permute(0, 2, 3, 1).reshape(rows.shape)
            pixels = PixelPlan._made(plan.index, size)
            return rows + gather_pixels(_residual(unit(x, pixels), x), pixels)

        return step

    def _score(self, size: tuple[int, int, int]) -> Callable:
        def score(rows: Tensor, everything: Tensor, plan: SamplePlan, n: int) -> Tensor:
            value, shape = apart(self.halts[n - 1], _map(everything, size)), (size[0], 1, *size[1:])
            at = score_of(value, (shape, size), not self.weighted, f"halts[{n - 1}]")
            if plan.is_full:
                return at.flatten()
            return gather_pixels(at, PixelPlan._made(plan.index, size))[:, 0]

        return score

    def extra_repr(self) -> str:
        text = f"epsilon={self.epsilon}, weighted={self.weighted}, dense={self.dense}"
        return text if self.max_fraction is None else f"{text}, max_fraction={self.max_fraction}"


def _map(rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """``[N*H*W, C]`` as ``[N, C, H, W]`` in channels_last."""
    return rows.reshape(*size, rows.shape[-1]).permute(0, 3, 1, 2)


def _residual(residual: Tensor, x: Tensor) -> Tensor:
    if not isinstance(residual, Tensor) or residual.shape != x.shape:
        raise ValueError(
            f"units: expected a residual {tuple(x.shape)}, got {tuple(getattr(residual, 'shape', ()))}"
        )
    return residual.to(x.dtype)  # differs under autocast only
