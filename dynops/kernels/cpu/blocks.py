"""The C++ copies of tiles. Same signatures as the references in ``ops/blocks.py``."""

from __future__ import annotations

from torch import Tensor

from ...geometry import as_block_geometry
from ..layout import empty_map, memory_format_of
from .engine import CPP


def gather_tiles(x: Tensor, index: Tensor, count: Tensor | None, geometry) -> Tensor:
    """See ``ops.blocks._gather_tiles``."""
    g, layout = as_block_geometry(geometry), memory_format_of(x)
    out = empty_map(x, (index.shape[0], x.shape[1], g.tile_h, g.tile_w), layout)
    CPP.gather_tiles(x.contiguous(memory_format=layout), index, count, g, out)
    return out


def scatter_tiles(
    tiles: Tensor, index: Tensor, count: Tensor | None, geometry, base: Tensor | None, add: bool
) -> Tensor:
    """See ``ops.blocks._scatter_tiles``. Copies any dtype, adds float32, bfloat16 and float16."""
    g, layout = as_block_geometry(geometry), memory_format_of(tiles)
    out = empty_map(tiles, (g.batch, tiles.shape[1], g.height, g.width), layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    CPP.scatter_tiles(tiles.contiguous(memory_format=layout), index, count, g, base, add, out)
    return out
