"""BlockPlan against loops over blocks: which blocks are active, grids, what is refused."""

import pytest
import torch
from block_loops import BLOCK_SIZES, FLOATS, KINDS, MASK_DTYPES, SHAPE, slow_blocks, slow_cover
from hypothesis import given, settings
from hypothesis import strategies as st

from dynops import BlockPlan, PixelPlan
from dynops.ops import blocks
from dynops.plans import as_block_plan
from dynops.testing import random_mask

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_from_mask(kind, block_size):
    mask = random_mask(SHAPE, 0.1, kind)
    plan = BlockPlan.from_mask(mask, block_size)
    height, width = plan.block_size
    assert (height, width) == (block_size if isinstance(block_size, tuple) else (block_size,) * 2)
    assert plan.geometry.grid == (2, -(-11 // height), -(-13 // width)) and plan.shape == SHAPE
    expected = slow_blocks(mask, plan.geometry)
    assert plan.index.dtype == torch.int32 and plan.index.tolist() == expected and plan.count is None
    assert len(plan) == plan.num_blocks == len(expected)
    assert plan.density == len(expected) / plan.num_all and plan.is_full == (len(expected) == plan.num_all)
    assert plan.blocks().flatten().nonzero()[:, 0].tolist() == expected
    assert torch.equal(plan.mask(), slow_cover(plan)) and plan.mask()[mask].all()
    assert torch.equal(plan.pixels().mask(), plan.mask()) and plan.pixels() is plan.pixels()


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("reduce", ["any", "mean"])
@pytest.mark.parametrize("threshold", [0, 0.25, 1, 2.5, -1, float("inf")])
def test_reduce_and_threshold(threshold, reduce, dtype):
    """Values of both signs whose sums are exact, so that some means are the threshold itself."""
    values = torch.randint(-3, 4, SHAPE) * random_mask(SHAPE, 0.3)
    mask = values.to(dtype) if dtype.is_signed else values.abs().to(dtype)
    for view in (mask, mask[:, None], mask.transpose(1, 2).contiguous().transpose(1, 2)):
        plan = BlockPlan.from_mask(view, (2, 4), reduce, threshold)
        assert plan.index.tolist() == slow_blocks(mask, plan.geometry, reduce, threshold)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_the_least_integer_has_a_magnitude(dtype):
    least = torch.iinfo(dtype).min
    mask = torch.tensor([[[least, 0, -1, 0]]], dtype=dtype)
    assert BlockPlan.from_mask(mask, (1, 2), "any", -(least + 1)).index.tolist() == (
        [0] if least > -(2**60) else []
    )
    assert BlockPlan.from_mask(mask, (1, 2)).index.tolist() == [0, 1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9)),
    block_size=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    stride=st.one_of(st.none(), st.tuples(st.integers(1, 5), st.integers(1, 7))),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 2)),
    offset=st.tuples(st.integers(-3, 6), st.integers(-1, 14)),
    density=st.sampled_from([0, 0.05, 0.5, 1]),
    reduce=st.sampled_from(["any", "mean"]),
    capacity=st.sampled_from([None, 0, 3, 400]),
    seed=st.integers(0, 99),
)
def test_any_grid(shape, block_size, stride, padding, offset, density, reduce, capacity, seed):
    """The kernels, the reference and the loops agree; each pixel from the offset on lies in a block."""
    mask = random_mask(shape, density, generator=torch.Generator().manual_seed(seed))
    grid = {"stride": stride, "padding": padding, "offset": offset}
    plan = BlockPlan.from_mask(mask, block_size, reduce, 0.1, **grid, capacity=capacity)
    expected = slow_blocks(mask, plan.geometry, reduce, 0.1)[:capacity]
    reference = blocks._block_mask(mask, plan.geometry, reduce == "mean", 0.1)
    assert reference.flatten().nonzero()[:capacity, 0].tolist() == expected
    assert plan.index[: len(expected)].tolist() == expected and (plan.index[len(expected) :] == -1).all()
    assert (plan.count is None) == (capacity is None) and plan.density == len(expected) / max(plan.num_all, 1)
    cover = slow_cover(plan)
    assert torch.equal(plan.mask(), cover)
    assert torch.equal(blocks._block_cover(plan.index, plan.count, plan.geometry), cover)
    pixels = plan.pixels()
    assert torch.equal(pixels.mask(), cover) and (pixels.count is None) == (capacity is None)
    assert (pixels.index[: int(cover.sum())].diff() > 0).all()
    gaps = stride is not None and any(s > b for s, b in zip(stride, block_size, strict=True))
    if reduce == "any" and capacity is None and not gaps:
        y, x = (max(offset[i] - padding[i], 0) for i in (0, 1))
        assert cover[:, y:, x:][mask[:, y:, x:]].all()


def test_from_blocks():
    active = random_mask((2, 3, 2), 0.5)
    plan = BlockPlan.from_blocks(active, (2, 9, 7), (3, 4))
    assert plan.geometry == BlockPlan.from_mask(torch.ones(2, 9, 7), (3, 4)).geometry
    assert torch.equal(plan.blocks(), active)
    assert BlockPlan.from_blocks(active, (2, 9, 7), (3, 4), capacity=20).count.tolist() == [int(active.sum())]


def test_repr_len_and_as_block_plan():
    mask = torch.eye(4)[None]
    plan = BlockPlan.from_mask(mask, 2)
    assert repr(plan) == "BlockPlan(2 of 4 blocks of (2, 2), shape=(1, 4, 4))" and len(plan) == 2
    assert "capacity form" in repr(BlockPlan.from_mask(mask, 2, capacity=3))
    assert as_block_plan(plan, 3) is plan and as_block_plan(mask, 2).index.tolist() == [0, 3]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"threshold": 0.5}, {"reduce": "mean"}, {"stride": 3}, {"capacity": 9}]
)
def test_nan_mask(arguments, dtype):
    """Also where no block looks."""
    for place in (0, 31, 209):
        mask = torch.ones(1, 3, 70, dtype=dtype)
        mask.view(-1)[place] = float("nan")
        with pytest.raises(ValueError, match=r"mask.*NaN"):
            BlockPlan.from_mask(mask, 2, **arguments)


MASK = torch.ones(1, 4, 6)


@pytest.mark.parametrize("error, match, arguments", [
    (TypeError, r"mask: expected a tensor.*list", {"mask": [1]}),
    (TypeError, r"mask: .*complex64", {"mask": MASK.to(torch.complex64)}),
    (ValueError, r"mask: expected \[N, H, W\].*\(6,\)", {"mask": MASK[0, 0]}),
    (ValueError, r"mask: .*\(2, 3, 4, 6\)", {"mask": torch.ones(2, 3, 4, 6)}),
    (ValueError, r"block_size: expected an int or a pair of ints >= 1, got 0", {"block_size": 0}),
    (ValueError, r"block_size: .*\(2, 2, 2\)", {"block_size": (2, 2, 2)}),
    (ValueError, r"block_size: .*1\.5", {"block_size": 1.5}),
    (ValueError, r"block_size: .*None", {"block_size": None}),
    (ValueError, r"reduce: expected one of \('any', 'mean'\), got 'max'", {"reduce": "max"}),
    (ValueError, r"threshold: expected a number, got nan", {"threshold": float("nan")}),
    (ValueError, r"threshold: .*'0'", {"threshold": "0"}),
    (ValueError, r"threshold: .*True", {"threshold": True}),
    (ValueError, r"stride: .*>= 1, got 0", {"stride": 0}),
    (ValueError, r"padding: .*>= 0, got -1", {"padding": -1}),
    (ValueError, r"offset: .*0\.5", {"offset": 0.5}),
    (ValueError, r"capacity: .*-1", {"capacity": -1}),
    (ValueError, r"capacity: .*'4'", {"capacity": "4"}),
    (ValueError, r"block_size: expected at most 2147483647 .*blocks",
     {"mask": torch.empty(1, 2**15, 2**15, device="meta"), "block_size": 1, "padding": 2**14}),
    (ValueError, r"mask: expected at most 2147483647", {"mask": torch.empty(1, 2**16, 2**15, device="meta")}),
])  # fmt: skip
def test_bad_masks_and_grids(error, match, arguments):
    with pytest.raises(error, match=match):
        BlockPlan.from_mask(**{"mask": MASK, "block_size": 2, **arguments})


@pytest.mark.parametrize("error, match, arguments", [
    (TypeError, r"blocks: expected a tensor.*list", {"blocks": [1]}),
    (ValueError, r"blocks: expected \[N, H, W\].*\(3,\)", {"blocks": torch.ones(3)}),
    (ValueError, r"blocks: expected shape \(1, 2, 3\), got \(1, 3, 2\)", {"blocks": torch.ones(1, 3, 2)}),
    (ValueError, r"blocks: .*\(1, 2, 3\)", {"blocks": torch.ones(2, 2, 3)}),
    (ValueError, r"shape: expected \(N, H, W\), got \(4, 6\)", {"shape": (4, 6)}),
    (ValueError, r"shape: .*-4", {"shape": (1, -4, 6)}),
    (ValueError, r"shape: .*4\.0", {"shape": (1, 4.0, 6)}),
    (ValueError, r"shape: expected at most 2147483647 pixels", {"shape": (1, 2**16, 2**15)}),
    (ValueError, r"block_size: .*0", {"block_size": 0}),
])  # fmt: skip
def test_bad_blocks(error, match, arguments):
    with pytest.raises(error, match=match):
        BlockPlan.from_blocks(
            **{"blocks": torch.ones(1, 2, 3), "shape": (1, 4, 6), "block_size": 2, **arguments}
        )


def test_the_index_is_checked():
    geometry = BlockPlan.from_mask(MASK, 2).geometry
    for index in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int32)):
        with pytest.raises(TypeError, match="index: expected int32"):
            BlockPlan(index, geometry)
    with pytest.raises(TypeError, match=r"mask_or_plan: expected a BlockPlan or a mask.*PixelPlan"):
        as_block_plan(PixelPlan.full((1, 2, 2)), 2)
