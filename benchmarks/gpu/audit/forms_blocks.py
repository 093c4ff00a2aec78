"""The forms of the kernels over blocks, and of those over samples, which move memory."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from dynops import BlockPlan, SamplePlan
from dynops.geometry import ConvGeometry
from dynops.kernels.triton import blocks, rows

from .launches import Form, wide

HALF = (torch.bfloat16,)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = ("gather_tiles_kernel", "scatter_tiles_kernel")
CONV = ("block_conv_kernel",)
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


def _convolution(
    dtype: torch.dtype, channels: int = 256, block: int = 16, kernel: int = 3, capacity: bool = False, epilogue: bool = False,
    transposed: bool = False,
) -> None:  # fmt: skip
    """A convolution at the blocks of a small map; ``transposed``: as an input's gradient has it."""
    g = ConvGeometry(2, 32, 32, 32, 32, kernel, kernel, 1, 1, *[kernel // 2] * 2, 1, 1, 1, transposed)
    weight = torch.zeros(channels, channels, kernel, kernel, dtype=dtype)
    x = torch.zeros(2, channels, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plan = BlockPlan.from_mask(torch.ones(2, 32, 32), block, capacity=8 if capacity else None)
    where, vector = (plan.index, plan.count, plan.geometry, g), torch.zeros(channels, dtype=dtype)
    finish = ("silu", vector, vector, x) if epilogue else ("", None, None, None)
    if blocks.fits(x.device, dtype, weight, g):
        with mock.patch.object(rows, "_LARGE", 0):
            blocks.conv(x, weight, vector if epilogue else None, *where, *finish, x if epilogue else None)


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
    Form("convolution", _convolution, HALF, every_tile=HALF, vectors=CONV),
    Form("convolution, capacity", partial(_convolution, capacity=True), HALF, every_tile=HALF, vectors=CONV),
    Form("convolution, epilogue", partial(_convolution, epilogue=True), HALF, every_tile=HALF, vectors=CONV),
    Form(
        "convolution, capacity, epilogue",
        partial(_convolution, capacity=True, epilogue=True),
        HALF,
        vectors=CONV,
    ),
    Form(
        "convolution, gradient",
        partial(_convolution, capacity=True, transposed=True),
        HALF,
        every_tile=HALF,
        vectors=CONV,
    ),
    Form(
        "convolution of 8x8 blocks",
        partial(_convolution, channels=64, block=8),
        (torch.float16,),
        vectors=CONV,
    ),
    Form("convolution, 48 channels", partial(_convolution, channels=48), HALF, vectors=CONV),
    Form("convolution, 64-bit offsets", wide(_convolution), HALF, vectors=CONV),
    Form("samples", _samples, vectors=ROWS),
    Form("samples of 19 values", partial(_samples, columns=19)),
    Form("samples, 64-bit offsets", wide(_samples), HALF, vectors=ROWS),
)
