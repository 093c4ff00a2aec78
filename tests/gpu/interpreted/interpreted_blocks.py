"""Values of the block kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

import os

import block_conv_launches
import interpreter  # noqa: F401 (mends and checks the interpreter)
import pytest
import torch
from block_cases import CASES, Inputs, check_gather, check_scatter, of_cases

from dynops.kernels.triton import blocks, gemm, rows, tiling
from dynops.ops import blocks as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.usefixtures("poisoned")


@of_cases
def test_gather(case, dtype, nchw):
    check_gather(blocks, case, dtype, nchw, DEVICE)


@of_cases
def test_scatter(case, dtype, nchw):
    check_scatter(blocks, case, dtype, nchw, DEVICE)


@pytest.mark.parametrize("name", ["plain", "uneven-halo", "wide-halo", "capacity"])
def test_int64_offsets(name, monkeypatch):
    """What tensors past 2**31 elements take."""
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    for nchw in (False, True):
        check_gather(blocks, CASES[name], torch.bfloat16, nchw, DEVICE)
        check_scatter(blocks, CASES[name], torch.bfloat16, nchw, DEVICE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64], ids=str)
def test_copies_any_dtype(dtype):
    for nchw in (False, True):
        check_gather(blocks, CASES["plain"], dtype, nchw, DEVICE)
        t = Inputs(CASES["plain"], dtype, nchw, DEVICE)
        for base in (None, t.base):
            arguments = (t.tiles, t.index, t.count, list(t.g), base, False)
            assert torch.equal(blocks.scatter_tiles(*arguments), reference._scatter_tiles(*arguments))


def test_units_are_as_wide_as_edges_allow():
    plain, halo = CASES["plain"].geometry, CASES["halo"].geometry
    for g, elements, size, unit in (
        (plain, 1, 2, 8),
        (plain, 1, 4, 4),
        (halo, 1, 4, 1),
        (halo, 64, 2, 8),
        (halo, 6, 2, 2),
    ):
        units, got = blocks.in_units(g, elements, size)
        assert got == unit and units.width * unit == g.width * elements


@pytest.mark.skipif(not INTERPRETED, reason="test_blocks.py has the layers")
@pytest.mark.parametrize("name", block_conv_launches.CASES)
def test_conv(name, monkeypatch):
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 1))
    for dtype in (torch.float16, torch.bfloat16)[: 2 if name == "3x3" else 1]:
        block_conv_launches.check(block_conv_launches.CASES[name], dtype)


@pytest.mark.skipif(not INTERPRETED, reason="test_blocks.py has the layers")
@pytest.mark.parametrize("name", ["3x3", "offset", "capacity-exceeded", "ragged-blocks"])
def test_large_maps_are_filled_around_the_blocks(name, monkeypatch):
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 1))
    monkeypatch.setattr(rows, "_LARGE", 1)
    block_conv_launches.check(block_conv_launches.CASES[name], torch.float16)
