"""Blocks: plans bit for bit, gathered and scattered tiles, their gradients."""

import pytest
import torch
from block_cases import CASES, check_gather, check_scatter
from on_gpu import DEVICE, DTYPES, KINDS, ON_GPU, assert_same, compare, moved, sized

from dynops import BlockPlan, backends, changed_blocks, ops
from dynops.geometry import conv_geometry
from dynops.kernels import cuda
from dynops.ops.block_conv import block_conv
from dynops.ops.epilogue import NOTHING
from dynops.testing import random_mask, random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
LARGE = sized((4, 64, 112, 112), (2, 8, 24, 28))


def of_plan(plan: BlockPlan) -> list:
    pixels = plan.pixels()
    return [plan.index, plan.count, plan.blocks(), plan.mask(), pixels.index, pixels.count]


@pytest.mark.parametrize("grid", [
    {"block_size": 8}, {"block_size": (4, 7), "offset": (-1, 2)}, {"block_size": 6, "stride": (4, 3), "padding": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])  # fmt: skip
def test_plans_are_those_of_the_cpu(grid, dtype):
    for shape, density in (((2, 37, 61), 0.02), ((3, 5, 5), 0.5), (sized((2, 300, 400), (1, 90, 80)), 0.001)):
        mask = (random_mask(shape, density).double() * (1 + torch.rand(shape))).to(dtype)
        for reduce, threshold in (("any", 0), ("mean", 0.01)):
            for capacity in (None, 3, 5000):
                options = {**grid, "reduce": reduce, "threshold": threshold, "capacity": capacity}
                expected, plan = (BlockPlan.from_mask(mask.to(d), **options) for d in ("cpu", DEVICE))
                assert_same(moved(of_plan(plan), "cpu"), of_plan(expected), str(options))


def test_nan_in_a_mask_is_refused():
    mask = torch.ones(2, 40, 40)
    mask[-1, -1, -1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        BlockPlan.from_mask(mask.to(DEVICE), 8)


def test_changed_blocks():
    previous = random_tensor(2, 3, 40, 52)
    current = previous.clone()
    current[0, 1, 3, 5], current[1, 0, 39, 51] = 7, float("nan")
    for tolerance in (0.0, 0.5):
        expected = changed_blocks(previous, current, (8, 4), tolerance)
        plan = changed_blocks(previous.to(DEVICE), current.to(DEVICE), (8, 4), tolerance)
        assert_same(plan.index.cpu(), expected.index)
        assert len(plan) == 2


@pytest.mark.skipif(not ON_GPU, reason="on a CPU test_triton_interpreter.py runs these kernels")
@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize(
    "name", ["plain", "uneven-halo", "overlap", "odd-channels-halo", "unaligned", "capacity"]
)
def test_the_triton_kernels_between_guards(name, nchw):
    """Those of CUDA C++ go before them: test_cuda_on_host.py has these."""
    if not backends.has_triton():
        pytest.skip("Triton is not installed")
    from dynops.kernels.triton import blocks

    check_gather(blocks, CASES[name], torch.bfloat16, nchw, str(DEVICE))
    check_scatter(blocks, CASES[name], torch.bfloat16, nchw, str(DEVICE))


@pytest.mark.skipif(not (ON_GPU and cuda.AVAILABLE), reason="needs a GPU and a binary with CUDA")
@pytest.mark.parametrize("name", ["plain", "uneven-halo", "overlap"])
def test_the_binary_is_what_runs(name, monkeypatch):
    """An op on a GPU takes the CUDA C++ kernel where the binary has it."""
    calls = []
    run = cuda.gather_tiles
    monkeypatch.setattr(cuda, "gather_tiles", lambda *a: calls.append(name) or run(*a))
    g = CASES[name].geometry
    x = torch.ones(g.batch, 4, g.height, g.width, device=DEVICE)
    index = torch.arange(2, dtype=torch.int32, device=DEVICE)
    torch.ops.dynops.gather_tiles(x, index, None, list(g))
    assert calls == [name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halo", [0, 1, (2, 0, 1, 3)], ids=str)
@pytest.mark.parametrize("capacity", [None, 7, sized(1000, 60)], ids=str)
def test_tiles_and_their_gradients(capacity, halo, kind):
    n, c, h, w = LARGE
    for nchw in (False, True):
        layout = torch.contiguous_format if nchw else torch.channels_last
        x = random_tensor(n, c, h, w, dtype=DTYPES[kind]).to(memory_format=layout)
        mask = random_mask((n, h, w), 0.01)

        def ours(x, mask):
            plan = BlockPlan.from_mask(mask, 8, capacity=capacity)
            assert plan.index.device == x.device
            return ops.gather_blocks(x, plan, halo)

        def oracle(x, mask):
            return tiles_of(x, mask, 8, halo, capacity)

        compare(ours, oracle, {"x": x, "mask": mask}, kind=kind)


def tiles_of(x, mask, size: int, halo, capacity: int | None) -> torch.Tensor:
    """The tiles of the blocks with an active pixel, cut out of a padded map one by one."""
    top, bottom, left, right = (halo,) * 4 if isinstance(halo, int) else halo
    grid = torch.nn.functional.max_pool2d(mask.float()[:, None], size, ceil_mode=True)[:, 0]
    h, w = x.shape[2:]
    padded = torch.nn.functional.pad(x, (left, right + size, top, bottom + size))
    padded[:, :, h + top :], padded[:, :, :, w + left :] = 0, 0
    active = grid.nonzero()[:capacity].tolist()
    cut = [
        padded[n, :, i * size : (i + 1) * size + top + bottom, j * size : (j + 1) * size + left + right]
        for n, i, j in active
    ]
    shape = (x.shape[1], size + top + bottom, size + left + right)
    missing = 0 if capacity is None else capacity - len(cut)
    return torch.stack([*cut, *[padded.new_zeros(shape)] * missing])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "block,capacity,dilation", [(8, None, 1), (16, 30, 2), ((12, 10), 9, 1)], ids=("8", "16", "12x10")
)
def test_convolutions_and_their_gradients(block, capacity, dilation, kind):
    """Of nn.SparseBlocks: by boxes of the map in half precision, where the GPU has them."""
    n, c, h, w = LARGE
    shapes = {"x": (n, c, h, w), "weight": (2 * c, c, 3, 3), "bias": (2 * c,), "base": (n, 2 * c, h, w)}
    tensors = {name: random_tensor(*shape, dtype=DTYPES[kind]) for name, shape in shapes.items()}
    tensors = {k: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for k, t in tensors.items()}
    g = conv_geometry((n, h, w), (3, 3), before=(dilation,) * 2, dilation=(dilation,) * 2)

    def ours(x, weight, bias, base, mask):
        return block_conv(
            x, weight, bias, BlockPlan.from_mask(mask, block, capacity=capacity), g, NOTHING, base
        )

    def oracle(x, weight, bias, base, mask):
        dense = torch.nn.functional.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        return torch.where(BlockPlan.from_mask(mask, block, capacity=capacity).mask()[:, None], dense, base)

    compare(ours, oracle, tensors | {"mask": random_mask((n, h, w), 0.01)}, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add", [False, True])
def test_scattered_tiles_and_their_gradients(add, kind):
    n, c, h, w = LARGE
    mask = random_mask((n, h, w), 0.01)
    count = len(BlockPlan.from_mask(mask, 8))
    for capacity in (None, count + 3, count - 2):
        rows = count if capacity is None else capacity
        tensors = {
            "tiles": random_tensor(rows, c, 8, 8, dtype=DTYPES[kind]).to(memory_format=torch.channels_last),
            "base": random_tensor(n, c, h, w, dtype=DTYPES[kind]).to(memory_format=torch.channels_last),
            "mask": mask,
        }

        def ours(tiles, base, mask, capacity=capacity):
            return ops.scatter_blocks(tiles, BlockPlan.from_mask(mask, 8, capacity=capacity), base, add)

        def oracle(tiles, base, mask, capacity=capacity):
            grid = torch.nn.functional.max_pool2d(mask.float()[:, None], 8, ceil_mode=True)[:, 0]
            out = base.clone()
            for tile, (at, i, j) in zip(tiles, grid.nonzero()[:capacity].tolist(), strict=False):
                part = out[at, :, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8]
                value = tile[:, : part.shape[1], : part.shape[2]]
                part.copy_(part + value if add else value)
            return out

        compare(ours, oracle, tensors, kind=kind)
