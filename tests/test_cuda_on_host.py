"""Values of the CUDA C++ kernels of blocks and experts on a CPU, thread after thread; on a GPU, where there is one, there.

The kernels share no memory between threads, so that a host compiler can run them as they are.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from block_cases import CASES, Inputs, check_gather, check_scatter, of_cases
from guards import between_guards, guards_are_whole

from dynops.geometry import BlockGeometry
from dynops.kernels import cuda
from dynops.kernels.layout import memory_format_of
from dynops.ops import blocks as reference
from dynops.ops import index as index_reference
from dynops.testing import random_mask, random_tensor

NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.usefixtures("poisoned"),
]
NARROW = 2**30  # as in blocks.cu


def pointer(x: torch.Tensor | None):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


class Host:
    """The launchers of ``csrc/cuda/blocks.cu``, as ``blocks_on_host.cpp`` has them."""

    def __init__(self, library: ctypes.CDLL, limit: int = NARROW):
        self.library, self.limit = library, ctypes.c_int64(limit)

    def gather_tiles(self, x, index, count, geometry):
        g, layout = BlockGeometry(*geometry), memory_format_of(x)
        out = torch.empty((len(index), x.shape[1], g.tile_h, g.tile_w), dtype=x.dtype, memory_format=layout)
        if x.numel() == 0:
            return out.zero_()
        lines = self.lines(x, layout)
        self.library.gather(
            self.limit,
            numbers(*g),
            lines,
            ctypes.c_int64(len(index)),
            pointer(x),
            pointer(index),
            pointer(out),
        )
        return out

    def scatter_tiles(self, tiles, index, count, geometry, base, add):
        g, layout = BlockGeometry(*geometry), memory_format_of(tiles)
        out = torch.empty(
            (g.batch, tiles.shape[1], g.height, g.width), dtype=tiles.dtype, memory_format=layout
        )
        inverse = torch.ops.dynops.inverse_index(index, count, list(g.grid))
        run = getattr(self.library, f"add_{str(tiles.dtype)[6:]}" if add else "replace")
        tensors = (pointer(t) for t in (tiles, inverse, base, out))
        run(self.limit, numbers(*g), self.lines(tiles, layout), ctypes.c_int64(len(index)), *tensors)
        return out

    def lines(self, x, layout):
        """csrc/cuda/blocks.cuh: planes, elements of a pixel, bytes of an element."""
        c = x.shape[1]
        last = layout == torch.channels_last
        return numbers(1 if last else c, c if last else 1, x.element_size())


def build(noun: str, folder: Path) -> ctypes.CDLL:
    """The library of ``<noun>_on_host.cpp``."""
    source, built = Path(__file__).parent / f"{noun}_on_host.cpp", folder / f"{noun}.so"
    # nvcc hands C++ to the host compiler, with its own headers
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", "-O1", "-std=c++17", source, "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build("blocks", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def expert_library(tmp_path_factory) -> ctypes.CDLL:
    return build("experts", tmp_path_factory.mktemp("host"))


@of_cases
def test_gather(case, dtype, nchw, library):
    check_gather(Host(library), case, dtype, nchw)


@of_cases
def test_scatter(case, dtype, nchw, library):
    check_scatter(Host(library), case, dtype, nchw)


@pytest.mark.parametrize("name", ["plain", "uneven-halo", "wide-halo", "capacity"])
def test_int64_offsets(name, library):
    for nchw in (False, True):
        check_gather(Host(library, 0), CASES[name], torch.bfloat16, nchw)
        check_scatter(Host(library, 0), CASES[name], torch.bfloat16, nchw)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("no-")])
def test_cover(name, library):
    t = Inputs(CASES[name], torch.float32, True)
    mask = between_guards(t.g.shape, t.x[:, 0].contiguous().stride(), torch.bool, "cpu")
    mask.fill_(False)
    library.cover(
        ctypes.c_int64(NARROW), numbers(*t.g), ctypes.c_int64(len(t.index)), pointer(t.index), pointer(mask)
    )
    assert torch.equal(mask, reference._block_cover(t.index, t.count, list(t.g))) and guards_are_whole(mask)


@pytest.mark.parametrize("dtype", ["bool", "int16", "int64", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("no-")])
def test_block_mask(name, dtype, library):
    g = CASES[name].geometry
    values = random_tensor(*g.shape) * random_mask(g.shape, 0.2)
    mask = (values * 100).to(getattr(torch, dtype))
    run = getattr(library, f"mask_{dtype}")
    for mean, threshold in ((0, 0.0), (0, 60.0), (1, 0.1), (1, 9.0), (0, -1.0)):
        active = between_guards(g.grid, torch.empty(g.grid).stride(), torch.bool, "cpu")
        arguments = (ctypes.c_int(mean), ctypes.c_double(threshold))
        run(ctypes.c_int64(NARROW), numbers(*g), pointer(mask), *arguments, pointer(active))
        assert torch.equal(active, reference._block_mask(mask, list(g), bool(mean), threshold))
        assert guards_are_whole(active)


def test_division(library):
    """What replaces a division is exact below 2**31, whatever the divisor below 2**30."""
    edges = [2**k + d for k in range(31) for d in (-1, 0, 1) if 0 < 2**k + d < 2**30] + [2**30 - 1]
    divisors = torch.cat([torch.tensor(edges), torch.randint(1, 2**30, (500,))]).int()
    most = torch.tensor([2**31 - 1, 2**31 - 2, 0, 1])
    near = torch.cat([divisors, divisors - 1, (2**31 - 1) // divisors * divisors]).long()
    n = torch.cat([most, near, near.sub(1).clamp(min=0), torch.randint(0, 2**31, (1000,))]).int()
    found = library.wrong_division(
        pointer(n), ctypes.c_int64(len(n)), pointer(divisors), ctypes.c_int64(len(divisors))
    )
    assert found == -1, int(n[found])


EXPERTS = [(0, 2, 3), (1, 1, 1), (7, 3, 5), (64, 8, 100), (500, 2, 3)]  # T, K, E
INTEGERS = ["uint8", "int8", "int16", "int32", "int64"]


def choices(tokens: int, topk: int, experts: int, dtype: str) -> torch.Tensor:
    """A router's choices, some dropped and, where the dtype has room, some outside [0, E], which are dropped too."""
    info = torch.iinfo(getattr(torch, dtype))
    index = torch.randint(max(-1, info.min), min(experts + 2, info.max) + 1, (tokens, topk))
    if index.numel() > 2:
        index.view(-1)[0], index.view(-1)[1] = info.min, info.max
    return index.to(getattr(torch, dtype))


def expected_plan(index: torch.Tensor, experts: int, capacity: int):
    outside = (index < 0) | (index.long() > experts)
    return index_reference._expert_index(torch.where(outside, experts, index.long()), experts, capacity)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("sizes", EXPERTS)
@pytest.mark.parametrize("capacity", [-1, 0, 1, 4, 10**6])
def test_expert_index(capacity, sizes, dtype, expert_library):
    tokens, topk, experts = sizes
    index = choices(tokens, topk, experts, dtype)
    expected = expected_plan(index, experts, capacity)
    plan = [between_guards(t.shape, t.stride(), torch.int32, "cpu").fill_(2**30) for t in expected]
    run = getattr(expert_library, f"plan_{dtype}")
    arguments = (
        ctypes.c_int64(tokens),
        ctypes.c_int64(topk),
        ctypes.c_int32(experts),
        ctypes.c_int64(capacity),
    )
    run(pointer(index), *arguments, *map(pointer, plan))
    for got, value in zip(plan, expected, strict=True):
        assert torch.equal(got, value) and guards_are_whole(got)


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.AVAILABLE), reason="needs a GPU and a binary with CUDA"
)
@of_cases
def test_on_a_gpu(case, dtype, nchw):
    check_gather(cuda, case, dtype, nchw, "cuda")
    check_scatter(cuda, case, dtype, nchw, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.AVAILABLE), reason="needs a GPU and a binary with CUDA"
)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("sizes", EXPERTS)
@pytest.mark.parametrize("capacity", [-1, 0, 4])
def test_expert_index_on_a_gpu(capacity, sizes, dtype):
    tokens, topk, experts = sizes
    index = choices(tokens, topk, experts, dtype)
    plan = torch.ops.dynops.expert_index(index.cuda(), experts, capacity)
    for got, value in zip(plan, expected_plan(index, experts, capacity), strict=True):
        assert torch.equal(got.cpu(), value)
