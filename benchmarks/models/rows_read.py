"""Counts the convolutions of a forward that read packed rows."""

from __future__ import annotations

from dynops.stack.layers import conv
from dynops.stack.maps import convolution
from dynops.stack.sequences import Sequence

_ROOMS = (conv, convolution)


class RowsRead:
    """Inside it, sparse convolutions of traced and of followed modules run one by one and are counted.

    Attributes:
        calls, from_rows: all of them, and those whose input was packed rows.
    """

    def __init__(self):
        self.calls = self.from_rows = 0

    @property
    def share(self) -> float:
        return self.from_rows / self.calls if self.calls else 0.0

    def __enter__(self) -> RowsRead:
        self._real = [room._pixel_conv for room in _ROOMS]
        for room, real in zip(_ROOMS, self._real, strict=True):
            room._pixel_conv = self._counted(real)
        self._together = Sequence.run, conv.Conv._prepared
        Sequence.run, conv.Conv._prepared = (lambda self, run: False), (lambda self, run: None)
        return self

    def __exit__(self, *_) -> None:
        for room, real in zip(_ROOMS, self._real, strict=True):
            room._pixel_conv = real
        Sequence.run, conv.Conv._prepared = self._together

    def _counted(self, real):
        def pixel_conv(values, weight, bias, plan, in_plan, *rest):
            is_map = plan.num_pixels > plan.shape[0]  # a squeezed one has no rows to read
            self.calls += is_map
            self.from_rows += is_map and in_plan is not None
            return real(values, weight, bias, plan, in_plan, *rest)

        return pixel_conv
