"""BlockPlan, gather_blocks and scatter_blocks against loops over slices: values, gradients, what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from block_loops import BLOCK_SIZES, FLOATS, MASK_DTYPES, SHAPE, slow_gather, slow_scatter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import assert_same_on_any_threads
from torch import Tensor

from dynops import BlockPlan, PixelPlan, ops
from dynops.ops import blocks
from dynops.testing import assert_within_budget, available_backends, in_layout, random_mask, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = available_backends()
# halo: (top, bottom, left, right)
HALOS = {0: (0, 0, 0, 0), 1: (1, 1, 1, 1), (2, 0): (2, 2, 0, 0), (0, 3, 1, 20): (0, 3, 1, 20)}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Runs a test on the kernels and on the reference."""
    if request.param == "reference":
        monkeypatch.setattr(blocks, "_kernels", lambda x, sums=False: None)
    return request.param


@pytest.mark.parametrize("block, kernel, stride, padding, active, rows", [
    (3, 3, 1, 0, 7, "999/999/900"),
    (3, 3, 1, 1, 13, "06660/69990/69990/69000/00000"),
    (4, 3, 1, 1, 4, "46660/69990/69990/69990/00000"),
    (5, 3, 2, 1, 1, "460/690/000"),
])  # fmt: skip
def test_sbnet_table(block, kernel, stride, padding, active, rows):
    """The paper's code: input blocks of the mask, a convolution of each tile, output blocks."""
    mask = torch.zeros(1, 5, 5)
    mask[0, 1, 2] = mask[0, 2, 0] = 1
    plan = BlockPlan.from_mask(mask, block, stride=block - kernel + stride, padding=padding)
    assert len(plan) == active
    tiles = F.conv2d(
        ops.gather_blocks(torch.ones(1, 1, 5, 5), plan), torch.ones(1, 1, kernel, kernel), stride=stride
    )
    out = ops.scatter_blocks(tiles, plan.through(kernel, stride, padding))
    assert "/".join("".join(str(int(v)) for v in row) for row in out[0, 0].tolist()) == rows


def test_through_is_the_convolution():
    """With all blocks active the tiles' outputs tile the whole output."""
    x, weight = (
        random_tensor(2, 3, 13, 16, dtype=torch.float64),
        random_tensor(4, 3, 3, 2, dtype=torch.float64),
    )
    conv = {"stride": (2, 1), "padding": (2, 1), "dilation": (2, 3)}
    plan = BlockPlan.from_mask(torch.ones(2, 13, 16), (9, 7), stride=(6, 4), padding=(2, 1))
    tiles = F.conv2d(ops.gather_blocks(x, plan), weight, stride=(2, 1), dilation=(2, 3))
    out = ops.scatter_blocks(tiles, plan.through((3, 2), **conv))
    torch.testing.assert_close(out, F.conv2d(x, weight, **conv))


@pytest.mark.parametrize("plan, conv, match", [
    ({"block_size": 2}, {"kernel_size": 3}, r"block_size: expected 3 and a multiple of stride 1, got 2"),
    ({"block_size": 6}, {"kernel_size": 3, "stride": 2}, r"block_size: .*stride 2, got 6"),
    ({"block_size": 4}, {"kernel_size": 3}, r"stride: expected blocks 2 apart.*got 4"),
    ({"block_size": 3, "stride": 2, "offset": 1}, {"kernel_size": 3, "stride": 2}, r"offset: .*got 1"),
    ({"block_size": 20}, {"kernel_size": 13}, r"kernel_size: expected a reach of at most 11 pixels, got 13"),
    ({"block_size": 3, "stride": 1}, {"kernel_size": 0}, r"kernel_size: .*0"),
    ({"block_size": 3, "stride": 1}, {"kernel_size": 3, "padding": -1}, r"padding: .*-1"),
])  # fmt: skip
def test_through_refuses(plan, conv, match):
    plan = BlockPlan.from_mask(torch.ones(SHAPE), **plan)
    with pytest.raises(ValueError, match=match):
        plan.through(**conv)


def plans(density=0.1) -> dict[str, BlockPlan]:
    mask = random_mask(SHAPE, density)
    made = {f"blocks {size}": BlockPlan.from_mask(mask, size) for size in BLOCK_SIZES}
    made |= {kind: BlockPlan.from_mask(random_mask(SHAPE, kind=kind), 4) for kind in ("empty", "full", "one")}
    made["capacity"] = BlockPlan.from_mask(mask, 4, capacity=30)
    made["short capacity"] = BlockPlan.from_mask(mask, 2, capacity=5)
    made["gaps"] = BlockPlan.from_mask(mask, 2, stride=(3, 4), padding=1)
    made["overlapping"] = BlockPlan.from_mask(mask, 5, stride=(2, 3), padding=2)
    made["outside"] = BlockPlan.from_mask(torch.ones(SHAPE), 3, "any", -1, padding=4)
    made["batch 0"] = BlockPlan.from_mask(mask[:0], 4)
    made["batch 7"] = BlockPlan.from_mask(random_mask((7, 5, 6), density), 2)
    return made


torch.manual_seed(0)
PLANS = plans()
SIDE_BY_SIDE = {name: plan for name, plan in PLANS.items() if not plan.geometry.overlaps}


def each(made: dict[str, BlockPlan]):
    return pytest.mark.parametrize("plan", list(made.values()), ids=list(made))


def map_for(plan: BlockPlan, channels=5, dtype=torch.float32) -> Tensor:
    n, h, w = plan.shape
    return random_tensor(n, channels, h, w, dtype=dtype)


def tiles_for(plan: BlockPlan, channels=5, dtype=torch.float32) -> Tensor:
    return random_tensor(len(plan), channels, *plan.block_size, dtype=dtype)


@pytest.mark.parametrize("halo", HALOS, ids=str)
@each(PLANS)
def test_gather(plan, halo, backend):
    for layout in ("nchw", "channels_last"):
        x = in_layout(map_for(plan), layout)
        tiles = ops.gather_blocks(x, plan, halo)
        assert torch.equal(tiles, slow_gather(x, plan, HALOS[halo]))
        assert tiles.is_contiguous(memory_format=torch.channels_last) or layout == "nchw"
        assert tiles.is_contiguous() or layout == "channels_last"


@pytest.mark.parametrize("with_base", [False, True])
@each(SIDE_BY_SIDE)
def test_scatter(plan, with_base, backend):
    for layout in ("nchw", "channels_last"):
        tiles = in_layout(tiles_for(plan), layout)
        base = in_layout(map_for(plan), layout) if with_base else None
        out = ops.scatter_blocks(tiles, plan, base)
        assert torch.equal(out, slow_scatter(tiles, plan, base))
        assert out.is_contiguous(memory_format=torch.channels_last) or layout == "nchw"
        assert out.is_contiguous() or layout == "channels_last"


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each(PLANS)
def test_add(plan, dtype, with_base, backend):
    for layout in ("nchw", "channels_last"):
        tiles = in_layout(tiles_for(plan, dtype=dtype), layout)
        base = in_layout(map_for(plan, dtype=dtype), layout) if with_base else None
        out = ops.scatter_blocks(tiles, plan, base, add=True)
        dense = slow_scatter(tiles, plan, base, add=True)
        exact = slow_scatter(tiles.double(), plan, None if base is None else base.double(), add=True)
        if dtype == torch.float64:
            torch.testing.assert_close(out, dense, rtol=1e-15, atol=0)
        else:
            assert_within_budget(out, exact, dense)


ANY_DTYPE = [*MASK_DTYPES, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_copies_of_any_dtype(layout, dtype, backend):
    plan = PLANS["blocks (3, 5)"]
    x = in_layout((map_for(plan) * 9).to(dtype), layout)
    tiles = ops.gather_blocks(x, plan, 1)
    assert tiles.dtype == dtype and torch.equal(tiles, slow_gather(x, plan, HALOS[1]))
    tiles = ops.gather_blocks(x, plan)
    for base in (None, x * 2 if dtype != torch.bool else ~x):
        out = ops.scatter_blocks(tiles, plan, base)
        assert out.dtype == dtype and torch.equal(out, slow_scatter(tiles, plan, base))


@pytest.mark.parametrize("channels", [0, 1, 2, 16, 33])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_channels_and_single_pixels(layout, channels, backend):
    """A map or tile of one pixel, which is contiguous in both formats, too."""
    for shape, size in (((2, 1, 1), 3), ((2, 4, 3), 1), ((1, 1, 1), 1), ((2, 4, 3), 2)):
        plan = BlockPlan.from_mask(torch.ones(shape), size)
        x = in_layout(random_tensor(shape[0], channels, *shape[1:]), layout)
        tiles = ops.gather_blocks(x, plan)
        assert torch.equal(tiles, slow_gather(x, plan))
        assert torch.equal(ops.scatter_blocks(tiles, plan), x)
        assert torch.equal(ops.scatter_blocks(tiles, plan, x, add=True), x + x)


def test_a_zeroed_output_past_the_caches():
    """An output so large that its zeros are streamed."""
    mask = random_mask((1, 200, 300), 0.002)
    plan = BlockPlan.from_mask(mask, 8)
    for layout, channels in (("channels_last", 64), ("channels_last", 37), ("nchw", 40)):
        x = in_layout(random_tensor(1, channels, 200, 300), layout)
        tiles = ops.gather_blocks(x, plan)
        expected = x * plan.mask()[:, None]
        assert torch.equal(ops.scatter_blocks(tiles, plan), expected)
        wide = plan.geometry.widened((1, 0, 0, 2))
        halo = torch.ops.dynops.gather_tiles(x, plan.index, None, wide)
        times = torch.ops.dynops.scatter_tiles(torch.ones_like(halo), plan.index, None, wide, None, True)
        out = torch.ops.dynops.scatter_tiles(halo, plan.index, None, wide, None, True)
        torch.testing.assert_close(out, x * times, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("halo", HALOS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_gather(dtype, halo, layout, backend):
    """Halos overlap: what was read several times gets the sum."""
    for plan in (PLANS["blocks (3, 5)"], PLANS["capacity"], PLANS["overlapping"], PLANS["empty"]):
        x = in_layout(map_for(plan, dtype=dtype), layout).requires_grad_()
        dy = in_layout(random_tensor(*slow_gather(x, plan, HALOS[halo]).shape, dtype=dtype), layout)
        (grad,) = torch.autograd.grad(ops.gather_blocks(x, plan, halo), x, dy)
        assert grad.dtype == dtype
        twin, double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        dense, exact = slow_gather(twin, plan, HALOS[halo]), slow_gather(double, plan, HALOS[halo])
        if not len(plan):
            assert not grad.any()
            continue
        (dense,) = torch.autograd.grad(dense, twin, dy)
        (exact,) = torch.autograd.grad(exact, double, dy.double())
        assert_within_budget(grad, exact, dense)


@pytest.mark.parametrize("add", [False, True])
@each(SIDE_BY_SIDE)
def test_gradient_of_scatter(plan, add, backend):
    leaves = [f(plan).requires_grad_() for f in (tiles_for, map_for)]
    twins = [leaf.detach().requires_grad_() for leaf in leaves]
    dy = map_for(plan)
    grads = torch.autograd.grad(ops.scatter_blocks(leaves[0], plan, leaves[1], add), leaves, dy)
    slow = torch.autograd.grad(slow_scatter(twins[0], plan, twins[1], add), twins, dy, allow_unused=True)
    for grad, expected, leaf in zip(grads, slow, leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf) if expected is None else expected)


SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw):
    """A plan, and a maker of maps and tiles of small integers, whose sums are exact in every dtype."""
    pair = st.tuples(st.integers(1, 6), st.integers(1, 6))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    torch.manual_seed(draw(st.integers(0, 99)))
    mask = random_mask(shape, draw(st.sampled_from([0.02, 0.3, 1])))
    stride = draw(st.one_of(st.none(), pair))
    capacity = draw(st.sampled_from([None, 3, 200]))
    padding = draw(st.integers(0, 2))
    plan = BlockPlan.from_mask(mask, draw(pair), stride=stride, padding=padding, capacity=capacity)
    channels, layout = (
        draw(st.sampled_from([1, 3, 16])),
        draw(st.sampled_from(["nchw", "channels_last", "strided"])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))

    def make(n, *size):
        return in_layout(torch.randint(-3, 4, (n, channels, *size)).to(dtype), layout)

    return plan, make


@SETTINGS
@given(cases())
def test_scatter_restores_what_was_gathered(case):
    plan, make = case
    x = make(plan.shape[0], *plan.shape[1:])
    tiles, cover = ops.gather_blocks(x, plan), plan.mask()[:, None]
    if not plan.geometry.overlaps:
        assert torch.equal(ops.scatter_blocks(tiles, plan), x * cover)
        assert torch.equal(ops.scatter_blocks(tiles, plan, x + 1), torch.where(cover, x, x + 1))
    times = ops.scatter_blocks(torch.ones_like(tiles), plan, add=True)
    assert torch.equal(ops.scatter_blocks(tiles, plan, add=True), x * times)


@SETTINGS
@given(cases(), st.tuples(*[st.integers(0, 4)] * 4))
def test_gather_and_scatter_are_adjoint(case, halo):
    """<gather(x), t> == <x, scatter(t, add)>, and autograd says so too."""
    plan, make = case
    x = make(plan.shape[0], *plan.shape[1:]).requires_grad_()
    tiles = ops.gather_blocks(x, plan, halo)
    t = make(len(plan), *tiles.shape[2:])
    wide = BlockPlan(plan.index, plan.geometry.widened(halo), plan.count)
    back = ops.scatter_blocks(t, wide, add=True)
    assert (tiles.double() * t.double()).sum() == (x.double() * back.double()).sum()
    assert torch.equal(torch.autograd.grad(tiles, x, t)[0], back)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, layout):
    plan = BlockPlan.from_mask(random_mask((2, 61, 67), 0.02), 4)
    x = in_layout(random_tensor(2, 32, 61, 67, dtype=dtype), layout).requires_grad_()

    def run():
        tiles = ops.gather_blocks(x, plan, 2)
        (grad,) = torch.autograd.grad(tiles, x, tiles.detach())
        inner = tiles.detach()[:, :, 2:-2, 2:-2]
        scattered = [ops.scatter_blocks(inner, plan, x.detach()), ops.scatter_blocks(inner, plan, grad, True)]
        return [tiles, grad, *scattered]

    assert_same_on_any_threads(run, (1, 2))


PLAN = BlockPlan.from_mask(torch.ones(2, 4, 6), 2)
X, TILES = random_tensor(2, 3, 4, 6), random_tensor(12, 3, 2, 2)
META = torch.device("meta")


@pytest.mark.parametrize("error, match, arguments", [
    (TypeError, r"plan: expected a BlockPlan.*Tensor", {"plan": torch.ones(2, 4, 6)}),
    (TypeError, r"plan: .*PixelPlan", {"plan": PixelPlan.full((2, 4, 6))}),
    (TypeError, r"x: expected a tensor .*list", {"x": [1.0]}),
    (ValueError, r"x: .*\(3, 4, 6\)", {"x": X[0]}),
    (ValueError, r"x: expected shape \(2, 3, 4, 6\).*\(2, 3, 4, 5\)", {"x": X[..., :5]}),
    (ValueError, r"x: .*meta", {"x": X.to(META)}),
    (ValueError, r"halo: .*>= 0, got -1", {"halo": -1}),
    (ValueError, r"halo: .*\(1, 1, 1\)", {"halo": (1, 1, 1)}),
    (ValueError, r"halo: .*\(1, 1, 1, -1\)", {"halo": (1, 1, 1, -1)}),
    (ValueError, r"halo: .*0\.5", {"halo": 0.5}),
])  # fmt: skip
def test_gather_refuses(error, match, arguments):
    with pytest.raises(error, match=match):
        ops.gather_blocks(**{"x": X, "plan": PLAN, **arguments})


@pytest.mark.parametrize("error, match, arguments", [
    (TypeError, r"plan: expected a BlockPlan.*NoneType", {"plan": None}),
    (TypeError, r"tiles: expected a tensor.*NoneType", {"tiles": None}),
    (ValueError, r"tiles: .*\(3, 2, 2\)", {"tiles": TILES[0]}),
    (ValueError, r"tiles: expected shape \(12, 3, 2, 2\).*\(11, 3, 2, 2\)", {"tiles": TILES[1:]}),
    (ValueError, r"tiles: .*\(12, 3, 2, 1\)", {"tiles": TILES[..., :1]}),
    (ValueError, r"tiles: .*meta", {"tiles": TILES.to(META)}),
    (TypeError, r"base: expected a tensor.*float", {"base": 0.0}),
    (ValueError, r"base: expected shape \(2, 3, 4, 6\).*\(2, 2, 4, 6\)", {"base": X[:, :2]}),
    (ValueError, r"base: .*\(1, 3, 4, 6\)", {"base": X[:1]}),
    (TypeError, r"base: expected dtype torch.float32, got torch.float64", {"base": X.double()}),
    (ValueError, r"base: .*meta", {"base": X.to(META)}),
    (ValueError, r"add: expected True for a plan whose blocks overlap, got False",
     {"plan": BlockPlan.from_mask(torch.ones(2, 3, 4), 2, stride=1)}),
])  # fmt: skip
def test_scatter_refuses(error, match, arguments):
    with pytest.raises(error, match=match):
        ops.scatter_blocks(**{"tiles": TILES, "plan": PLAN, **arguments})


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the checks of the C++ kernels")
@pytest.mark.parametrize("index", [[3, 2], [1, 1], [-1, 2], [0, 12]], ids=str)
def test_the_kernels_refuse_an_index_outside_the_grid(index):
    index, g = torch.tensor(index, dtype=torch.int32), PLAN.geometry
    D = torch.ops.dynops
    calls = {
        "gather": lambda: D.gather_tiles(X, index, None, g),
        "scatter": lambda: D.scatter_tiles(TILES[:2], index, None, g, None, False),
        "cover": lambda: D.block_cover(index, None, g),
        "pixels": lambda: D.block_pixels(index, g),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="index: expected ascending positions"):
            call()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the checks of the C++ kernels")
def test_the_kernels_refuse_other_shapes():
    D, index, g = torch.ops.dynops, PLAN.index, PLAN.geometry
    calls = {
        "map: expected": lambda: D.gather_tiles(X[..., :5], index, None, g),
        "tiles: expected": lambda: D.scatter_tiles(TILES[:, :, :1], index, None, g, None, False),
        "base: expected": lambda: D.scatter_tiles(TILES, index, None, g, X[:1], False),
        "add: expected True": lambda: D.scatter_tiles(TILES, index, None, g._replace(step_h=1), None, False),
        "geometry: expected sizes": lambda: D.block_cover(index, None, g._replace(step_w=0)),
        "geometry: expected 11": lambda: D.block_cover(index, None, g[:9]),
        "mask: expected 48 pixels": lambda: D.block_mask(torch.ones(2, 4, 5), g, False, 0.0),
    }
    for match, call in calls.items():
        with pytest.raises(RuntimeError, match=match):
            call()
