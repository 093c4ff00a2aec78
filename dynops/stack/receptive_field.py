"""What a layer reads: the receptive field of a block of its output, along one axis.

A :class:`Span` is what blocks 0, 1, ... hold or need of one value along one axis. Each reach turns the
span of a layer's output into that of its input, and the size of its input into that of its output.
They are plain data.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple


class Span(NamedTuple):
    """Block k has the pixels ``first + k*step`` to ``first + k*step + size``."""

    first: int
    size: int
    step: int

    @property
    def end(self) -> int:
        return self.first + self.size

    def union(self, other: Span) -> Span:
        """What holds both (of the same step)."""
        first = min(self.first, other.first)
        return Span(first, max(self.end, other.end) - first, self.step)


class Same(NamedTuple):
    """Output pixel i reads input pixel i."""

    ratio = Fraction(1)  # input pixels from one output pixel to the next

    def span(self, out: Span) -> Span:
        return out

    def out_size(self, size: int) -> int:
        return size


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
        return self.dilation * (self.kernel - 1) + 1

    def span(self, out: Span) -> Span:
        first, size = out.first * self.stride - self.before, (out.size - 1) * self.stride + self.extent
        return Span(first, size, out.step * self.stride)

    def out_size(self, size: int) -> int:
        room = size + self.before + self.after - self.extent
        if not self.ceil:
            return room // self.stride + 1
        out = -(-room // self.stride) + 1
        # the last window begins inside the map or the padding before it
        return out - 1 if (out - 1) * self.stride >= size + self.before else out


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
        return self.dilation * (self.kernel - 1) + 1

    def span(self, out: Span) -> Span:
        first = -(-(out.first + self.padding - self.extent + 1) // self.stride)
        last = (out.end - 1 + self.padding) // self.stride
        return Span(first, max(last - first + 1, 1), out.step // self.stride)

    def out_size(self, size: int) -> int:
        return (size - 1) * self.stride - 2 * self.padding + self.extent + self.extra


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
