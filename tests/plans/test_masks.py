"""Masks that plans of every kind are made of: values, memory, NaN."""

import pytest
import torch
from torch import Tensor

from dynops import BlockPlan, ChannelPlan, PixelPlan, SamplePlan

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
PLANS = {  # of one row of numbers, and what beside it
    "pixels": lambda row, *capacity: PixelPlan.from_mask(row[None, None], *capacity),
    "channels": lambda row, *capacity: ChannelPlan.from_mask(row[None], *capacity),
    "blocks": lambda row, *capacity: BlockPlan.from_mask(row[None, None], 1, capacity=(*capacity, None)[0]),
    "samples": lambda row, *capacity: SamplePlan.from_mask(row, *capacity),
}
of_every_kind = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
capacities = pytest.mark.parametrize("capacity", [(), (3,)], ids=["compact", "capacity"])


def kept(plan) -> list[int]:
    return [i for i in plan.index.flatten().tolist() if i >= 0]


@of_every_kind
@capacities
@pytest.mark.parametrize("dtype", SIGNED, ids=str)
def test_negative_and_tiny_values_count(dtype, capacity, make):
    tiny = torch.finfo(dtype).tiny if dtype.is_floating_point else 1
    row = torch.tensor([-1, 0, tiny, 0], dtype=torch.float64).to(dtype)
    assert kept(make(row, *capacity)) == [0, 2]


@of_every_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_zero_does_not_count_and_infinity_does(dtype, make):
    assert kept(make(torch.tensor([-0.0, float("inf"), 0.0, -float("inf")], dtype=dtype))) == [1, 3]


@of_every_kind
@capacities
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_need_not_be_contiguous(dtype, capacity, make):
    wide = (torch.rand(12, 40) < 0.5).to(dtype)
    for row in (wide[3, ::3], wide[:, 5], wide.T[1], wide[0, :1].expand(9)):
        assert kept(make(row, *capacity)) == row.contiguous().nonzero()[:, 0].tolist()[: (*capacity, 40)[0]]


@of_every_kind
def test_a_mask_with_gradient_gives_a_plan_without(make):
    plan = make(torch.rand(5, requires_grad=True))
    assert not plan.index.requires_grad and not plan.mask().requires_grad


@of_every_kind
@capacities
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_nan_among_many(dtype, capacity, make):
    """Also where the capacity ends the search before it."""
    for place in (0, 31, 209):
        row: Tensor = torch.ones(210, dtype=dtype)
        row[place] = float("nan")
        with pytest.raises(ValueError, match=r"(mask|keep).*NaN"):
            make(row, *capacity)
