"""ChannelPlan: what it holds, what it derives, and what it refuses."""

import pytest
import torch

from dynops import ChannelPlan
from dynops.ops import index as reference
from dynops.plans import as_channel_plan

pytestmark = pytest.mark.usefixtures("poisoned")

D = torch.ops.dynops
MASK_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def lists_of(mask: torch.Tensor) -> list[list[int]]:
    """The live channels of each row, one at a time."""
    return [[c for c, value in enumerate(row) if value] for row in mask.tolist()]


def lists_in(plan: ChannelPlan) -> list[list[int]]:
    """A plan's lists, after a check of their form."""
    assert plan.index.dtype == plan.count.dtype == torch.int32
    rows, counts = plan.index.tolist(), plan.count.tolist()
    assert len(rows) == len(counts)
    for row, count in zip(rows, counts, strict=True):
        assert all(channel == -1 for channel in row[count:])
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.4, 1])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 64), (5, 257), (0, 4), (4, 0)], ids=str)
def test_from_mask(shape, density, dtype):
    mask = torch.rand(shape) < density
    given = mask if dtype == torch.bool else mask.to(dtype) * 3
    for form in (given, given[:, :, None, None]):
        plan = ChannelPlan.from_mask(form)
        assert lists_in(plan) == lists_of(mask)
        assert (plan.channels, plan.heads, plan.shared, plan.batch) == (shape[1], 1, False, shape[0])
        assert plan.index.shape[1] == shape[1] and plan.capacity is None
        assert torch.equal(plan.mask(), mask)
        assert plan.width == (int(mask.sum(1).max()) if shape[0] else 0)
        assert plan.is_full == (bool(mask.all()) and shape[0] > 0)
        assert plan.density == int(mask.sum()) / max(mask.numel(), 1)


def test_shared_and_headed_masks():
    mask = torch.rand(9) < 0.5
    plan = ChannelPlan.from_mask(mask)
    assert lists_in(plan) == lists_of(mask[None]) and plan.shared and plan.batch is None
    assert torch.equal(plan.mask(), mask)
    mask = torch.rand(4, 3, 9) < 0.5
    plan = ChannelPlan.from_mask(mask)
    assert lists_in(plan) == lists_of(mask.view(12, 9)) and plan.heads == 3 and plan.batch == 4
    assert torch.equal(plan.mask(), mask) and not plan.shared


@pytest.mark.parametrize("capacity", [0, 1, 3, 7, 12])
def test_capacity_keeps_the_first_ones(capacity):
    mask = torch.rand(5, 7) < 0.6
    plan = ChannelPlan.from_mask(mask, capacity)
    assert lists_in(plan) == [row[:capacity] for row in lists_of(mask)]
    assert plan.width == plan.index.shape[1] == min(capacity, 7) and plan.capacity == capacity
    assert torch.equal(plan.mask(), mask & (mask.cumsum(1) <= capacity))


@pytest.mark.parametrize("width", [[0, 3, 8], [8], [], torch.tensor([1, 2]), torch.tensor([8, 0, 4], dtype=torch.uint8)])  # fmt: skip
def test_prefix(width):
    plan = ChannelPlan.prefix(width, 8)
    widths = width.tolist() if isinstance(width, torch.Tensor) else width
    assert lists_in(plan) == [list(range(w)) for w in widths]
    assert plan.batch == len(widths) and not plan.shared and plan.width == max(widths, default=0)


@pytest.mark.parametrize("width", [0, 1, 5, 8])
def test_shared_prefix(width):
    plan = ChannelPlan.prefix(width, 8)
    assert lists_in(plan) == [list(range(width))] and plan.shared and plan.is_full == (width == 8)
    assert torch.equal(plan.mask(), torch.arange(8) < width)


def test_full():
    plan = ChannelPlan.full(6)
    assert lists_in(plan) == [list(range(6))] and plan.shared and plan.is_full and plan.density == 1


@pytest.mark.parametrize("group", [1, 2, 5])
def test_grouped(group):
    mask = torch.rand(3, 4) < 0.5
    plan = ChannelPlan.grouped(mask, group)
    assert plan.channels == 4 * group and lists_in(plan) == lists_of(mask.repeat_interleave(group, 1))
    shared = ChannelPlan.grouped(mask[0].long(), group, capacity=3)
    assert shared.shared and lists_in(shared) == [lists_of(mask[:1].repeat_interleave(group, 1))[0][:3]]


def test_from_index():
    lists = [[0, 2, 5], [], [4]]
    assert lists_in(ChannelPlan.from_index(lists, 6)) == lists
    padded = torch.tensor([[0, 2, 5], [-1, -1, -1], [4, -1, -1]])
    for dtype in (torch.int64, torch.int32, torch.int8):
        plan = ChannelPlan.from_index(padded.to(dtype), 6)
        assert lists_in(plan) == lists and plan.batch == 3 and plan.width == 3
    counted = torch.tensor([[0, 2, 5], [9, 9, 9], [4, 4, 0]])  # what is past the count is not looked at
    assert lists_in(ChannelPlan.from_index(counted, 6, torch.tensor([3, 0, 1]))) == lists
    shared = ChannelPlan.from_index(torch.tensor([1, 3]), 6)
    assert shared.shared and lists_in(shared) == [[1, 3]]
    assert lists_in(ChannelPlan.from_index([1, 3], 6)) == [[1, 3]]
    assert lists_in(ChannelPlan.from_index([[], []], 6)) == [[], []]


def test_repr():
    plan = ChannelPlan.from_mask(torch.rand(3, 2, 7) < 0.5, 4)
    assert repr(plan) == "ChannelPlan(7 channels, 3 samples, 2 heads)"
    assert repr(ChannelPlan.full(5)) == "ChannelPlan(5 channels, all samples)"


def test_as_channel_plan():
    plan = ChannelPlan.full(3)
    assert as_channel_plan(plan) is plan
    assert lists_in(as_channel_plan(torch.tensor([[0, 1]]))) == [[1]]
    with pytest.raises(TypeError, match="gate: expected a ChannelPlan or a mask tensor, got list"):
        as_channel_plan([1], "gate")


MASK = torch.ones(2, 6)


@pytest.mark.parametrize("error, match, make", [
    (TypeError, r"mask: expected a tensor .*got list", lambda: ChannelPlan.from_mask([1, 0])),
    (TypeError, r"mask: .*complex64", lambda: ChannelPlan.from_mask(MASK.to(torch.complex64))),
    (TypeError, r"mask: .*sparse", lambda: ChannelPlan.from_mask(MASK.to_sparse())),
    (ValueError, r"mask: .*\(2, 6, 2, 1\)", lambda: ChannelPlan.from_mask(MASK[:, :, None, None].expand(-1, -1, 2, 1))),
    (ValueError, r"mask: .*got shape \(\)", lambda: ChannelPlan.from_mask(torch.tensor(1))),
    (ValueError, r"capacity: .*-1", lambda: ChannelPlan.from_mask(MASK, -1)),
    (ValueError, r"capacity: .*1.5", lambda: ChannelPlan.from_mask(MASK, 1.5)),
    (ValueError, r"width: expected ints in \[0, 6\], got 0 to 7", lambda: ChannelPlan.prefix([0, 7], 6)),
    (ValueError, r"width: .*-1", lambda: ChannelPlan.prefix(torch.tensor([-1]), 6)),
    (ValueError, r"width: .*9", lambda: ChannelPlan.prefix(9, 6)),
    (TypeError, r"width: .*float32", lambda: ChannelPlan.prefix(torch.tensor([0.5]), 6)),
    (TypeError, r"width: .*\[0.5\]", lambda: ChannelPlan.prefix([0.5], 6)),
    (TypeError, r"width: .*\(1, 1\)", lambda: ChannelPlan.prefix(torch.tensor([[1]]), 6)),
    (ValueError, r"group: .*0", lambda: ChannelPlan.grouped(MASK, 0)),
    (ValueError, r"mask: .*\(2, 6, 1\)", lambda: ChannelPlan.grouped(MASK[..., None], 2)),
    (ValueError, r"index: .*ascending.*\[2, 1, -1\] in list 1", lambda: ChannelPlan.from_index([[0, 1, 2], [2, 1]], 6)),
    (ValueError, "index", lambda: ChannelPlan.from_index(torch.tensor([[0, 2, -1, 3]]), 6)),
    (ValueError, r"index: .*ascending.*\[1, 1\]", lambda: ChannelPlan.from_index([[1, 1]], 6)),
    (ValueError, r"index: .*\[0, 6\).*\[6\]", lambda: ChannelPlan.from_index([[6]], 6)),
    (ValueError, r"index: .*\[-2\]", lambda: ChannelPlan.from_index(torch.tensor([[-2]]), 6, torch.tensor([1]))),
    (ValueError, r"count: .*\(2,\)", lambda: ChannelPlan.from_index([[1]], 6, torch.tensor([1, 1]))),
    (ValueError, r"count: expected 0 to 1, got \[2\]", lambda: ChannelPlan.from_index([[1]], 6, torch.tensor([2]))),
    (TypeError, r"index: .*float32", lambda: ChannelPlan.from_index(torch.tensor([[1.0]]), 6)),
    (TypeError, r"index: .*str", lambda: ChannelPlan.from_index("12", 6)),
    (ValueError, r"index: .*\(1, 1, 1\)", lambda: ChannelPlan.from_index(torch.tensor([[[1]]]), 6)),
    (ValueError, r"channels: .*-1", lambda: ChannelPlan.from_index([[1]], -1)),
    (TypeError, r"index, count: .*int64", lambda: ChannelPlan(torch.zeros(1, 2).long(), torch.ones(1).int(), 6)),
    (ValueError, r"count: .*1 lists.*got 2", lambda: ChannelPlan(torch.zeros(1, 2).int(), torch.ones(2).int(), 6)),
])  # fmt: skip
def test_refusals(error, match, make):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_the_references_are_what_runs(dtype):
    """The binary takes the CPU; the references in ops/index.py run elsewhere and define both."""
    for rows, channels in ((0, 5), (3, 0), (3, 5), (2, 64), (7, 300)):
        mask = (torch.rand(rows, channels) < 0.5).to(dtype)
        for size in {0, min(1, channels), channels // 2, channels}:
            index, count = D.channel_index(mask, size)
            right = reference._channel_index(mask, size)
            assert torch.equal(index, right[0]) and torch.equal(count, right[1])
            assert torch.equal(
                D.channel_mask(index, count, channels), reference._channel_mask(index, count, channels)
            )
