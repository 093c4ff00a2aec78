"""What follows from a plan's indices follows them when they are written, and serves training whoever made it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from masked_conv import inputs

from dynops import BlockPlan, ChannelPlan, PixelPlan, SamplePlan, ops
from dynops.testing import assert_within_budget, available_backends

BACKENDS = available_backends()


PLANS = {
    "pixels": lambda index: PixelPlan(index, (1, 4, 8)),
    "capacity": lambda index: PixelPlan(index, (1, 4, 8), torch.tensor([3], dtype=torch.int32)),
}


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("how", ["in place", "numpy"])
def test_what_follows_from_a_plan_follows_its_indices(make, how):
    plan = make(torch.tensor([1, 5, 9], dtype=torch.int32))
    assert plan.inverse() is plan.inverse() or "cpp" not in BACKENDS
    plan.as_rows()
    new = torch.tensor([0, 7, 30], dtype=torch.int32)
    if how == "numpy":
        plan.index.numpy()[:] = new.numpy()
    else:
        plan.index.copy_(new)
    assert torch.equal(plan.inverse().view(-1)[new.long()], torch.arange(3, dtype=torch.int32))
    assert (plan.inverse() >= 0).sum() == 3


def test_pixels_of_samples_and_blocks_follow_their_indices():
    samples = SamplePlan(torch.tensor([0, 2], dtype=torch.int32), 4)
    assert samples.pixels((2, 2)) is samples.pixels((2, 2)) or "cpp" not in BACKENDS
    samples.index.copy_(torch.tensor([1, 3]))
    assert samples.pixels((2, 2)).mask().flatten(1).any(1).tolist() == [False, True, False, True]
    blocks = BlockPlan.from_mask(torch.eye(4)[None], 2)
    blocks.pixels()
    blocks.index.copy_(torch.tensor([1, 2]))
    assert torch.equal(blocks.pixels().mask(), blocks.mask())
    channels = ChannelPlan.from_mask(torch.ones(2, 3))
    assert channels.is_full and channels.width == 3
    channels.count.fill_(1)
    assert not channels.is_full and channels.width == 1


def test_winograd_tiles_follow_the_indices():
    x, weight, bias, _ = inputs(1, 32, 32, 16)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8] = True
    plan = PixelPlan.from_mask(mask)
    ops.sparse_conv2d(x, weight, bias, plan, padding=1)
    plan.index.add_(128)
    out = ops.sparse_conv2d(x, weight, bias, plan, padding=1)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) * ~mask[:, None]
    assert_within_budget(out, exact, F.conv2d(x, weight, bias, padding=1) * ~mask[:, None])


def test_plans_made_in_inference_mode_serve_training():
    x, weight, bias, mask = inputs()
    weight.requires_grad_()
    with torch.inference_mode():
        plans = [
            PixelPlan.from_mask(mask),
            PixelPlan.from_mask(mask, mask.numel()),
            PixelPlan.full((2, 14, 14)),
        ]
        plans += [BlockPlan.from_mask(mask, 2).pixels(), SamplePlan.from_mask(torch.ones(2)).pixels((14, 14))]
        for plan in plans:
            ops.sparse_conv2d(x, weight, bias, plan, padding=1)
            plan.inverse(), plan.as_rows()
    for plan in plans:
        ops.sparse_conv2d(x, weight, bias, plan, padding=1).sum().backward()
        rows = ops.gather_pixels(x, plan)
        ops.packed_conv2d(rows, weight[:, :, :1, :1], None, plan, plan).sum().backward()


def test_plans_are_copied_and_pickled_without_what_was_made():
    plan = PixelPlan.from_mask(torch.eye(8)[None])
    plan.inverse()
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), copy.copy(plan)):
        assert twin._derived == {} and torch.equal(twin.inverse(), plan.inverse())
    assert plan._derived
