"""PixelPlan: what it holds, what it derives, and what it refuses."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynops import PixelPlan, use_mask
from dynops.ops import index as reference
from dynops.plans import as_pixel_plan, resize_mask
from dynops.testing import random_mask

pytestmark = pytest.mark.usefixtures("poisoned")

MASK_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
KINDS = ["random", "square", "one", "empty", "full"]


def positions(mask: torch.Tensor) -> list[int]:
    """The flat positions of the nonzeros, one at a time."""
    return [i for i, value in enumerate(mask.flatten().tolist()) if value]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_from_mask(kind, rank, dtype):
    mask = random_mask((2, 5, 7), 0.4, kind)
    given = mask.to(dtype) if dtype == torch.bool else mask.to(dtype) * 3
    plan = PixelPlan.from_mask(given if rank == 3 else given[:, None])
    assert plan.index.dtype == torch.int32 and plan.count is None and plan.shape == (2, 5, 7)
    assert plan.index.tolist() == positions(mask)
    assert plan.num_rows == len(plan) == int(mask.sum()) and plan.num_pixels == 70
    assert plan.density == len(plan) / 70 and plan.is_full == (kind == "full")
    assert torch.equal(plan.mask(), mask)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 70_001])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.99])
def test_long_masks(size, density):
    mask = random_mask((1, 1, size), density)
    assert PixelPlan.from_mask(mask).index.tolist() == positions(mask)
    assert PixelPlan.from_mask(mask.float()).index.tolist() == positions(mask)
    assert PixelPlan.from_mask(mask, capacity=size).index[: int(mask.sum())].tolist() == positions(mask)


@pytest.mark.parametrize("capacity", [None, 200])
def test_non_contiguous_masks(capacity):
    wide = random_mask((4, 12, 14), 0.5)
    views = {
        "strided": wide[::2, ::3, 1::2],
        "transposed": wide.transpose(1, 2),
        "batch inside": wide.permute(1, 2, 0),
        "expanded": wide[:1].expand(3, -1, -1)[:, :6, :10],
        "one column": wide[:2, :, :1].expand(-1, -1, 8),
        "channel slice": wide[:, None].expand(-1, 3, -1, -1)[:, 1:2, :4, :9],
    }
    for name, mask in views.items():
        plan = PixelPlan.from_mask(mask.float() if name == "strided" else mask, capacity)
        expected = positions(mask.contiguous())
        assert plan.index[: len(expected)].tolist() == expected[: plan.num_rows], name


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("capacity", [None, 0, 3])
def test_no_pixels(shape, capacity):
    plan = PixelPlan.from_mask(torch.ones(shape), capacity)
    assert plan.shape == shape and plan.num_rows == (capacity or 0) and plan.density == 0
    assert plan.mask().shape == shape and plan.inverse().shape == shape
    assert (plan.index == -1).all()


@pytest.mark.parametrize("mask, error, match", [
    (torch.ones(4), ValueError, r"mask: expected \[N, H, W\].*\(4,\)"),
    (torch.ones(2, 3, 4, 4), ValueError, r"mask.*\(2, 3, 4, 4\)"),
    (torch.ones(1, 1, 1, 4, 4), ValueError, "mask"),
    (torch.ones(()), ValueError, "mask"),
    (torch.ones(1, 4, 4, dtype=torch.complex64), TypeError, "mask.*complex64"),
    ([[[1, 0]]], TypeError, "mask.*list"),
    (None, TypeError, "mask.*NoneType"),
    (torch.ones(1, 4, 4).to_sparse(), (TypeError, ValueError), "mask"),
    (torch.empty(1, 2**16, 2**15, device="meta"), ValueError, "mask.*2147483648"),
])  # fmt: skip
def test_bad_masks(mask, error, match):
    for capacity in (None, 3):
        with pytest.raises(error, match=match):
            PixelPlan.from_mask(mask, capacity)


@pytest.mark.parametrize("capacity", [-1, 2.5, "4", (4, 4)])
def test_bad_capacity(capacity):
    with pytest.raises((ValueError, TypeError), match="capacity"):
        PixelPlan.from_mask(torch.ones(1, 4, 4), capacity)


def test_as_pixel_plan():
    mask = random_mask((1, 4, 4))
    plan = PixelPlan.from_mask(mask)
    assert as_pixel_plan(plan) is plan
    assert torch.equal(as_pixel_plan(mask).index, plan.index)
    with pytest.raises(TypeError, match=r"mask_or_plan.*str"):
        as_pixel_plan("all")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [-4, -1, 0, 1, 100])
def test_capacity_form(kind, extra):
    mask = random_mask((2, 6, 7), 0.5, kind)
    active = positions(mask)
    capacity = max(len(active) + extra, 0)
    plan = PixelPlan.from_mask(mask, capacity=capacity)
    kept = active[:capacity]
    assert plan.index.dtype == plan.count.dtype == torch.int32
    assert plan.index.tolist() == kept + [-1] * (capacity - len(kept))
    assert plan.count.tolist() == [len(kept)] and plan.num_rows == capacity
    assert positions(plan.mask()) == kept and plan.density == len(kept) / 84
    assert not plan.is_full and "capacity" in repr(plan)


def test_what_a_plan_expects_travels():
    mask = random_mask((2, 8, 8), 0.3)
    plan = PixelPlan.from_mask(mask, 100, expected=40)
    same = [plan.to("cpu"), plan.as_rows(), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]
    same += [
        plan.needed(3, 1, 1),
        plan.needed(1),
        plan.resized((8, 8)),
        PixelPlan(plan.index, (2, 8, 8), plan.count, 40),
    ]
    assert [p.expected for p in same] == [40] * len(same)
    assert plan.needed(2, 2).expected == 160 and plan.resized((4, 4)).expected == 10
    assert PixelPlan.cat([plan, PixelPlan.full((1, 8, 8)), plan]).expected == 40 + 64 + 40
    one = PixelPlan.from_mask(mask[:1], 50, expected=20)
    assert one.expand(3).expected == 60
    context = use_mask(one)
    sizes = ((1, 8, 8), 20), ((2, 8, 8), 40), ((4, 4, 4), 20)
    assert [context.plan(shape, one.device).expected for shape, _ in sizes] == [n for _, n in sizes]
    assert PixelPlan.from_mask(mask, 30, expected=40).expected == 30
    for other in (PixelPlan.from_mask(mask, expected=40), PixelPlan.from_mask(mask, 100)):
        assert (
            other.expected is other.needed(3, 1, 1).expected is PixelPlan.cat([other, other]).expected is None
        )
    for wrong in (-1, True, 0.5):
        with pytest.raises(ValueError, match="expected: expected an int"):
            PixelPlan.from_mask(mask, 100, wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 10, 200])
def test_inverse(kind, capacity):
    mask = random_mask((2, 6, 7), 0.5, kind)
    plan = PixelPlan.from_mask(mask, capacity)
    inverse = plan.inverse()
    assert inverse.dtype == torch.int32 and inverse.shape == (2, 6, 7) and plan.inverse() is inverse
    expected = [-1] * 84
    for row, pixel in enumerate(positions(mask)[:capacity]):
        expected[pixel] = row
    assert inverse.flatten().tolist() == expected


def test_full():
    plan = PixelPlan.full((2, 3, 4))
    assert plan.is_full and plan.density == 1 and plan.mask().all()
    assert plan.index.tolist() == list(range(24)) and plan.index.dtype == torch.int32
    assert torch.equal(PixelPlan.from_mask(torch.ones(2, 3, 4)).index, plan.index)
    assert PixelPlan.full((0, 3, 4)).num_rows == 0


def test_as_rows():
    for capacity in (None, 30):
        plan = PixelPlan.from_mask(random_mask((2, 4, 5)), capacity)
        rows, active = plan.as_rows(), round(plan.density * 40)
        assert rows.shape == (1, 1, plan.num_rows) and plan.as_rows() is rows
        assert rows.index.tolist() == list(range(active)) + [-1] * (plan.num_rows - active)
        assert rows.count is plan.count


def test_the_index_is_checked():
    for index in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int32)):
        with pytest.raises(TypeError, match="index: expected int32"):
            PixelPlan(index, (1, 2, 3))


def brute_force_needed(mask, kernel, stride, padding, dilation, in_size) -> torch.Tensor:
    """Walks every tap of every active output pixel."""
    needed = torch.zeros(mask.shape[0], *in_size, dtype=torch.bool)
    for n, y, x in mask.nonzero().tolist():
        for r in range(kernel[0]):
            for s in range(kernel[1]):
                i, j = (
                    y * stride[0] - padding[0] + r * dilation[0],
                    x * stride[1] - padding[1] + s * dilation[1],
                )
                if 0 <= i < in_size[0] and 0 <= j < in_size[1]:
                    needed[n, i, j] = True
    return needed


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 2),
    in_size=pairs(1, 9),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    capacity=st.booleans(),
    seed=st.integers(0, 99),
)
def test_needed(batch, in_size, kernel, stride, padding, dilation, density, capacity, seed):
    out = [(in_size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    if min(out) < 1:
        return
    mask = random_mask((batch, *out), density, generator=torch.Generator().manual_seed(seed))
    plan = PixelPlan.from_mask(mask, mask.numel() if capacity else None)
    needed = plan.needed(kernel, stride, padding, dilation, in_size)
    expected = brute_force_needed(mask, kernel, stride, padding, dilation, in_size)
    assert needed.shape == expected.shape and (needed.count is None) == (plan.count is None)
    assert torch.equal(needed.mask(), expected)
    if not capacity and needed is not plan:
        assert needed.index.tolist() == positions(expected)


def test_needed_by_default_is_for_the_smallest_input():
    plan = PixelPlan.from_mask(random_mask((2, 5, 6), 0.3))
    assert plan.needed(3).shape == (2, 7, 8)
    assert plan.needed(3, padding=1).shape == (2, 5, 6)
    assert plan.needed(3, stride=2, padding=1).shape == (2, 9, 11)
    assert plan.needed((1, 5), dilation=2).shape == (2, 5, 14)


def test_needed_of_a_pointwise_convolution_is_the_plan():
    plan = PixelPlan.from_mask(random_mask((2, 5, 6), 0.3))
    assert plan.needed(1) is plan and plan.needed((1, 1), in_size=(5, 6)) is plan
    assert plan.needed(1, stride=2) is not plan


@pytest.mark.parametrize("arguments, match", [
    ({"kernel_size": 3, "in_size": (20, 20)}, "in_size"),
    ({"kernel_size": 3, "in_size": (7, 7, 7)}, "in_size"),
    ({"kernel_size": 3, "in_size": 7.5}, "in_size"),
    ({"kernel_size": (3, 3, 3)}, "kernel_size"),
    ({"kernel_size": "3"}, "kernel_size"),
    ({"kernel_size": 0}, "kernel_size"),
    ({"kernel_size": 3, "stride": 0}, "stride"),
    ({"kernel_size": 3, "padding": -1}, "padding"),
    ({"kernel_size": 3, "padding": "same"}, "padding"),
    ({"kernel_size": 3, "dilation": (0, 1)}, "dilation"),
    ({"kernel_size": 1, "padding": 9}, "padding|in_size"),
])  # fmt: skip
def test_needed_refuses(arguments, match):
    plan = PixelPlan.from_mask(random_mask((1, 5, 6)))
    with pytest.raises((ValueError, TypeError), match=match):
        plan.needed(**arguments)


@pytest.mark.parametrize("size", [(4, 3), (8, 6), (2, 2), (1, 1), (3, 5), (5, 6), (16, 12), (9, 7)])
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("batch", [0, 2])
def test_resized(batch, density, size):
    """An output pixel covers input pixels floor(i*H/h) to ceil((i+1)*H/h), and any of them counts."""
    mask = random_mask((batch, 8, 6), density)
    expected = torch.zeros(batch, *size, dtype=torch.bool)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * 8 // size[0], -((i + 1) * 8 // -size[0])
            left, right = j * 6 // size[1], -((j + 1) * 6 // -size[1])
            expected[:, i, j] = mask[:, top:bottom, left:right].flatten(1).any(1)
    plan = PixelPlan.from_mask(mask)
    resized = plan.resized(size)
    assert torch.equal(resized.mask(), expected) and resized.count is None
    assert torch.equal(resize_mask(mask.float() * -2, size), expected)
    capacity = PixelPlan.from_mask(mask, capacity=48 * batch).resized(size)
    assert torch.equal(capacity.mask(), expected) and capacity.count is not None


def test_resized_to_its_own_size_is_the_plan():
    plan = PixelPlan.from_mask(random_mask((2, 8, 6)))
    assert plan.resized((8, 6)) is plan and plan.resized([8, 6]) is plan


@pytest.mark.parametrize("size", [(0, 3), (-1, 3), (3,), "33", (2.5, 3)])
def test_resized_refuses(size):
    with pytest.raises((ValueError, TypeError), match="size"):
        PixelPlan.from_mask(random_mask((1, 8, 6))).resized(size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64], ids=str)
def test_the_references_are_what_runs(kind, dtype):
    """The binary takes the CPU; the references in ops/index.py run elsewhere and define both."""
    mask = random_mask((2, 6, 7), 0.4, kind).to(dtype)
    op = torch.ops.dynops
    assert torch.equal(op.mask_to_index(mask), reference._mask_to_index(mask))
    for capacity in (0, 10, 90):
        actual, right = (
            op.mask_to_index_capacity(mask, capacity),
            reference._mask_to_index_capacity(mask, capacity),
        )
        assert all(map(torch.equal, actual, right))
        index, count = actual
        shape = [2, 6, 7]
        assert torch.equal(
            op.inverse_index(index, count, shape), reference._inverse_index(index, count, shape)
        )
        for geometry in (
            [2, 13, 9, 6, 7, 3, 4, 2, 1, 0, 0, 1, 1, 1, 0],
            [2, 6, 7, 6, 7, 4, 4, 1, 1, 1, 1, 1, 1, 1, 0],  # padding='same' of an even kernel
            [2, 3, 3, 6, 7, 3, 2, 2, 3, 1, 1, 1, 1, 1, 1],
        ):
            right = reference._needed_mask(index, count, geometry)
            assert torch.equal(op.needed_mask(index, count, geometry), right)
