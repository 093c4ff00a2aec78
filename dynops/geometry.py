"""The geometry of a 2-D convolution as plain integers, shared by plans, ops and kernels."""

from __future__ import annotations

import numbers
from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Everything about a convolution but its values. ``list(geometry)`` is what an op's schema takes.

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
    def is_pointwise(self) -> bool:
        """Whether output pixel p reads input pixel p and nothing else."""
        return (
            self.taps == 1
            and self.stride_h == self.stride_w == 1
            and self.pad_h == self.pad_w == 0
            and (self.in_h, self.in_w) == (self.out_h, self.out_w)
        )

    @property
    def leaves_gaps(self) -> bool:
        """Whether a convolution of a whole map leaves input pixels between its taps unread."""
        return not self.transposed and (self.stride_h > self.kernel_h or self.stride_w > self.kernel_w)

    def macs(self, rows: int, in_channels: int, out_channels: int) -> float:
        """Multiply-accumulates to compute ``rows`` output pixels.

        In a transposed convolution each input pixel meets every tap once: an output pixel has its share of these.
        """
        taps = self.taps
        if self.transposed:
            taps = taps * (self.in_h * self.in_w) / max(self.out_h * self.out_w, 1)
        return rows * taps * in_channels * out_channels / self.groups


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
    """Whether ``value`` is an int (or torch's symbolic one, under a tracer) and not below ``least``."""
    return (isinstance(value, int) or type(value).__name__ == "SymInt") and (least is None or value >= least)


def is_share(value) -> bool:
    """True if ``value`` is a number in [0, 1]."""
    return isinstance(value, numbers.Real) and 0 <= value <= 1


class BlockGeometry(NamedTuple):
    """Equal rectangles over a map, in a grid. ``list(geometry)`` is what an op's schema takes.

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
        """Whether a pixel may lie in more than one tile."""
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
