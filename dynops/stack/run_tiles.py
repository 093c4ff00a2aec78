"""Runs a stack on tiles: the input's blocks with their halo, through torch's own layers.

A tile that lies over the edge of the map holds values of no meaning there, where the next dense layer would read its
padding. So before such a layer that part is set to the padding: zero, -inf or the nearest pixel. Most tiles have no
such part, those at the border a few rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..geometry import BlockGeometry
from ..ops.blocks import _gather, _scatter
from ..plans import BlockPlan
from .graph import Stack
from .layers.base import spans_of
from .receptive_field import Span
from .run_rows import checked_base

_FILLS = {"zero": 0.0, "-inf": float("-inf")}


class Layout(NamedTuple):
    """The places of every value's tiles, for one input size and one grid of blocks."""

    sizes: dict[int, tuple[int, int]]  # (H, W) of each value
    maps: dict[int, BlockGeometry]  # the tiles of each value
    crops: tuple[tuple, ...]  # for each layer and input: (y, x, height, width) of what it reads, or None
    outside: tuple[bool, ...]  # for each layer: whether it reads outside the map


def layout_of(stack: Stack, sizes: dict[int, tuple[int, int]], blocks: BlockGeometry) -> Layout:
    """The layout for values of these sizes and the grid ``blocks`` of the output."""
    spans: dict[int, tuple[Span, Span]] = {stack.output: spans_of(blocks)}
    reads = []
    for layer in reversed(stack.layers):
        reads.append(
            [
                tuple(reach[i].span(spans[layer.out][i]) for i in (0, 1))
                for _, reach in zip(layer.inputs, layer.reaches, strict=False)
            ]
        )
        for value, read in zip(layer.inputs, reads[-1], strict=True):
            known = spans.get(value, read)
            spans[value] = tuple(a.union(b) for a, b in zip(known, read, strict=True))
    reads = reads[::-1]
    crops = tuple(
        tuple(_crop(spans[v], read) for v, read in zip(layer.inputs, read_by, strict=True))
        for layer, read_by in zip(stack.layers, reads, strict=True)
    )
    maps = {v: _map(blocks, sizes[v], spans[v]) for v in spans}
    outside = tuple(bool(layer.outside) and _reads_outside(layer, sizes) for layer in stack.layers)
    return Layout(sizes, maps, crops, outside)


def _crop(held: tuple[Span, Span], read: tuple[Span, Span]):
    if held == read:
        return None
    return (read[0].first - held[0].first, read[1].first - held[1].first, read[0].size, read[1].size)


def _map(blocks: BlockGeometry, size: tuple[int, int], spans: tuple[Span, Span]) -> BlockGeometry:
    y, x = spans
    grid = (blocks.batch, *size, blocks.grid_h, blocks.grid_w)
    return BlockGeometry(*grid, y.step, x.step, y.first, x.first, y.size, x.size)


def _reads_outside(layer, sizes: dict[int, tuple[int, int]]) -> bool:
    """True where some pixel of the whole output reads outside the layer's first input."""
    out, size = sizes[layer.out], sizes[layer.inputs[0]]
    for i, reach in enumerate(layer.reaches[0]):
        read = reach.span(Span(0, out[i], 0))
        if read.first < 0 or read.end > size[i]:
            return True
    return False


# ---------------------------------------------------------------------------------- running


def run_tiles(stack: Stack, layout: Layout, x: Tensor, plan: BlockPlan, base: Tensor | None) -> Tensor:
    """The output of a stack at the blocks of ``plan``, ``base`` (or zero) elsewhere: ``[N, O, H, W]``."""
    blocks = Blocks(plan, layout)
    env = {0: _gather(x, plan.index, plan.count, layout.maps[0])}
    filled = {0: "zero"}  # for each value, what it is outside the map, where that is known
    for i, layer in enumerate(stack.layers):
        value, out = layer.inputs[0], layer.out
        if layout.outside[i] and filled.get(value) != layer.outside:
            env[value] = blocks.fill(env[value], layout.maps[value], layer.outside)
            filled[value] = layer.outside
        inputs = [_cropped(env[v], crop) for v, crop in zip(layer.inputs, layout.crops[i], strict=True)]
        env[out] = layer.tiles(inputs, layout.maps[out], blocks)
        if layout.outside[i] and layer.outside == "-inf":  # which must not meet a gradient of zero
            env[out], filled[out] = blocks.fill(env[out], layout.maps[out], "zero"), "zero"
        for last in layer.free:
            del env[last]
    tiles = _cropped(env[stack.output], _crop(spans_of(layout.maps[stack.output]), spans_of(plan.geometry)))
    if base is not None:
        base = checked_base(base, x, plan, tiles.shape[1], tiles.dtype)
    return _scatter(tiles, plan.index, plan.count, plan.geometry, base, False)


def _cropped(tiles: Tensor, crop) -> Tensor:
    if crop is None:
        return tiles
    y, x, height, width = crop
    return tiles[:, :, y : y + height, x : x + width]


class Blocks:
    """The places of one plan's tiles, and what of them lies outside a map."""

    def __init__(self, plan: BlockPlan, layout: Layout):
        self.plan, self.layout = plan, layout
        self._at: dict[int, Tensor] = {}
        self._in_line: dict[tuple[int, int], Tensor] = {}

    def size_of(self, value: int) -> tuple[int, int]:
        return self.layout.sizes[value]

    def at(self, axis: int) -> Tensor:
        """int64 ``[B]``: the row (axis 0) or column (1) of each tile in the grid."""
        if axis not in self._at:
            g, index = self.plan.geometry, self.plan.index.long().clamp(min=0)
            self._at[axis] = index % g.grid_w if axis else index // g.grid_w % g.grid_h
        return self._at[axis]

    def fill(self, tiles: Tensor, g: BlockGeometry, how: str) -> Tensor:
        """``tiles`` with ``how`` ("zero", "-inf", "edge") outside the map; in place where that is safe."""
        lines = [_lines_outside(span, grid, size) for span, grid, size in _axes(g)]
        if not any(lines):
            return tiles
        if tiles.device.type != "cpu" or torch.is_grad_enabled() or not modes.plain(tiles):
            return self._filled(tiles, g, how)
        for axis, outside in enumerate(lines):
            for line, before, after in outside:
                self._fill_line(tiles, axis, line, before, after, how)
        return tiles

    def _fill_line(self, tiles: Tensor, axis: int, line: int, before: int, after: int, how: str) -> None:
        """The part outside of all tiles in one row or column of the grid."""
        which = self._in_line.get((axis, line))
        if which is None:
            which = self._in_line[axis, line] = (self.at(axis) == line).nonzero().flatten()
        size = tiles.shape[2 + axis]
        if which.numel() == 0 or (how == "edge" and before + after >= size):  # no pixel inside, none read
            return
        view = tiles if axis == 0 else tiles.transpose(2, 3)
        for part, edge in ((slice(0, before), before), (slice(size - after, size), size - after - 1)):
            if part.start < part.stop:
                view[which, :, part] = (
                    view[which, :, edge : edge + 1] if how == "edge" else view.new_tensor(_FILLS[how])
                )

    def _filled(self, tiles: Tensor, g: BlockGeometry, how: str) -> Tensor:
        """As :meth:`fill`, a new tensor with a gradient."""
        at = [
            self.at(axis)[:, None] * span.step + span.first + torch.arange(span.size, device=tiles.device)
            for axis, (span, _, _) in enumerate(_axes(g))
        ]
        if how == "edge":
            for axis, (span, _, size) in enumerate(_axes(g)):
                start = (self.at(axis) * span.step + span.first)[:, None]
                near = (at[axis].clamp(0, size - 1) - start).clamp(0, span.size - 1)
                near = near[:, None, :, None] if axis == 0 else near[:, None, None]
                tiles = tiles.gather(2 + axis, near.expand_as(tiles))
            return tiles
        y, x = ((a < 0) | (a >= size) for a, size in zip(at, (g.height, g.width), strict=True))
        return tiles.masked_fill(y[:, None, :, None] | x[:, None, None], _FILLS[how])


def _axes(g: BlockGeometry):
    """Returns for y and x the span, the blocks of the grid and the size of the map."""
    y, x = spans_of(g)
    return (y, g.grid_h, g.height), (x, g.grid_w, g.width)


def _lines_outside(span: Span, grid: int, size: int) -> list[tuple[int, int, int]]:
    """The rows (columns) of the grid whose tiles lie over the border, with the pixels before and after it."""
    lines = []
    for line in range(grid):
        start = span.first + line * span.step
        before, after = max(-start, 0), max(start + span.size - size, 0)
        if before or after:
            lines.append((line, min(before, span.size), min(after, span.size)))
    return lines
