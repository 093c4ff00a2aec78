"""Receptive fields: the input pixels that a block of a layer's output reads, along one axis.

A :class:`Span` says which pixels blocks 0, 1, ... hold or need of one value along one axis. Each reach turns the
span of a layer's output into that of its input, and the size of its input into that of its output.
They are plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from ..geometry import reach, transposed_size, window_count

_MAX_SIZES = 64


class Span(NamedTuple):
    """Block k has the pixels ``first + k*step`` to ``first + k*step + size``."""

    first: int
    size: int
    step: int

    @property
    def end(self) -> int:
        return self.first + self.size

    def union(self, other: Span) -> Span:
        """The span that holds both; their steps are equal."""
        first = min(self.first, other.first)
        return Span(first, max(self.end, other.end) - first, self.step)


class Same(NamedTuple):
    """Output pixel i reads input pixel i."""

    ratio = Fraction(1)  # input pixels from one output pixel to the next

    def span(self, out: Span) -> Span:
        return out

    def out_size(self, size: int) -> int:
        return size

    def as_conv(self) -> None:
        """``kernel, stride, padding, dilation, transposed, ceil`` of a convolution or pool that reads so; or None."""
        return None


class Window(NamedTuple):
    """A convolution or pool: output i reads ``i*stride - before + r*dilation`` for r below ``kernel``."""

    kernel: int
    stride: int
    before: int  # padding before the first pixel
    after: int
    dilation: int
    ceil: bool = False  # a last window may hang over the padding (pools)

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.stride)

    @property
    def extent(self) -> int:
        return reach(self.kernel, self.dilation)

    def span(self, out: Span) -> Span:
        first, size = out.first * self.stride - self.before, (out.size - 1) * self.stride + self.extent
        return Span(first, size, out.step * self.stride)

    def out_size(self, size: int) -> int:
        return window_count(size, self.kernel, self.stride, self.before, self.after, self.dilation, self.ceil)

    def as_conv(self) -> tuple[int, ...]:
        return self.kernel, self.stride, self.before, self.dilation, 0, int(self.ceil)


class Transposed(NamedTuple):
    """A transposed convolution: input i writes outputs ``i*stride - padding + r*dilation``."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    extra: int  # output_padding

    @property
    def ratio(self) -> Fraction:
        return Fraction(1, self.stride)

    @property
    def extent(self) -> int:
        return reach(self.kernel, self.dilation)

    def span(self, out: Span) -> Span:
        first = -(-(out.first + self.padding - self.extent + 1) // self.stride)
        last = (out.end - 1 + self.padding) // self.stride
        return Span(first, max(last - first + 1, 1), out.step // self.stride)

    def out_size(self, size: int) -> int:
        return transposed_size(size, self.kernel, self.stride, self.padding, self.dilation, self.extra)

    def as_conv(self) -> tuple[int, ...]:
        return self.kernel, self.stride, self.padding, self.dilation, 1, 0


class Enlarged(NamedTuple):
    """Upsampling by an integer factor: nearest, or linear (align_corners=False), which reads two pixels."""

    factor: int
    linear: bool

    @property
    def ratio(self) -> Fraction:
        return Fraction(1, self.factor)

    def span(self, out: Span) -> Span:
        if self.linear:  # output i stands at (2i + 1 - factor) / (2 factor)
            first, last = ((2 * i + 1 - self.factor) // (2 * self.factor) for i in (out.first, out.end - 1))
            last += 1
        else:
            first, last = out.first // self.factor, (out.end - 1) // self.factor
        return Span(first, last - first + 1, out.step // self.factor)

    def out_size(self, size: int) -> int:
        return size * self.factor

    def as_conv(self) -> tuple[int, ...]:
        return self.factor, self.factor, 0, 1, 1, 0


# ------------------------------------------------------------------------------- sizes of values


def sizes_of(stack, in_shape: tuple[int, int, int]) -> dict[int, tuple[int, int]]:
    """``(H, W)`` of each value, for an input ``(N, H, W)``.

    Raises:
        ValueError: an input that is too small, or maps of different sizes that meet.
    """
    sizes = {0: tuple(in_shape[1:])}
    for layer in stack.layers:
        found = [
            tuple(reach[i].out_size(sizes[value][i]) for i in (0, 1))
            for value, reach in zip(layer.inputs, layer.reaches, strict=False)
        ]
        if min(found[0]) < 1 and min(in_shape) > 0:
            raise ValueError(
                f"x: expected an input that is large enough for {layer.name}, got [N, H, W] = {in_shape}"
            )
        if any(size != found[0] for size in found):
            raise ValueError(f"{layer.name}: expected maps of one size, got {found}")
        sizes[layer.out] = found[0]
    return sizes


class KeptSizes:
    """A cache by the sizes of an input, for up to 64 of them. A copy begins empty."""

    def __init__(self):
        self._found: dict[Hashable, Any] = {}

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():  # the key may have symbols, which a look-up would make constants
            return make()
        found = self._found.get(key)
        if found is None:
            found = make()
            if len(self._found) >= _MAX_SIZES:
                self._found.clear()
            self._found[key] = found
        return found

    def __reduce__(self):
        return KeptSizes, ()
