"""Values of the row kernels on whole samples in Triton's interpreter. Run by ``test_triton_interpreter.py``."""

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch

from dynops import SamplePlan
from dynops.kernels.triton import rows
from dynops.ops import samples
from dynops.ops.pixels.rows import _gather_rows, _merge_rows, _scatter_rows
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

COLUMNS = (1, 19, 4100)  # the last: programs that take a part of one row
KEEPS = {"some": [1, 0, 1, 0, 0, 1, 1], "none": [0] * 7, "all": [1] * 7, "last": [0, 0, 0, 0, 0, 0, 1]}


def plans():
    for name, keep in KEEPS.items():
        mask = torch.tensor(keep).bool()
        for capacity in (None, 5, 7):
            yield name, SamplePlan.from_mask(mask, capacity)


@pytest.mark.parametrize("mix", [False, True], ids=["add", "mix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_merge(columns, dtype, mix):
    for name, plan in plans():
        new = random_tensor(plan.num_rows, columns, dtype=dtype)
        new = torch.where((plan.index >= 0)[:, None], new, float("nan"))  # must not be read
        base, scale = random_tensor(7, columns, dtype=dtype), random_tensor(plan.num_rows)
        scale[::2] = 1
        scale = torch.where(plan.index >= 0, scale, float("nan"))
        for share in (scale,) if mix else (scale, None):
            arguments = (plan.index, plan.count, base, share, mix)
            actual = rows.merge_rows(new, *arguments)
            clean, ones = new.nan_to_num(0), None if share is None else share.nan_to_num(0)
            exact = _merge_rows(clean.double(), plan.index, plan.count, base.double(), ones, mix)
            dense = _merge_rows(clean, plan.index, plan.count, base, ones, mix)
            assert_within_budget(actual, exact, dense, f"{name} {plan}")


def test_merge_reads_nothing_under_a_row_that_stands_alone():
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1]))
    new, base = random_tensor(2, 33), random_tensor(3, 33)
    base[0] = float("nan")
    out = rows.merge_rows(new, plan.index, None, base, torch.tensor([1.0, 0.5]), True)
    assert out[0].equal(new[0]) and out.isfinite().all()


def test_rows_over_a_map_of_our_own(monkeypatch):
    """Written in place, as on a GPU, but not where a gradient is needed, the memory formats differ, or a base is not a tensor."""
    monkeypatch.setattr(samples.backends, "choose", lambda *arguments: "triton")
    for _, plan in plans():
        kept, made = random_tensor(plan.num_rows, 3, 2, 2), random_tensor(7, 3, 2, 2)
        for layout in (torch.contiguous_format, torch.channels_last):
            own, new = (t.clone(memory_format=layout) for t in (made, kept))
            expected = samples.scatter_samples(new, plan, own)
            out = samples.scatter_over(new, plan, own)
            assert out is own and out.equal(expected) and out.stride() == expected.stride()
        for new in (kept.clone().requires_grad_(), kept.to(memory_format=torch.channels_last)):
            out = samples.scatter_over(new, plan, made)
            assert out is not made and out.equal(samples.scatter_samples(new, plan, made))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_gather_and_scatter(columns, dtype):
    x = (random_tensor(7, columns) * 100).to(dtype)
    for _, plan in plans():
        flat = x[:, :, None, None]
        small = rows.gather_rows(flat, plan.index, plan.count)
        assert small.equal(_gather_rows(flat, plan.index, plan.count))
        for base in (None, flat):
            arguments = (small + 1, plan.index, plan.count, [7, 1, 1], base)
            assert rows.scatter_rows(*arguments).equal(_scatter_rows(*arguments))
