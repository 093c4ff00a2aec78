"""Plans from coordinates, plans of several batches, plans through a DataLoader, an index that somebody else made."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, default_collate

import dynops
from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan
from dynops import nn as layers

SHAPE = (2, 5, 7)


def coordinates(count: int, seed: int = 0, shape=SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, size, (count,), generator=generator) for size in shape], 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(0, 9), st.sampled_from([None, 0, 5, 80]))
def test_coordinates_in_any_order(count, seed, capacity):
    places = coordinates(count, seed)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    for n, y, x in places.tolist():
        mask[n, y, x] = True
    plan = PixelPlan.from_coordinates(places, SHAPE, capacity)
    expected = PixelPlan.from_mask(mask, capacity)
    assert torch.equal(plan.index, expected.index) and plan.shape == SHAPE
    assert (plan.count is None) == (capacity is None) and (capacity is None or plan.count == expected.count)
    rows = plan.rows_of(places)
    flat = places[:, 0] * 35 + places[:, 1] * 7 + places[:, 2]
    kept = rows >= 0
    assert rows.dtype == torch.int64 and (kept.all() or capacity in (0, 5))
    assert torch.equal(plan.index[rows[kept]].long(), flat[kept])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_coordinates_of_one_sample(dtype):
    places = coordinates(9, shape=(5, 7)).to(dtype)
    mask = torch.zeros(1, 5, 7)
    mask[0, places[:, 0].long(), places[:, 1].long()] = 1
    plan = PixelPlan.from_coordinates(places, [1, 5, 7])
    assert torch.equal(plan.mask(), mask > 0) and (plan.rows_of(places) >= 0).all()


def test_features_in_the_order_of_their_coordinates():
    """What a user of a sparse-tensor library does: features beside unsorted coordinates, through a layer, and back."""
    places = coordinates(200, 1).unique(dim=0)
    places = places[torch.randperm(len(places))]
    features = torch.randn(len(places), 4)
    plan = PixelPlan.from_coordinates(places, SHAPE)
    rows = plan.rows_of(places)
    packed = features.new_zeros(plan.num_rows, 4).index_add(0, rows, features)
    conv = layers.SparseConv2d(4, 6, 3, padding=1)
    out = dynops.ops.packed_conv2d(packed, conv.weight, conv.bias, plan, plan, padding=1)[rows]
    dense = torch.zeros(2, 4, 5, 7)
    dense[places[:, 0], :, places[:, 1], places[:, 2]] = features
    expected = torch.nn.Conv2d.forward(conv, dense)[places[:, 0], :, places[:, 1], places[:, 2]]
    torch.testing.assert_close(out, expected)


def test_pixels_that_are_not_in_the_plan():
    plan = PixelPlan.from_coordinates(torch.tensor([[1, 2]]), (1, 3, 4))
    assert plan.rows_of(torch.tensor([[1, 2], [0, 0], [2, 3]])).tolist() == [0, -1, -1]
    empty = PixelPlan.from_coordinates(torch.empty(0, 3, dtype=torch.int64), SHAPE)
    assert len(empty) == 0 and empty.rows_of(coordinates(3)).tolist() == [-1] * 3
    nothing = PixelPlan.from_coordinates(torch.empty(0, 3, dtype=torch.int64), (0, 4, 4))
    assert nothing.shape == (0, 4, 4)


@pytest.mark.parametrize("places, shape, error, match", [
    ([[0, 0, 0]], SHAPE, TypeError, "coordinates: expected a tensor of ints .*list"),
    (torch.zeros(3, 3), SHAPE, TypeError, "coordinates: expected a tensor of ints .*float32"),
    (torch.zeros(3, 3, dtype=torch.bool), SHAPE, TypeError, "coordinates: .*bool"),
    (torch.zeros(3, 4, dtype=torch.int64), SHAPE, ValueError, r"coordinates: expected \[P, 3\].*\(3, 4\)"),
    (torch.zeros(3, dtype=torch.int64), SHAPE, ValueError, r"coordinates: expected \[P, 3\]"),
    (torch.zeros(3, 2, dtype=torch.int64), SHAPE, ValueError, r"coordinates: expected \[P, 3\].*batch of 2"),
    (torch.tensor([[0, 0, 0], [0, 5, 0]]), SHAPE, ValueError, r"coordinates: .*\(2, 5, 7\), got \[0, 5, 0\] at 1"),
    (torch.tensor([[-1, 0, 0]]), SHAPE, ValueError, r"coordinates: .*got \[-1, 0, 0\] at 0"),
    (torch.tensor([[0, 7]]), (1, 5, 7), ValueError, r"coordinates: .*got \[0, 7\] at 0"),
    (torch.tensor([[2**40, 0, 0]]), SHAPE, ValueError, "coordinates: .*1099511627776"),
    (torch.zeros(1, 3, dtype=torch.int64), (5, 7), ValueError, r"shape: expected \(N, H, W\), got \(5, 7\)"),
    (torch.zeros(1, 3, dtype=torch.int64), (1, 2**16, 2**16), ValueError, "shape: expected at most 2147483647"),
])  # fmt: skip
def test_bad_coordinates(places, shape, error, match):
    with pytest.raises(error, match=match):
        PixelPlan.from_coordinates(places, shape)


def test_coordinates_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(places, x):
        return dynops.ops.gather_pixels(x, PixelPlan.from_coordinates(places, SHAPE))

    places, x = coordinates(12), torch.randn(2, 3, 5, 7)
    plan = PixelPlan.from_coordinates(places, SHAPE)
    assert torch.equal(run(places, x)[: len(plan)], dynops.ops.gather_pixels(x, plan))


@pytest.mark.parametrize("index, count, error, match", [
    ([3, 1], None, ValueError, "index: expected strictly ascending positions, got 1 after 3; from_coordinates"),
    ([1, 1], None, ValueError, "index: expected strictly ascending positions, got 1 after 1"),
    ([0, 12], None, ValueError, r"index: expected positions in \[0, 12\), got 12"),
    ([-1, 3], None, ValueError, r"index: expected positions in \[0, 12\), got -1"),
    ([3, 1, -1], 2, ValueError, "index: expected strictly ascending positions, got 1 after 3"),
    ([1, 3, 5], 2, ValueError, r"index: expected -1 from position 2 on, got \[5\]"),
    ([1, -1, -1], 2, ValueError, r"index: expected positions in \[0, 12\), got -1"),
    ([1, 3], 4, ValueError, "count: expected 0 to 2, got 4"),
])  # fmt: skip
def test_an_index_that_is_none(index, count, error, match):
    index = torch.tensor(index, dtype=torch.int32)
    count = None if count is None else torch.tensor([count], dtype=torch.int32)
    geometry = BlockPlan.from_mask(torch.ones(1, 3, 4), 1).geometry
    with pytest.raises(error, match=match):
        PixelPlan(index, (1, 3, 4), count)
    with pytest.raises(error, match=match.partition("; ")[0]):
        SamplePlan(index, 12, count)
    with pytest.raises(error, match=match.partition("; ")[0]):
        BlockPlan(index, geometry, count)


def test_an_index_that_is_one():
    index = torch.tensor([1, 3, -1], dtype=torch.int32)
    assert len(PixelPlan(index[:2], (1, 3, 4))) == 2 and len(PixelPlan(index[:0], (0, 3, 4))) == 0
    assert PixelPlan(index, (1, 3, 4), torch.tensor([2], dtype=torch.int32)).mask().sum() == 2
    with pytest.raises(TypeError, match=r"index: expected int32 \[P\], got list"):
        PixelPlan([0], (1, 3, 4))
    with pytest.raises(TypeError, match=r"count: expected int32 \[1\] or None, got torch.int64"):
        PixelPlan(index, (1, 3, 4), torch.tensor([2]))


MASKS = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(0)) < 0.4
MASKS[1] = False
CHANNELS = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) < 0.5
TOPK = torch.randint(0, 5, (12, 2), generator=torch.Generator().manual_seed(0))  # 4 of 4: dropped


def same(a, b) -> None:
    assert type(a) is type(b) and repr(a) == repr(b)
    for name in ("index", "count", "order", "offsets", "position"):
        x, y = getattr(a, name, None), getattr(b, name, None)
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name


KINDS = {
    "pixels": lambda part: PixelPlan.from_mask(MASKS[part]),
    "pixels, capacity": lambda part: PixelPlan.from_mask(MASKS[part], 24 * len(MASKS[part])),
    "blocks": lambda part: BlockPlan.from_mask(MASKS[part], (4, 2)),
    "blocks, capacity": lambda part: BlockPlan.from_mask(MASKS[part], 2, capacity=6 * len(MASKS[part])),
    "samples": lambda part: SamplePlan.from_mask(MASKS[part, 0, 0]),
    "samples, capacity": lambda part: SamplePlan.from_mask(MASKS[part, 0, 0], len(MASKS[part])),
    "channels": lambda part: ChannelPlan.from_mask(CHANNELS[part]),
    "channels, capacity": lambda part: ChannelPlan.from_mask(CHANNELS[part], 3),
    "heads": lambda part: ChannelPlan.from_mask(CHANNELS[part].view(-1, 2, 4)),
    "experts": lambda part: ExpertPlan.from_topk(TOPK[2 * part.start : 2 * (part.stop or 5)], 4),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_cat_is_the_plan_of_the_whole_batch(make):
    parts = [make(slice(0, 2)), make(slice(2, 3)), make(slice(3, 5))]
    whole = type(parts[0]).cat(parts)
    same(whole, make(slice(0, 5)))
    same(default_collate(parts), whole)
    same(type(whole).cat(iter([whole])), whole)
    same(copy.deepcopy(whole), whole)
    same(pickle.loads(pickle.dumps(whole)), whole)
    same(whole.to("cpu", non_blocking=True), whole)
    there = whole.to("meta")
    assert vars(there).keys() == vars(whole).keys() and there.device.type == "meta"
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert vars(there)[name].is_meta and vars(there)[name].shape == value.shape
        elif name != "_derived":
            assert vars(there)[name] == value


def test_compact_and_capacity_together():
    parts = [PixelPlan.from_mask(MASKS[:2]), PixelPlan.from_mask(MASKS[2:], 60)]
    plan = PixelPlan.cat(parts)
    assert plan.num_rows == parts[0].num_rows + 60 and torch.equal(plan.mask(), MASKS)
    assert int(plan.count) == MASKS.sum() and (plan.index[int(plan.count) :] == -1).all()


def test_shared_channels_are_those_of_a_sample_and_limits_add_up():
    plan = default_collate([ChannelPlan.from_mask(row) for row in CHANNELS])
    assert not plan.shared and torch.equal(plan.mask(), CHANNELS)
    dropping = [ExpertPlan.from_topk(part, 4, capacity=2) for part in TOPK.split(6)]
    plan = ExpertPlan.cat(dropping)
    assert plan.capacity == 4 and torch.equal(
        plan.position >= 0, torch.cat([p.position for p in dropping]) >= 0
    )


def test_plans_that_do_not_go_together():
    plan = PixelPlan.from_mask(MASKS)
    for plans, error, match in [
        ([], ValueError, "plans: expected at least one PixelPlan, got none"),
        ([plan, 3], TypeError, r"plans\[1\]: expected a PixelPlan, got int"),
        (
            [plan, PixelPlan.from_mask(MASKS[:, 1:])],
            ValueError,
            r"plans\[1\]: expected the size of the first",
        ),
        ([plan, plan.to("meta")], ValueError, r"plans\[1\]: expected the device of the first"),
    ]:
        with pytest.raises(error, match=match):
            PixelPlan.cat(plans)
    blocks = [BlockPlan.from_mask(MASKS, 2), BlockPlan.from_mask(MASKS, 3)]
    with pytest.raises(ValueError, match=r"plans\[1\]: expected the grid of the first"):
        BlockPlan.cat(blocks)
    with pytest.raises(ValueError, match=r"plans\[1\]: expected the channels of the first, 8, got 7"):
        ChannelPlan.cat([ChannelPlan.from_mask(CHANNELS), ChannelPlan.from_mask(CHANNELS[:, 1:])])
    with pytest.raises(ValueError, match=r"plans\[1\]: expected the topk of the first, 2, got 1"):
        ExpertPlan.cat([ExpertPlan.from_topk(TOPK, 4), ExpertPlan.from_topk(TOPK[:, :1], 4)])


class Pairs(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.full((3, 6, 4), float(i)), {"plan": PixelPlan.from_mask(MASKS[i]), "name": str(i)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_collates_plans(workers):
    conv, seen = layers.SparseConv2d(3, 4, 3, padding=1), 0
    for x, more in DataLoader(Pairs(), batch_size=2, num_workers=workers):
        part = slice(seen, seen + len(x))
        same(more["plan"], PixelPlan.from_mask(MASKS[part]))
        torch.testing.assert_close(conv(x, more["plan"]), conv(x, MASKS[part]))
        seen += len(x)
    assert seen == 5


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_pinned_memory(make, monkeypatch):
    """What a DataLoader asks for on a machine with a GPU: every tensor of the plan is pinned."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    plan = make(slice(0, 5))
    [copied] = pin_memory([plan])
    same(copied, plan)
    tensors = [t for t in vars(plan).values() if isinstance(t, torch.Tensor)]
    assert len(tensors) >= 1 and {id(t) for t in tensors} == {id(t) for t in pinned}
