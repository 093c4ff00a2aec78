"""The CUDA C++ kernels of blocks, where the binary has them: prepares memory for ``csrc/cuda``.

Same signatures as the references in ``ops/blocks.py``. Kernels that need no memory prepared (plan building,
rows) the binary registers under the ops' own names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..geometry import as_block_geometry
from .layout import empty_map, memory_format_of

AVAILABLE = backends.has_binary() and hasattr(torch.ops.dynops, "cuda_gather_tiles")


def gather_tiles(x: Tensor, index: Tensor, count: Tensor | None, geometry) -> Tensor:
    """See ``ops.blocks._gather_tiles``."""
    g, layout = as_block_geometry(geometry), memory_format_of(x)
    out = empty_map(x, (index.shape[0], x.shape[1], g.tile_h, g.tile_w), layout)
    torch.ops.dynops.cuda_gather_tiles(x.contiguous(memory_format=layout), index, g, out)
    return out


def scatter_tiles(
    tiles: Tensor, index: Tensor, count: Tensor | None, geometry, base: Tensor | None, add: bool
) -> Tensor:
    """See ``ops.blocks._scatter_tiles``. Copies any dtype, adds float32, bfloat16 and float16."""
    g, layout = as_block_geometry(geometry), memory_format_of(tiles)
    out = empty_map(tiles, (g.batch, tiles.shape[1], g.height, g.width), layout)
    inverse = torch.ops.dynops.inverse_index(index, count, g.grid)
    base = None if base is None else base.contiguous(memory_format=layout)
    torch.ops.dynops.cuda_scatter_tiles(tiles.contiguous(memory_format=layout), inverse, g, base, add, out)
    return out
