"""Sizes and positions as plain integers, shared by plans, ops, kernels and stacks: every formula stands here once."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

# ------------------------------------------------------------------------- along one axis


def reach(kernel: int, dilation: int = 1) -> int:
    """The input pixels from a window's first tap to its last, both included."""
    return dilation * (kernel - 1) + 1


def window_count(
    size: int,
    kernel: int,
    stride: int = 1,
    before: int = 0,
    after: int = 0,
    dilation: int = 1,
    ceil: bool = False,
) -> int:
    """The outputs of a convolution or pool: the windows that fit into the padded input. None fit: 0 or less.

    Args:
        before, after: the padding before the first and after the last pixel.
        ceil: a last window may hang over the padding, if it begins inside the map or the padding before it.
    """
    room = size + before + after - reach(kernel, dilation)
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def transposed_size(
    size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, extra: int = 0
) -> int:
    """The outputs of a transposed convolution; ``extra``: its ``output_padding``."""
    return (size - 1) * stride - 2 * padding + reach(kernel, dilation) + extra


# ------------------------------------------------------------------------- of convolutions


class ConvGeometry(NamedTuple):
    """Everything about a convolution but its values. An op's schema takes ``list(geometry)``.

    Tap ``(r, s)`` of output pixel ``(y, x)`` reads input pixel

    * ``y*stride_h - pad_h + r*dil_h`` (and likewise in x) in a convolution;
    * ``(y + pad_h - r*dil_h) / stride_h`` where that divides exactly, in a transposed one.

    A position outside the input reads zero. ``pad_h, pad_w`` are the paddings before the first row
    and column; those after the last follow from the sizes, so they need not be equal.
    """

    batch: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int
    transposed: int

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return self.batch, self.in_h, self.in_w

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return self.batch, self.out_h, self.out_w

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom): the pixels that the taps of all outputs read outside of the input.

        Transposed: those that all inputs write outside of the output. Negative: pixels that no tap meets.
        """
        small_h, small_w, large_h, large_w = self.out_h, self.out_w, self.in_h, self.in_w
        if self.transposed:
            small_h, small_w, large_h, large_w = large_h, large_w, small_h, small_w
        bottom = (small_h - 1) * self.stride_h + reach(self.kernel_h, self.dil_h) - large_h - self.pad_h
        right = (small_w - 1) * self.stride_w + reach(self.kernel_w, self.dil_w) - large_w - self.pad_w
        return self.pad_w, right, self.pad_h, bottom

    @property
    def is_pointwise(self) -> bool:
        """True if output pixel p reads input pixel p and nothing else."""
        return (
            self.taps == 1
            and self.stride_h == self.stride_w == 1
            and self.pad_h == self.pad_w == 0
            and (self.in_h, self.in_w) == (self.out_h, self.out_w)
        )

    @property
    def leaves_gaps(self) -> bool:
        """True if a convolution of a whole map leaves input pixels between its taps unread."""
        return not self.transposed and (self.stride_h > self.kernel_h or self.stride_w > self.kernel_w)

    def macs(self, rows: int, in_channels: int, out_channels: int) -> float:
        """Multiply-accumulates to compute ``rows`` output pixels.

        In a transposed convolution each input pixel meets every tap once: an output pixel has its share of these.
        """
        taps = self.taps
        if self.transposed:
            taps = taps * (self.in_h * self.in_w) / max(self.out_h * self.out_w, 1)
        return rows * taps * in_channels * out_channels / self.groups


def conv_geometry(
    in_shape, kernel, stride=(1, 1), before=(0, 0), dilation=(1, 1), groups: int = 1, after=None
) -> ConvGeometry:
    """The geometry of a convolution of ``in_shape`` (N, H, W).

    Args:
        before, after: the paddings (y, x) before the first and after the last row and column; equal by default.

    Raises:
        ValueError: an input smaller than the kernel's reach.
    """
    batch, *in_size = in_shape
    after = before if after is None else after
    out_size = [
        window_count(in_size[i], kernel[i], stride[i], before[i], after[i], dilation[i]) for i in (0, 1)
    ]
    if any(known(size < 0) or (known(size < 1) and known(batch > 0)) for size in out_size):
        raise ValueError(
            f"x: expected an input at least as large as the kernel's reach, got {tuple(in_size)}"
        )
    return ConvGeometry(batch, *in_size, *out_size, *kernel, *stride, *before, *dilation, groups, 0)


def conv_transpose_geometry(
    in_shape, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1, extra=(0, 0)
) -> ConvGeometry:
    """The geometry of a transposed convolution of ``in_shape`` (N, H, W); ``extra``: its ``output_padding``."""
    batch, *in_size = in_shape
    out_size = [
        transposed_size(in_size[i], kernel[i], stride[i], padding[i], dilation[i], extra[i]) for i in (0, 1)
    ]
    return ConvGeometry(batch, *in_size, *out_size, *kernel, *stride, *padding, *dilation, groups, 1)


def enlarged_geometry(in_shape: tuple[int, int, int], out_shape: tuple[int, int, int]) -> ConvGeometry | None:
    """The geometry of resizing ``(N, H, W)`` by whole factors: input i writes the outputs from i * factor on; else None."""
    if min(in_shape) < 1 or out_shape[1] % in_shape[1] or out_shape[2] % in_shape[2]:
        return None
    factors = out_shape[1] // in_shape[1], out_shape[2] // in_shape[2]
    return ConvGeometry(*in_shape, *out_shape[1:], *factors, *factors, 0, 0, 1, 1, 1, 1)


def bilinear_sources(
    in_size: int, out_size: int, align_corners: bool, factor: float | None = None
) -> tuple[list[int], list[float]]:
    """Of each output pixel of a bilinear resizing, along one axis: the first input pixel that it reads, the next one's share.

    Args:
        factor: the scale factor that was asked for; None: the ratio of sizes.
    """
    if align_corners:
        step = (in_size - 1) / (out_size - 1) if out_size > 1 else 0.0
        places = [i * step for i in range(out_size)]
    else:
        step = in_size / out_size if factor is None else 1 / factor
        places = [max(0.0, (i + 0.5) * step - 0.5) for i in range(out_size)]
    first = [min(int(place), in_size - 1) for place in places]
    return first, [min(place - at, 1.0) for place, at in zip(places, first, strict=True)]


def as_geometry(geometry) -> ConvGeometry:
    """The geometry behind an op's ``int[] geometry``."""
    return geometry if type(geometry) is ConvGeometry else ConvGeometry(*geometry)


def pair(value, name: str, least: int | None = None) -> tuple[int, int]:
    """``value``, an int or a pair of ints and none below ``least``, as a pair."""
    both = (value, value) if is_int(value) else value
    if isinstance(both, (tuple, list)) and len(both) == 2 and all(is_int(v, least) for v in both):
        return tuple(both)
    bound = "" if least is None else f" >= {least}"
    raise ValueError(f"{name}: expected an int or a pair of ints{bound}, got {value!r}")


def is_int(value, least: int | None = None) -> bool:
    """True if ``value`` is an int (or torch's symbolic one, under a tracer), no bool, and not below ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or type(value).__name__ == "SymInt") and (least is None or value >= least)


def known(condition) -> bool:
    """True if a condition holds for all sizes that symbols stand for. Asking a symbol itself narrows what an export takes."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def is_share(value) -> bool:
    """True if ``value`` is a number in [0, 1]."""
    return isinstance(value, numbers.Real) and 0 <= value <= 1


# ------------------------------------------------------------------------------- of blocks


class BlockGeometry(NamedTuple):
    """Equal rectangles over a map, in a grid. An op's schema takes ``list(geometry)``.

    Block ``(by, bx)`` covers rows ``first_h + by*step_h`` to ``+ tile_h`` (and likewise columns) of the
    map: tiles overlap where they are larger than the step, and may lie over the map's edge.
    """

    batch: int
    height: int
    width: int
    grid_h: int
    grid_w: int
    step_h: int
    step_w: int
    first_h: int
    first_w: int
    tile_h: int
    tile_w: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.height, self.width

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.grid_h, self.grid_w

    @property
    def overlaps(self) -> bool:
        """True if a pixel may lie in more than one tile."""
        return (self.tile_h > self.step_h and self.grid_h > 1) or (
            self.tile_w > self.step_w and self.grid_w > 1
        )

    def widened(self, halo: tuple[int, int, int, int]) -> BlockGeometry:
        """The same blocks with ``halo = (top, bottom, left, right)`` more pixels on each side."""
        top, bottom, left, right = halo
        return self._replace(
            first_h=self.first_h - top,
            first_w=self.first_w - left,
            tile_h=self.tile_h + top + bottom,
            tile_w=self.tile_w + left + right,
        )


def as_block_geometry(geometry) -> BlockGeometry:
    """The geometry behind a block op's ``int[] geometry``."""
    return geometry if type(geometry) is BlockGeometry else BlockGeometry(*geometry)
