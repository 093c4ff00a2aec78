"""BlockPlan: the rectangles of one resolution that are computed, each whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..geometry import BlockGeometry, pair, reach, window_count
from .collect import of_one_kind
from .derived import IndexPlan
from .masks import MAX_PIXELS, as_plan, check_expand, check_index, check_mask, check_shape, raising
from .pixels import PixelPlan

REDUCES = ("any", "mean")


class BlockPlan(IndexPlan):
    """The active blocks of one resolution.

    Attributes:
        index: int32 ``[B]``, ascending flat positions ``n*GH*GW + by*GW + bx`` of the active blocks in
            the grid. In the capacity form ``[capacity]``, where entries from ``count`` on are -1.
        geometry: the :class:`~dynops.geometry.BlockGeometry` of the grid: which pixels a block covers.
        count: ``None`` in the compact form; in the capacity form an int32 ``[1]`` tensor on the plan's
            device, the number of valid entries (see :class:`PixelPlan`).

    Paper: Ren et al., SBNet: Sparse Blocks Network (CVPR 2018).
    """

    _WHERE = "geometry"

    def __init__(self, index: Tensor, geometry: BlockGeometry, count: Tensor | None = None):
        check_index(index, count, geometry.batch * geometry.grid_h * geometry.grid_w, "[B]")
        self._set(index, geometry, count)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block_size: int | tuple[int, int],
        reduce: str = "any",
        threshold: float = 0.0,
        *,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        offset: int | tuple[int, int] = 0,
        capacity: int | None = None,
    ) -> BlockPlan:
        """Builds the plan of a mask. By default blocks tile the map; the last ones may lie over its edge.

        Args:
            mask: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[H, W]`` (batch 1), bool, integer or floating.
            block_size: pixels of a block, ``int`` or ``(height, width)``.
            reduce: "any" takes the largest absolute value of a block, "mean" their mean (pixels outside
                the map count as zero); the block is active where that exceeds ``threshold``.
            threshold: see ``reduce``. 0 with "any": active where any pixel is nonzero.
            stride: pixels from one block to the next; ``block_size`` by default. A smaller one makes
                blocks overlap, as SBNet's input blocks do.
            padding: zeros around the mask on every side.
            offset: where the first block begins in the padded mask.
            capacity: size of the capacity form; ``None`` builds the compact form (inside
                ``torch.compile`` the capacity form with room for every block).

        Raises:
            TypeError, ValueError: an argument that does not fit; a NaN in the mask (not checked where
                checking would synchronise).
        """
        mask = check_mask(mask)
        if reduce not in REDUCES:
            raise ValueError(f"reduce: expected one of {REDUCES}, got {reduce!r}")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
            raise ValueError(f"threshold: expected a number, got {threshold!r}")
        geometry = _geometry(tuple(mask.shape), block_size, stride, padding, offset)
        mean = reduce == "mean"
        blocks = raising(torch.ops.dynops.block_mask.default, mask, geometry, mean, float(threshold))
        return cls._of(blocks, geometry, capacity)

    @classmethod
    def _of(cls, blocks: Tensor, geometry: BlockGeometry, capacity: int | None) -> BlockPlan:
        plan = PixelPlan.from_mask(blocks, capacity)  # the grid is a map of blocks
        return cls._made(plan.index, geometry, plan.count)

    @classmethod
    def cat(cls, plans: Iterable[BlockPlan]) -> BlockPlan:
        """The plan of several batches one after the other: see :meth:`PixelPlan.cat`. Their blocks must be alike."""
        plans = of_one_kind(plans, BlockPlan, grid=lambda plan: plan.geometry._replace(batch=0))
        grids = PixelPlan.cat([plan._grid() for plan in plans])
        batch = sum(plan.shape[0] for plan in plans)
        return cls._made(grids.index, plans[0].geometry._replace(batch=batch), grids.count)

    def _grid(self) -> PixelPlan:
        """The blocks as the pixels of a map ``[N, 1, GH, GW]``."""
        return PixelPlan._made(self.index, self.geometry.grid, self.count)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        shape: tuple[int, int, int],
        block_size: int | tuple[int, int],
        capacity: int | None = None,
    ) -> BlockPlan:
        """The plan of a mask of blocks ``[N, ceil(H / block), ceil(W / block)]`` over a map ``(N, H, W)``."""
        blocks = check_mask(blocks, "blocks")
        geometry = _geometry(check_shape(shape), block_size, None, 0, 0)
        if tuple(blocks.shape) != geometry.grid:
            raise ValueError(f"blocks: expected shape {geometry.grid}, got {tuple(blocks.shape)}")
        return cls._of(blocks, geometry, capacity)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, H, W)``, the resolution that the plan is for."""
        return self.geometry.shape

    @property
    def block_size(self) -> tuple[int, int]:
        return self.geometry.tile_h, self.geometry.tile_w

    @property
    def num_blocks(self) -> int:
        """Tiles of a packed tensor on this plan: the active blocks, or the capacity."""
        return self.index.shape[0]

    @property
    def num_all(self) -> int:
        """All blocks of the grid."""
        n, h, w = self.geometry.grid
        return n * h * w

    def blocks(self) -> Tensor:
        """The active blocks as a bool mask ``[N, GH, GW]``."""
        return self._grid().mask()

    def mask(self) -> Tensor:
        """The pixels that active blocks cover, bool ``[N, H, W]``."""
        return torch.ops.dynops.block_cover(self.index, self.count, list(self.geometry))

    def pixels(self) -> PixelPlan:
        """The :class:`PixelPlan` of the pixels that active blocks cover (kept)."""
        return self.derived("pixels", self._make_pixels)

    def _make_pixels(self) -> PixelPlan:
        if self.count is not None or modes.sizes_are_fixed(self.index):
            mask, area = self.mask(), self.block_size[0] * self.block_size[1]
            return PixelPlan.from_mask(mask, mask.numel())._expecting(self.index.shape[0] * area)
        return PixelPlan._made(torch.ops.dynops.block_pixels.default(self.index, self.geometry), self.shape)

    def through(self, kernel_size, stride=1, padding=0, dilation=1) -> BlockPlan:
        """The output blocks of a convolution without padding of these tiles: SBNet's way from input to output.

        Args:
            kernel_size, stride, padding, dilation: as in ``nn.Conv2d``, on the whole map; ``padding`` is
                what the plan's own blocks reach over the edge (``from_mask(..., padding=padding)``).

        Raises:
            ValueError: tiles that do not hold a whole number of outputs, or do not meet the next one's.
        """
        kernel, stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
        padding, dilation = pair(padding, "padding", 0), pair(dilation, "dilation", 1)
        g = self.geometry
        axes = (
            _Axis(g.height, g.grid_h, g.step_h, g.first_h, g.tile_h),
            _Axis(g.width, g.grid_w, g.step_w, g.first_w, g.tile_w),
        )
        down, across = (axes[i].through(kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
        sizes = (size for both in zip(down, across, strict=True) for size in both)
        return BlockPlan._made(self.index, BlockGeometry(g.batch, *sizes), self.count)

    def expand(self, batch: int) -> BlockPlan:
        """This plan, of a batch of 1, for every sample of a batch: see :meth:`PixelPlan.expand`."""
        if batch == self.shape[0]:
            return self
        check_expand(self, batch, max(self.num_all, self.shape[1] * self.shape[2]))
        grid = self._grid().expand(batch)
        return BlockPlan._made(grid.index, self.geometry._replace(batch=batch), grid.count)

    def __len__(self) -> int:
        return self.num_blocks

    def __repr__(self) -> str:
        form = "" if self.count is None else ", capacity form"
        return f"BlockPlan({self.num_blocks} of {self.num_all} blocks of {self.block_size}, shape={self.shape}{form})"


class _Axis(NamedTuple):
    """One dimension of a grid, in the order of :class:`BlockGeometry`."""

    size: int
    grid: int
    step: int
    first: int
    tile: int

    def through(self, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        """The outputs of a convolution of every tile by itself."""
        extent, padded = reach(kernel, dilation), self.size + 2 * padding
        room, offset = self.tile - extent, self.first + padding
        if extent > padded:
            raise ValueError(f"kernel_size: expected a reach of at most {padded} pixels, got {extent}")
        if room < 0 or room % stride:
            raise ValueError(
                f"block_size: expected {extent} and a multiple of stride {stride}, got {self.tile}"
            )
        if self.grid > 1 and self.step != room + stride:
            raise ValueError(
                f"stride: expected blocks {room + stride} apart for outputs that meet, got {self.step}"
            )
        if offset % stride:
            raise ValueError(f"offset: expected a multiple of stride {stride}, got {offset}")
        outputs = window_count(self.tile, kernel, stride, dilation=dilation)
        size = window_count(self.size, kernel, stride, padding, padding, dilation)
        return _Axis(size, self.grid, outputs, offset // stride, outputs)


def _geometry(shape: tuple[int, int, int], block_size, stride, padding, offset) -> BlockGeometry:
    """The grid: as many blocks as cover the padded map from the offset on."""
    size = pair(block_size, "block_size", 1)
    step = size if stride is None else pair(stride, "stride", 1)
    padding, offset = pair(padding, "padding", 0), pair(offset, "offset")
    grid = []
    for i in (0, 1):
        left = shape[1 + i] + 2 * padding[i] - offset[i]
        covers = shape[1 + i] > 0 and left > 0
        grid.append(1 + max(-(-(left - size[i]) // step[i]), 0) if covers else 0)
    if shape[0] * max(shape[1] * shape[2], grid[0] * grid[1]) > MAX_PIXELS:
        raise ValueError(
            f"block_size: expected at most {MAX_PIXELS} pixels and blocks, got {shape} in {(shape[0], *grid)}"
        )
    first = (offset[0] - padding[0], offset[1] - padding[1])
    return BlockGeometry(*shape, *grid, *step, *first, *size)


def widen_mask(mask: Tensor, block_size: int | tuple[int, int]) -> Tensor:
    """``mask`` bool ``[N, H, W]`` with every block that holds an active pixel filled; no synchronisation."""
    size = [min(b, max(s, 1)) for b, s in zip(pair(block_size, "block_size", 1), mask.shape[1:], strict=True)]
    geometry = _geometry(tuple(mask.shape), size, None, 0, 0)
    blocks = torch.ops.dynops.block_mask(mask, list(geometry), False, 0.0)
    wide = blocks.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)
    return wide[:, : mask.shape[1], : mask.shape[2]].contiguous()


def changed_blocks(
    previous: Tensor,
    current: Tensor,
    block_size: int | tuple[int, int],
    tolerance: float = 0.0,
    layer=None,
) -> BlockPlan:
    """The blocks where two maps differ, such as two frames of a video or an image and its edit.

    With ``layer`` the plan is of the layer's output, every block that reads a changed pixel, so that
    with ``tolerance=0`` a stream computes only changes::

        plan = changed_blocks(previous, current, layer.block_size, layer=layer)
        output = layer(current, plan, base=output)  # layer(current), up to rounding

    With a tolerance, pass as ``previous`` the pixels that the kept output was computed from: against the
    frame before, changes below the tolerance would add up unseen.

    Args:
        previous, current: ``[N, C, H, W]`` of one shape, dtype and device.
        block_size: pixels of a block, ``int`` or ``(height, width)``; with a layer, the layer's.
        tolerance: a pixel has changed if any channel differs by more than this, or is NaN in either map.
        layer: the :class:`dynops.nn.SparseBlocks` that reads the maps.

    Returns:
        The plan of the maps' resolution, or of the layer's output. Compact (capacity form inside
        ``torch.compile``).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_maps(previous, current)
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance!r}")
    size = pair(block_size, "block_size", 1)
    changed = _changed(previous.detach(), current.detach(), tolerance)
    if layer is None:
        return BlockPlan.from_mask(changed, size)
    if not hasattr(layer, "affected"):
        raise TypeError(f"layer: expected a dynops.nn.SparseBlocks, got {type(layer).__name__}")
    plan = layer.affected(changed)
    if plan.block_size != size:
        raise ValueError(f"block_size: expected the layer's {plan.block_size}, got {block_size!r}")
    return plan


def _check_maps(previous: Tensor, current: Tensor) -> None:
    for name, value in (("previous", previous), ("current", current)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor [N, C, H, W], got {type(value).__name__}")
        if value.dim() != 4:
            raise ValueError(f"{name}: expected [N, C, H, W], got shape {tuple(value.shape)}")
    if current.shape != previous.shape:
        raise ValueError(
            f"current: expected the shape of previous {tuple(previous.shape)}, got {tuple(current.shape)}"
        )
    if current.dtype != previous.dtype:
        raise TypeError(f"current: expected the dtype of previous {previous.dtype}, got {current.dtype}")
    if current.device != previous.device:
        raise ValueError(
            f"current: expected it on the device of previous {previous.device}, got {current.device}"
        )


def _changed(previous: Tensor, current: Tensor, tolerance: float) -> Tensor:
    """bool ``[N, H, W]``: where any channel differs by more than the tolerance, or is NaN."""
    if tolerance == 0:
        return (previous != current).any(1)
    # unsigned integers would wrap and halves round their difference to the tolerance
    wide = (
        torch.promote_types(previous.dtype, torch.float32) if previous.is_floating_point() else torch.float64
    )
    return ~((previous.to(wide) - current.to(wide)).abs() <= tolerance).all(1)


def as_block_plan(
    mask_or_plan, block_size, name: str = "mask_or_plan", batch: int | None = None
) -> BlockPlan:
    """A :class:`BlockPlan`: a plan as it is, whatever its blocks, or the plan of a mask.

    One for a single sample is that of every sample of ``batch``.
    """
    return as_plan(BlockPlan, mask_or_plan, name, block_size, batch=batch)
