"""Values of the CUDA C++ kernels of blocks and experts on a CPU; on a GPU, where there is one, there."""

import ctypes

import pytest
import torch
from block_cases import CASES, Inputs, check_gather, check_scatter, of_cases
from cuda_on_host import NARROW, build, needs_nvcc, numbers, pointer
from guards import between_guards, guards_are_whole

from dynops.geometry import BlockGeometry
from dynops.kernels import cuda
from dynops.kernels.layout import memory_format_of
from dynops.ops import blocks as reference
from dynops.ops import index as index_reference
from dynops.testing import random_mask, random_tensor

pytestmark = [needs_nvcc, pytest.mark.usefixtures("poisoned")]


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


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build("blocks", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def expert_library(tmp_path_factory) -> ctypes.CDLL:
    library = build("experts", tmp_path_factory.mktemp("host"))
    library.scratch.restype = library.parts.restype = ctypes.c_int64
    return library


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


# T, K, E; the last ones have several parts, the very last too many experts for them
EXPERTS = [(0, 2, 3), (1, 1, 1), (7, 3, 5), (64, 8, 100), (500, 2, 3)]
SPLIT = [(1, 1, 1024), (1000, 1, 1), (1025, 1, 7), (700, 3, 300), (1500, 8, 60)]
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


def check_expert_index(library, sizes, dtype: str, capacity: int, sorts: bool, descending: bool) -> None:
    tokens, topk, experts = sizes
    index = choices(tokens, topk, experts, dtype)
    expected = expected_plan(index, experts, capacity)
    plan = [between_guards(t.shape, t.stride(), torch.int32, "cpu").fill_(2**30) for t in expected]
    rows = ctypes.c_int64(tokens * topk)
    needed = 3 * tokens * topk if sorts else library.scratch(rows, ctypes.c_int64(experts))
    scratch = between_guards((needed,), (1,), torch.int32, "cpu")
    arguments = (
        ctypes.c_int64(tokens),
        ctypes.c_int64(topk),
        ctypes.c_int32(experts),
        ctypes.c_int64(capacity),
    )
    run = getattr(library, f"plan_{dtype}")
    run(
        ctypes.c_int(descending),
        ctypes.c_int(sorts),
        pointer(index),
        *arguments,
        *map(pointer, [*plan, scratch]),
    )
    for got, value in zip(plan, expected, strict=True):
        assert torch.equal(got, value) and guards_are_whole(got)
    assert guards_are_whole(scratch)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("sizes", EXPERTS[1:])
@pytest.mark.parametrize("capacity", [-1, 0, 1, 4, 10**6])
def test_expert_index(capacity, sizes, dtype, expert_library):
    for sorts in (False, True):
        check_expert_index(expert_library, sizes, dtype, capacity, sorts, descending=False)


@pytest.mark.parametrize("sizes", SPLIT)
def test_expert_index_in_parts(sizes, expert_library):
    tokens, topk, experts = sizes
    parts = expert_library.parts(ctypes.c_int64(tokens * topk), ctypes.c_int32(experts))
    assert parts == -(-tokens * topk // 1024)
    for capacity, descending in ((-1, False), (-1, True), (40, False), (40, True)):
        check_expert_index(expert_library, sizes, "int64", capacity, False, descending)


def test_what_is_split_and_what_is_sorted(expert_library):
    """csrc/cuda/multisplit.cuh: up to 1024 experts, 4096 pairs of each of 128 parts, 16384 counts."""
    serves = expert_library.serves
    for rows, experts, split in (
        (128 * 4096, 64, True),
        (128 * 4096 + 1, 64, False),
        (15 * 4096, 1024, True),
        (15 * 4096 + 1, 1024, False),
        (1, 1025, False),
    ):
        assert bool(serves(ctypes.c_int64(rows), ctypes.c_int64(experts))) == split


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
@pytest.mark.parametrize("sizes", [*EXPERTS, *SPLIT, (70_000, 1, 1000)])
@pytest.mark.parametrize("capacity", [-1, 0, 4])
def test_expert_index_on_a_gpu(capacity, sizes, dtype):
    tokens, topk, experts = sizes
    index = choices(tokens, topk, experts, dtype)
    plan = torch.ops.dynops.expert_index(index.cuda(), experts, capacity)
    for got, value in zip(plan, expected_plan(index, experts, capacity), strict=True):
        assert torch.equal(got.cpu(), value)
