"""The live channels of a convolution's inputs and outputs, for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """Index and count of both sides, as in ``ChannelPlan``; None: all channels of a side are live."""

    in_index: Tensor | None = None  # [N * heads, L] or [heads, L]
    in_count: Tensor | None = None
    out_index: Tensor | None = None  # [N, M] or [1, M]
    out_count: Tensor | None = None

    @property
    def ins(self) -> tuple[Tensor | None, Tensor | None]:
        return self.in_index, self.in_count

    @property
    def outs(self) -> tuple[Tensor | None, Tensor | None]:
        return self.out_index, self.out_count
