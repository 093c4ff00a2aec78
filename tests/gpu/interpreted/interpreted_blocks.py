"""Values of the block kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

import os

import block_conv_launches
import interpreter
import pytest
import torch
from block_cases import CASES, Inputs, check_gather, check_scatter, of_cases
from torch import nn

from dynops import BlockPlan, backends
from dynops.kernels.triton import blocks, gemm, rows, tiling
from dynops.nn import SparseBlocks
from dynops.ops import blocks as reference
from dynops.stack.layers.conv import Conv
from dynops.testing import random_mask, random_tensor

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


@pytest.mark.skipif(not INTERPRETED, reason="test_blocks.py has the layers")
def test_layers_and_gradients(monkeypatch):
    """nn.SparseBlocks of one convolution, fused without gradients; and the gradients of the op."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 1))
    monkeypatch.setattr(backends, "choose", lambda *arguments: "triton")
    monkeypatch.setattr(Conv, "takes_blocks", lambda *arguments: True)
    interpreter.launched.clear()
    x = random_tensor(2, 16, 20, 12, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    plan = BlockPlan.from_mask(random_mask((2, 20, 12), 0.02), 8, capacity=7)
    active = plan.mask()[:, None]
    conv = nn.Conv2d(16, 16, 3, padding=2, dilation=2).half()
    fused = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU()).half().eval()
    with torch.no_grad():
        torch.testing.assert_close(SparseBlocks(fused, 8)(x, plan, base="input"), torch.where(active, fused(x), x), rtol=0.01, atol=0.01)  # fmt: skip
    leaves = [t.detach().requires_grad_() for t in (x, conv.weight, conv.bias)]
    results = []
    for run in (SparseBlocks(conv, 8), lambda x, plan: torch.where(active, conv(x), 0)):
        out = run(leaves[0], plan)
        results.append((out, *torch.autograd.grad(out, [leaves[0], *conv.parameters()], x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.01, atol=0.02)
    assert "dynops.kernels.triton.blocks.block_conv_kernel" in interpreter.launched
    assert "dynops.kernels.triton.pixels.conv_kernel" not in interpreter.launched
