"""The work of stacks of layers on active blocks. See ``work.py``; a shape is a :class:`benchmarks.blocks.Case`.

Norms and activations are counted as fused into the layer before them, for the dense stack too; a bottleneck's shortcut as
read once more, with its last convolution.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from dynops import BlockPlan

from .. import masks
from ..blocks import Case, bottleneck, chain, conv3x3, pooled
from .work import INDEX, Step, fill, inverse_index, mask_to_index, needed_mask


class Layer(NamedTuple):
    """A convolution, or with no output channels of its own (``pool``) a max-pool; padding keeps H / stride."""

    c: int
    o: int
    kernel: int
    stride: int = 1
    pool: bool = False

    @property
    def macs(self) -> int:
        """Of one output pixel."""
        return 0 if self.pool else self.kernel**2 * self.c * self.o

    @property
    def weights(self) -> int:
        return 0 if self.pool else self.kernel**2 * self.c * self.o


def stack(case: Case) -> list[Layer]:
    """The layers of the case's ``build``."""
    c = case.channels
    layers = {
        conv3x3: [Layer(c, c, 3)],
        bottleneck: [Layer(c, c // 4, 1), Layer(c // 4, c // 4, 3), Layer(c // 4, c, 1)],
        chain: [Layer(c, c, 3), Layer(c, c, 3)],
        pooled: [Layer(c, c, 3), Layer(c, c, 2, 2, pool=True), Layer(c, c, 3)],
    }
    return layers[case.build]


def out_size(case: Case) -> tuple[int, int]:
    stride = math.prod(layer.stride for layer in stack(case))
    return case.h // stride, case.w // stride


# ------------------------------------------------------------------------------------------ dense


def dense(case: Case, size: int) -> list[Step]:
    h, w, steps = case.h, case.w, []
    for layer in stack(case):
        pixels, h, w = case.n * h * w, h // layer.stride, w // layer.stride
        steps.append(_product(layer, pixels, case.n * h * w, size, "dense"))
    return _with_shortcut(case, steps, case.n * h * w, size)


def _product(layer: Layer, read_pixels: float, rows: float, size: int, name: str = "product") -> Step:
    read = (read_pixels * layer.c + layer.weights) * size
    return Step(name, 2 * rows * layer.macs, read, rows * layer.o * size, "conv" if layer.macs else "vector")


def _with_shortcut(case: Case, steps: list[Step], rows: float, size: int) -> list[Step]:
    """``steps`` whose last one reads the stack's input too, where there is a shortcut."""
    if case.build is not bottleneck:
        return steps
    return [*steps[:-1], steps[-1]._replace(read=steps[-1].read + rows * case.channels * size)]


# ------------------------------------------------------------------------------------ tiles with halo


def gather_tiles(tiles: float, channels: int, tile: int, map_pixels: int, size: int) -> Step:
    """Tiles may overlap and reach over the edge: no more than the map is read."""
    pixels = tiles * tile**2
    read = min(pixels, map_pixels) * channels * size + INDEX * tiles
    return Step("gather tiles", read=read, written=pixels * channels * size)


def scatter_tiles(
    tiles: float, channels: int, block: int, map_pixels: int, blocks: int, size: int
) -> list[Step]:
    """Every pixel of the map is written once, from its tile or as zero; ``blocks``: of the grid."""
    row = channels * size
    step = Step("scatter tiles", read=tiles * block**2 * row + INDEX * blocks, written=map_pixels * row)
    return [*inverse_index(blocks, tiles), step]


def tile_path(case: Case, block: int, tiles: int, size: int) -> list[Step]:
    """A mask to the output by tiles: each layer computes what the later ones read of each tile, the halo with it."""
    layers, (h, w) = stack(case), out_size(case)
    sides = [block]
    for layer in reversed(layers):
        sides.insert(0, (sides[0] - 1) * layer.stride + layer.kernel)
    blocks, pixels = case.n * -(-h // block) * -(-w // block), case.n * h * w
    steps = [
        _product(layer, tiles * sides[i] ** 2, tiles * sides[i + 1] ** 2, size)
        for i, layer in enumerate(layers)
    ]
    steps = _with_shortcut(case, steps, tiles * block**2, size)
    gathered = gather_tiles(tiles, case.channels, sides[0], case.n * case.h * case.w, size)
    scattered = scatter_tiles(tiles, layers[-1].o, block, pixels, blocks, size)
    return [*_block_plan(pixels, blocks, tiles), gathered, *steps, *scattered]


def _block_plan(pixels: int, blocks: int, active: float) -> list[Step]:
    """The mask is reduced to one of blocks, and that one made an index."""
    return [Step("reduce mask", read=pixels, written=blocks), *mask_to_index(blocks, active)]


# ------------------------------------------------------------------------------------- packed rows


def row_path(case: Case, mask: str, density: float, block: int, size: int) -> list[Step]:
    """A mask to the output by packed rows: each layer computes the pixels that a later one reads, and no halo twice."""
    layers, (h, w) = stack(case), out_size(case)
    rows = active_rows(case, mask, density, block)  # of the input, then of each layer's output
    pixels, blocks = case.n * h * w, case.n * -(-h // block) * -(-w // block)
    steps = [*_block_plan(pixels, blocks, rows[-1] / block**2), Step("pixels", written=INDEX * rows[-1])]
    products = []
    for i, layer in enumerate(layers):
        product = _product(layer, rows[i], rows[i + 1], size)
        product = product._replace(read=product.read + INDEX * rows[i + 1])
        if i and layer.kernel > 1:  # the rows before it have a plan of their own, and a map of it is read
            steps += [*needed_mask(pixels, rows[i + 1], rows[i]), *mask_to_index(pixels, rows[i])]
            steps += inverse_index(pixels, rows[i])
            product = product._replace(read=product.read + INDEX * rows[i])
        products.append(product)
    products = _with_shortcut(case, products, rows[-1], size)
    return [*steps, *products[:-1], fill(pixels * layers[-1].o * size), products[-1]]


@functools.lru_cache(maxsize=1024)
def active_blocks(case: Case, mask: str, density: float, block: int) -> int:
    return _plan(case, mask, density, block).index.shape[0]


@functools.lru_cache(maxsize=1024)
def active_rows(case: Case, mask: str, density: float, block: int) -> list[int]:
    """Pixels that the stack reads of its input, and that each layer computes, counted on a mask."""
    plan = _plan(case, mask, density, block).pixels()
    rows = [plan.num_rows]
    for layer in reversed(stack(case)):
        padding = layer.kernel // 2 if not layer.pool else 0
        plan = plan.needed(layer.kernel, layer.stride, padding)
        rows.insert(0, plan.num_rows)
    return rows


def _plan(case: Case, mask: str, density: float, block: int) -> BlockPlan:
    made = masks.MASKS[mask](case.n, *out_size(case), density, torch.Generator().manual_seed(0))
    return BlockPlan.from_mask(made, block)
