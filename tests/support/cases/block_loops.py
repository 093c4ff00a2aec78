"""Blocks of a map one at a time, in loops: plans, gathered and scattered tiles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import BlockPlan
from dynops.geometry import BlockGeometry

MASK_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
FLOATS = MASK_DTYPES[6:]
KINDS = ["random", "square", "one", "empty", "full"]
SHAPE = (2, 11, 13)


def corners(plan: BlockPlan, halo=(0, 0, 0, 0)) -> list[tuple[int, int, int]]:
    """(n, y, x) of the first pixel of each active tile."""
    g = plan.geometry
    active = [i for i in plan.index.tolist() if i >= 0]
    at = [(i // (g.grid_h * g.grid_w), i // g.grid_w % g.grid_h, i % g.grid_w) for i in active]
    return [(n, g.first_h + by * g.step_h - halo[0], g.first_w + bx * g.step_w - halo[2]) for n, by, bx in at]


MARGIN = 48  # more than any tile here lies over the edge


def slow_gather(x: Tensor, plan: BlockPlan, halo=(0, 0, 0, 0)) -> Tensor:
    height, width = plan.block_size[0] + halo[0] + halo[1], plan.block_size[1] + halo[2] + halo[3]
    padded = F.pad(x, (MARGIN,) * 4)
    tiles = [
        padded[n, :, y + MARGIN : y + MARGIN + height, x0 + MARGIN : x0 + MARGIN + width]
        for n, y, x0 in corners(plan, halo)
    ]
    unused = [x.new_zeros(x.shape[1], height, width)] * (len(plan) - len(tiles))
    return torch.stack(tiles + unused) if len(plan) else x.new_zeros(0, x.shape[1], height, width)


def slow_scatter(tiles: Tensor, plan: BlockPlan, base: Tensor | None = None, add: bool = False) -> Tensor:
    n, h, w = plan.shape
    out = tiles.new_zeros(n, tiles.shape[1], h, w) if base is None else base
    out = F.pad(out, (MARGIN,) * 4).clone()
    for tile, (n, y, x) in zip(tiles, corners(plan), strict=False):  # unused tiles come last
        window = (n, slice(None), slice(y + MARGIN, y + MARGIN + plan.block_size[0]))
        window += (slice(x + MARGIN, x + MARGIN + plan.block_size[1]),)
        out[window] = out[window] + tile if add else tile
    return out[:, :, MARGIN : MARGIN + h, MARGIN : MARGIN + w]


def slow_blocks(mask: Tensor, g: BlockGeometry, reduce: str = "any", threshold: float = 0) -> list[int]:
    """The active blocks, one at a time."""
    values = F.pad(mask.double().abs(), (MARGIN,) * 4)
    active = []
    for i in range(g.batch * g.grid_h * g.grid_w):
        n, by, bx = i // (g.grid_h * g.grid_w), i // g.grid_w % g.grid_h, i % g.grid_w
        y, x = g.first_h + by * g.step_h + MARGIN, g.first_w + bx * g.step_w + MARGIN
        block = values[n, y : y + g.tile_h, x : x + g.tile_w]
        if (block.max() if reduce == "any" else block.sum() / block.numel()) > threshold:
            active.append(i)
    return active


def slow_cover(plan: BlockPlan) -> Tensor:
    ones = torch.ones(len(plan), 1, *plan.block_size)
    return slow_scatter(ones, plan, add=True)[:, 0] > 0


BLOCK_SIZES = [1, 4, (3, 5), (1, 13), (11, 1), 16, (2, 40)]
