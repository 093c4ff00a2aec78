"""Stored: a value that a stream keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plans import PixelPlan
from ..maps.layout import NCHW, _in_order


class Stored:
    """A map as rows ``[N, H, W, *channels]``, and the same memory in the order of the model's axes.

    Args:
        x: with ``axes`` (:mod:`dynops.stack.maps.layout`); its memory is taken where its order allows it.
        size: ``(N, H, W)``.
        own: whether the memory of ``x`` belongs to nobody else.
    """

    def __init__(self, x: Tensor, axes: tuple[str, ...], size: tuple[int, int, int], own: bool):
        places = [i for letter in "nhws" for i, axis in enumerate(axes) if axis == letter]
        order = places + [i for i, axis in enumerate(axes) if axis == "c"]
        moved = x.permute(order)
        rows = moved.contiguous()
        if not own and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            rows = rows.clone()
        self.axes, self.size = axes, size
        self.grid = rows.view(*size, *rows.shape[len(places) :])
        self.owed = 0.0
        self._views()

    def _views(self) -> None:
        self.rows = self.grid.flatten(0, 2)
        if self.axes == NCHW:
            self.dense = self.grid.permute(0, 3, 1, 2)
        else:
            self.dense = _in_order(self.grid, self.axes, None)

    @property
    def bytes(self) -> int:
        return self.grid.numel() * self.grid.element_size()

    def at(self, plan: PixelPlan) -> Tensor:
        """The rows ``[P, *channels]`` at a plan."""
        return self.rows.index_select(0, positions(plan))

    def write(self, rows: Tensor, plan: PixelPlan, threshold: float) -> Tensor | None:
        """Writes rows at a plan; those that moved by no more than the threshold stay as they were.

        Returns:
            bool ``[P]``: the rows that were written; None for all.
        """
        if threshold <= 0:
            self.rows.index_copy_(0, positions(plan), rows)
            return None
        kept = self.at(plan)
        off = (rows - kept).abs_()
        off = off.flatten(1).amax(1) if off.dim() > 1 else off
        moved = ~(off <= threshold)  # NaN moves
        left = off.masked_fill(moved, 0)
        if left.numel():
            self.owed = max(self.owed, float(left.amax()))
        self.rows.index_copy_(0, positions(plan)[moved], rows[moved])
        return moved

    def note_owed(self, kept: Tensor, x: Tensor, moved: Tensor) -> None:
        """Notes the largest difference between maps ``[N, C, H, W]`` outside of ``moved`` ``[N, H, W]``."""
        off = (kept - x).abs_().amax(1).masked_fill_(moved, 0)
        if off.numel():
            self.owed = max(self.owed, float(off.amax()))

    def moved_by(self, dx: int, dy: int) -> None:
        """Moves the content by whole pixels."""
        self.grid = torch.roll(self.grid, (dy, dx), (1, 2))
        self._views()

    def to(self, device) -> None:
        self.grid = self.grid.to(device)
        self._views()


def positions(plan: PixelPlan) -> Tensor:
    """int64 ``[P]``: the flat positions of a plan."""
    return plan.derived("positions", lambda: plan.index.long())
