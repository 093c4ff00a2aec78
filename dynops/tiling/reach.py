"""How far a model's outputs see, measured on strips of noise: where an image may be cut, and what a cut changes.

NaN in a part of the input reaches exactly the outputs that depend on it. So two runs say which outputs a cut leaves as they
are. Runs on the parts themselves, compared with the whole, say at which multiples a cut keeps every layer's grid in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LONGEST = 4096  # of a strip, in pixels: half of it is the largest reach that is found
_WIDTHS = (64, 256)  # of a strip; some models refuse the smaller one
# strides of a model: a cut at a multiple of one moves no layer's grid
_STRIDES = (
    *(1, 2, 4, 8, 16, 32, 64, 128, 3, 6, 12, 24, 48, 96, 5, 10, 20, 40, 80, 7, 14, 28, 56, 112),
    *(9, 18, 36, 72, 27),
)
_LEAST_STEPS = 11  # of a stride to a cut: the first from 2 on that is no multiple of 2, 3, 5 or 7
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4}  # of the largest value
_ROUGH = {torch.float64: 1e-7, torch.float32: 5e-3}  # TF32 rounds by 1e-3 and less
_HALF = 3e-2


class Leaf(NamedTuple):
    """One of a model's outputs along an axis, counted in its own pixels.

    Attributes:
        per: for each ``stride`` pixels of the input.
        before: at the beginning of a part, that the cut there changed.
        after: those before an end that depend on what comes after it.
        size: for the whole image.
    """

    per: int
    before: int
    after: int
    size: int


class Reach(NamedTuple):
    """A model along one axis of an image of ``size`` pixels: cuts at multiples of ``stride``."""

    size: int
    stride: int
    leaves: tuple[Leaf, ...]

    def fits(self, size: int) -> bool:
        """True where an image of another size has the same reach."""
        return (size - self.size) % self.stride == 0

    def moved(self, size: int) -> Reach:
        """The reach for such a size."""
        more = (size - self.size) // self.stride
        return Reach(
            size, self.stride, tuple(leaf._replace(size=leaf.size + more * leaf.per) for leaf in self.leaves)
        )


class NotLocal(Exception):
    """A model whose outputs depend on all of an image, or which takes no part of it; the text says which."""


def reach_of(run: Callable[[Tensor], list[Tensor]], noise: Callable, axis: int, size: int) -> Reach:
    """The reach of a model along an axis (0: height) of an image of ``size`` pixels.

    Args:
        run: from ``[1, C, h, w]`` to the model's outputs.
        noise: from a height and a width to the input.

    Raises:
        NotLocal.
    """
    error = None
    for width in _WIDTHS:
        try:
            return _Strips(run, noise, axis, size, width).reach()
        except NotLocal:
            raise
        except Exception as refused:  # a model may refuse a strip in any way
            error = refused
    raise NotLocal(f"it does not run on a strip: {type(error).__name__}: {error}")


class _Strips:
    def __init__(self, run: Callable, noise: Callable, axis: int, size: int, width: int):
        self.run_model, self.axis, self.size, self.width = run, axis, size, width
        self.make = lambda length: noise(length, width) if axis == 0 else noise(width, length)
        self.whole: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def run(self, x: Tensor) -> list[Tensor]:
        """The outputs with the axis first."""
        outs = self.run_model(x)
        for y in outs:
            if y.dim() != 4 or not y.is_floating_point():
                raise NotLocal(f"its output is no floating map [N, C, h, w], but {y.dtype} {tuple(y.shape)}")
        return [y.movedim(2 + self.axis, 0) for y in outs]

    def of(self, length: int) -> tuple[Tensor, list[Tensor]]:
        """A strip and what the model makes of it (kept)."""
        if length not in self.whole:
            x = self.make(length)
            self.whole[length] = x, self.run(x)
        return self.whole[length]

    def part(self, x: Tensor, first: int, end: int) -> Tensor:
        return x.narrow(2 + self.axis, first, end - first)

    def clean(self, length: int, first: int, end: int) -> list[Tensor]:
        """bool ``[l]`` of each output: the places that do not depend on these pixels."""
        x = self.of(length)[0].clone()
        self.part(x, first, end).fill_(math.nan)
        return [~y.flatten(1).isnan().any(1) for y in self.run(x)]

    def length(self) -> int:
        """A length at which an eighth of the outputs, at either end, does not depend on the other half."""
        length = 256
        while True:
            cut = length // 2
            first, last = self.clean(length, cut, length), self.clean(length, 0, cut)
            clean = [(_prefix(a), _prefix(b.flip(0)), len(a)) for a, b in zip(first, last, strict=True)]
            if all(min(a, b) * 8 >= n > 0 for a, b, n in clean):
                return length
            if length >= _LONGEST:
                raise NotLocal(f"an output depends on input pixels that are more than {length // 2} away")
            length *= 2

    def reach(self) -> Reach:
        shortest, error = self.length(), None
        for stride in _STRIDES:
            try:
                found = self.confirmed(stride, shortest)
            except Exception as refused:  # of a part
                error, found = refused, None
            if found is not None:
                return found
        if error is not None:
            raise error
        raise NotLocal("it makes something else of a part of an image, wherever that is cut")

    def confirmed(self, stride: int, shortest: int) -> Reach | None:
        """As :meth:`at` of the shortest strip, and then of one that is long enough for this stride."""
        found = None
        for length in (shortest, 2 * _LEAST_STEPS * stride):
            if length >= max(2 * stride, shortest):
                found = self.at(stride, length)
                if found is None:
                    return None
        return found

    def at(self, stride: int, length: int) -> Reach | None:
        """The reach, where a cut at a multiple of ``stride`` keeps what the outputs of a strip of this length are."""
        length += (self.size - length) % stride
        steps = max(length // 2 // stride, 1)
        while math.gcd(steps, 2 * 3 * 5 * 7) > 1:  # a cut that is no multiple of another stride
            steps -= 1
        cut = steps * stride
        x, whole = self.of(length)
        ends = self.run(self.part(x, cut, length))
        pers = [(len(y) - len(end)) * stride / cut for y, end in zip(whole, ends, strict=True)]
        if any(per != int(per) or per < 1 for per in pers):
            return None
        if not all(_same(y[-1:], end[-1:]) for y, end in zip(whole, ends, strict=True)):
            return None  # without more runs
        leaves, begins = [], self.run(self.part(x, 0, cut))
        for i, (first, last) in enumerate(
            zip(self.clean(length, cut, length), self.clean(length, 0, cut), strict=True)
        ):
            y, per = whole[i], int(pers[i])
            places = cut // stride * per
            clean, spoiled = _prefix(first), len(last) - _prefix(last.flip(0))  # [0, clean) and [spoiled, l)
            before, after = max(spoiled - places, 0), max(places - clean, 0)
            if not _same(y[places + before :], ends[i][before:]) or not _same(y[:clean], begins[i][:clean]):
                return None
            leaves.append(Leaf(per, before, after, len(y) + (self.size - length) // stride * per))
        return Reach(self.size, stride, tuple(leaves))


def _prefix(clean: Tensor) -> int:
    """How many of the first are true."""
    return int(clean.long().cumprod(0).sum())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    tolerance = (_ROUGH if a.is_cuda else _TOLERANCE).get(a.dtype, _HALF)
    return bool((a - b).abs().max() <= tolerance * a.abs().max())
