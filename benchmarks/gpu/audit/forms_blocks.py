"""The forms of the kernels over blocks and samples, which move memory."""

from __future__ import annotations

from functools import partial

import torch

from dynops import BlockPlan, SamplePlan
from dynops.kernels.triton import blocks, rows

from .launches import Form, wide

HALF = (torch.bfloat16,)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = ("gather_tiles_kernel", "scatter_tiles_kernel")
ROWS = ("merge_rows_kernel", "scatter_rows_kernel")


def _tiles(dtype: torch.dtype, channels: int = 24, layout: torch.memory_format = torch.channels_last) -> None:
    """Gather with a halo; scatter: replacing, onto a base, and adding tiles that overlap."""
    x = torch.zeros(2, channels, 32, 32, dtype=dtype).contiguous(memory_format=layout)
    plan = BlockPlan.from_mask(torch.ones(2, 32, 32), 8)
    g = plan.geometry.widened((1, 1, 1, 1))
    tiles = blocks.gather_tiles(x, plan.index, None, list(g))
    inner = tiles[:, :, 1:-1, 1:-1]
    blocks.scatter_tiles(inner, plan.index, None, list(plan.geometry), None, False)
    blocks.scatter_tiles(inner, plan.index, None, list(plan.geometry), x, False)
    blocks.scatter_tiles(tiles, plan.index, None, list(g), None, True)
    blocks.scatter_tiles(tiles, plan.index, None, list(g), x, True)


def _samples(dtype: torch.dtype, columns: int = 16 * 2048) -> None:
    """Merged: as they are, scaled, and mixed with the base; and scattered."""
    plan, x = SamplePlan.full(4), torch.zeros(4, columns, dtype=dtype)
    for scale, mix in ((None, False), (torch.zeros(4), False), (torch.zeros(4), True)):
        rows.merge_rows(x, plan.index, None, x, scale, mix)
    rows.scatter_rows(x, plan.index, None, [4, 1, 1], None)


FORMS = (
    Form("tiles", _tiles, TYPES, vectors=BLOCKS),
    Form("tiles, 64-bit offsets", wide(_tiles), HALF, vectors=BLOCKS),
    Form("tiles, NCHW", partial(_tiles, layout=torch.contiguous_format)),
    Form("samples", _samples, vectors=ROWS),
    Form("samples of 19 values", partial(_samples, columns=19)),
    Form("samples, 64-bit offsets", wide(_samples), HALF, vectors=ROWS),
)
