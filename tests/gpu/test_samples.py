"""Samples: plans bit for bit, batches that shrink and come back, their gradients."""

import pytest
import torch
from on_gpu import DEVICE, DTYPES, KINDS, assert_same, compare, moved, sized

from dynops import SamplePlan, ops
from dynops.testing import random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
KEEPS = {
    "some": torch.arange(7) % 3 != 1, "none": torch.zeros(7), "all": torch.ones(7, dtype=torch.int32),
    "last": torch.arange(7) == 6,
}  # fmt: skip


def of_plan(plan: SamplePlan) -> list:
    pixels = plan.pixels((3, 4))
    return [
        plan.index,
        plan.count,
        plan.mask(),
        plan.inverse(),
        plan.dropped().index,
        pixels.index,
        pixels.count,
    ]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("batch", [0, 1, 37, sized(200_000, 5000)])
def test_plans_are_those_of_the_cpu(batch, dtype):
    keep = (torch.rand(batch) < 0.5).to(dtype)
    for capacity in (None, 0, 9, batch + 2):
        expected, plan = (SamplePlan.from_mask(keep.to(d), capacity) for d in ("cpu", DEVICE))
        assert_same(moved(of_plan(plan), "cpu"), of_plan(expected))
        stays = torch.rand(expected.num_rows) < 0.5
        shrunk = [p.shrink(stays.to(p.device)) for p in (expected, plan)]
        assert_same(moved(of_plan(shrunk[1]), "cpu"), of_plan(shrunk[0]))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        SamplePlan.from_mask(torch.tensor([1.0, float("nan")]).to(DEVICE))


@pytest.mark.parametrize("capacity", [None, 3, 9])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("size", [(4,), (5, 3), (8, 6, 5), (6, 3, 5, 4)], ids=str)
def test_gathered_samples(size, keep, capacity):
    """Moves values and changes none, of any dtype and in either memory format."""
    mask = KEEPS[keep].bool()
    plan = SamplePlan.from_mask(KEEPS[keep].to(DEVICE), capacity)
    kept = mask.nonzero()[:capacity, 0]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = (random_tensor(7, *size) * 4).to(dtype)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        rows = ops.gather_samples(x.to(DEVICE), plan)
        assert_same(rows[: len(kept)].cpu(), x[kept])
        assert rows.shape[0] == plan.num_rows and not rows[len(kept) :].any()
        assert rows.dim() != 4 or rows.is_contiguous(memory_format=torch.channels_last)
        expected = torch.zeros_like(x)
        expected[kept] = x[kept]
        assert_same(ops.scatter_samples(rows, plan).cpu(), expected)


def where_kept(keep, capacity, x):
    """bool ``[N, 1, ...]``: the samples that a plan of this capacity keeps; and the row of each."""
    keep = keep & (keep.cumsum(0) <= (len(keep) if capacity is None else capacity))
    return keep.view(-1, *[1] * (x.dim() - 1)), (keep.cumsum(0) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("capacity", [None, 3, 9])
@pytest.mark.parametrize("form", ["replace", "add", "mix"])
def test_scattered_samples_and_their_gradients(form, capacity, keep, kind):
    mask = KEEPS[keep].bool()
    rows = SamplePlan.from_mask(mask, capacity).num_rows
    tensors = {
        "rows": random_tensor(rows, 8, 5, 4, dtype=DTYPES[kind]),
        "base": random_tensor(7, 8, 5, 4, dtype=DTYPES[kind]),
        "keep": mask,
    }
    if form != "replace":
        tensors["scale"] = torch.rand(rows, dtype=DTYPES[kind])

    def ours(rows, base, keep, scale=None):
        plan = SamplePlan.from_mask(keep, capacity)
        return ops.scatter_samples(rows, plan, base, add=form == "add", scale=scale)

    def oracle(rows, base, keep, scale=None):
        live, row = where_kept(keep, capacity, base)
        if not len(rows):
            return base + 0
        value = rows[row]
        if scale is not None:
            share = scale[row][:, None, None, None]
            value = share * value + (base if form == "add" else (1 - share) * base)
        return torch.where(live, value, base)

    # the gradient of a scale is one number for a sample, which may cancel: only float32 keeps some of it then
    grads = [
        n
        for n in ("rows", "base", "scale")
        if n in tensors and (n != "scale" or DTYPES[kind] == torch.float32)
    ]
    compare(ours, oracle, tensors, grads, kind=kind)


def test_trees():
    plan = SamplePlan.from_mask(KEEPS["some"].to(DEVICE))
    tree = {"x": random_tensor(7, 3).to(DEVICE), "state": (torch.arange(7).to(DEVICE), None, 4)}
    rows = ops.gather_samples(tree, plan)
    assert rows["state"][1:] == (None, 4) and rows["state"][0].tolist() == [0, 2, 3, 5, 6]
    back = ops.scatter_samples(rows, plan, tree)
    assert_same(back["x"], tree["x"])
