"""Weighted means of the outputs of overlapping windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arrays import any_in, under
from .windows import BlendedAxis, Window


class Band:
    """The rows of one output of one image that a row of windows makes, as sums and their weights.

    Args:
        leaf: the number of the output.
        like: an output of a window.
        out: what it is written into, on whose device the sums are.
        write: called with rows, columns, values ``[C, h, w]`` and where there is data, for rows that are complete.
    """

    def __init__(self, axes: tuple[BlendedAxis, BlendedAxis], leaf: int, like: Tensor, out, write: Callable):
        self.axes, self.leaf, self.write, self.dtype = axes, leaf, write, like.dtype
        self.sizes = tuple(axis.out_size(leaf) for axis in axes)
        self.weights = axes[0].weights(leaf)[:, None] * axes[1].weights(leaf)
        self.weights_there = self.weights.to(like.device)
        high, wide = (
            self.weights.shape[0],
            self.sizes[1] + self.weights.shape[1],
        )  # windows may end beyond the image
        wide_type = torch.promote_types(like.dtype, torch.float32)
        device = out.device if isinstance(out, Tensor) else "cpu"
        self.sums = torch.zeros(like.shape[1], high, wide, dtype=wide_type, device=device)
        self.total = torch.zeros(high, wide, dtype=wide_type, device="cpu")
        self.data = torch.zeros(high, wide, dtype=torch.bool, device="cpu")
        self.window: Window | None = None
        self.top = 0

    def move(self, window: Window) -> None:
        """Begins a row of windows: what lies above it is complete."""
        self.window, top = window, self.axes[0].places(window, self.leaf).start
        done = min(top - self.top, self.sums.shape[1])
        if done > 0:
            self.flush(done)
            for kept in (self.sums, self.total, self.data):
                left = kept[..., done:, :].clone()
                kept.zero_()
                kept[..., : left.shape[-2], :] = left
        self.top = top

    def add(self, made: Tensor, y: Window, x: Window, valid: Tensor | None) -> None:
        """Adds a window's output ``[C, h, w]``."""
        columns = self.axes[1].places(x, self.leaf)
        self.sums[..., columns] += (made.to(self.sums.dtype) * self.weights_there).to(self.sums.device)
        self.total[:, columns] += self.weights
        self.data[:, columns] |= True if valid is None else self.with_data(y, x, valid, columns)

    def with_data(self, y: Window, x: Window, valid: Tensor, columns: slice) -> Tensor:
        """bool ``[h, w]``: the places of a window's output under which a pixel has data."""
        spans = []
        for axis, window, first, read in zip(
            self.axes, (y, x), (self.top, columns.start), valid.shape, strict=True
        ):
            places = slice(first, first + axis.lengths[self.leaf])
            begin, end = under(places, axis.out_size(self.leaf), axis.size)
            spans.append(((begin - window.start).clamp(0, read), (end - window.start).clamp(0, read)))
        return any_in(valid, *spans)

    def flush(self, rows: int) -> None:
        """Writes the first rows."""
        rows = min(rows, self.sizes[0] - self.top)
        ran = self.total[:rows, : self.sizes[1]] > 0
        if rows <= 0 or not bool(ran.any()):
            return
        at = ran.any(0).nonzero()
        columns = slice(int(at[0]), int(at[-1]) + 1)
        total = self.total[:rows, columns]
        values = self.sums[:, :rows, columns] / torch.where(total > 0, total, 1).to(self.sums.device)
        data = (self.data[:rows, columns]) & (total > 0)
        self.write(slice(self.top, self.top + rows), columns, values.to(self.dtype), data)
