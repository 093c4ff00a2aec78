"""Windows: the parts of an image that a model runs on, and the places of the result that each of them gives."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .reach import Reach


class Window(NamedTuple):
    """Pixels ``start`` to ``end`` of an axis are read, and those from ``first`` to ``last`` are what it is for."""

    start: int
    end: int
    first: int
    last: int


class ExactAxis:
    """An axis that is cut where no cut shows: each window reads all that its own outputs depend on.

    Args:
        size: of the image; tile: the pixels that a window is for.
        reach: None for an axis that is not cut.
    """

    def __init__(self, size: int, tile: int, reach: Reach | None):
        self.size, self.reach, self.windows = size, reach, [Window(0, size, 0, size)]
        if reach is None:
            return
        stride, leaves = reach.stride, reach.leaves
        tile = -(-tile // stride) * stride
        before, after = (
            stride * max(-(-n // leaf.per) for n, leaf in zip(edge, leaves, strict=True))
            for edge in ([leaf.before for leaf in leaves], [leaf.after for leaf in leaves])
        )
        whole = before + tile + after
        if whole >= size:
            return
        self.windows = []
        for first in range(0, size, tile):
            last = min(first + tile, size)
            start, end = max(first - before, 0), min(last + after, size)
            if start == 0:  # one size for all: it is the size that a batch has, and that a model takes
                end = min(max(end, whole), size)
            elif end == size:
                start = min(start, (size - whole) // stride * stride)
            self.windows.append(Window(start, end, first, last))

    def spans(self, window: Window) -> list[tuple[slice, int]]:
        """The places of each output that a window is for, and the size of the output."""
        if self.reach is None:
            return [(slice(0, 1), 1)]  # all of it
        spans = []
        for leaf in self.reach.leaves:
            first, last = (
                min(at // self.reach.stride * leaf.per, leaf.size) for at in (window.first, window.last)
            )
            spans.append((slice(first, leaf.size if window.last == self.size else last), leaf.size))
        return spans

    def places(self, window: Window, leaf: int, length: int) -> tuple[slice, slice]:
        """Where an output of ``length`` goes, in the whole and counted in the output itself."""
        if self.reach is None:
            return slice(0, length), slice(0, length)
        whole, _ = self.spans(window)[leaf]
        offset = window.start // self.reach.stride * self.reach.leaves[leaf].per
        return whole, slice(whole.start - offset, whole.stop - offset)

    def out_size(self, leaf: int, length: int) -> int:
        return length if self.reach is None else self.reach.leaves[leaf].size


class BlendedAxis:
    """An axis of windows of one size that overlap; what they give is averaged with weights that fall towards their edges.

    Args:
        lengths: of the model's outputs for a window.
        overlap: pixels that two windows share, at least.

    Raises:
        ValueError: an output has no whole number of pixels for one of the input, nor the other way round.
    """

    def __init__(self, size: int, tile: int, overlap: int, lengths: list[int]):
        self.size, self.tile, self.lengths, self.overlap = size, tile, lengths, overlap
        self.scales = [Fraction(tile, length) for length in lengths]
        if any(1 not in (scale.numerator, scale.denominator) for scale in self.scales):
            raise ValueError(
                f"tile: expected a size for which the model's output is a whole fraction or multiple of it, got {tile}, "
                f"of which it makes {' and '.join(map(str, lengths))}"
            )
        grid = math.lcm(*[scale.numerator for scale in self.scales])
        step = max((tile - overlap) // grid * grid, grid)
        last = -(-max(size - tile, 0) // grid) * grid
        self.windows = [Window(at, at + tile, at, at + tile) for at in (*range(0, last, step), last)]

    def spans(self, window: Window) -> list[tuple[slice, int]]:
        """As for an exact axis."""
        sizes = [self.out_size(leaf) for leaf in range(len(self.lengths))]
        places = [self.places(window, leaf) for leaf in range(len(sizes))]
        return [(slice(at.start, min(at.stop, size)), size) for at, size in zip(places, sizes, strict=True)]

    def places(self, window: Window, leaf: int) -> slice:
        """Where a window's output goes in the whole; it may end beyond it."""
        first = int(window.start / self.scales[leaf])
        return slice(first, first + self.lengths[leaf])

    def out_size(self, leaf: int) -> int:
        return math.ceil(self.size / self.scales[leaf])

    def weights(self, leaf: int) -> Tensor:
        """float32 ``[length]``: ramps over the overlap."""
        length = self.lengths[leaf]
        ramp = max(round(self.overlap / self.scales[leaf]), 0) + 1
        at = torch.arange(1, length + 1, device="cpu")
        return torch.minimum(at, length + 1 - at).clamp(max=ramp) / ramp
