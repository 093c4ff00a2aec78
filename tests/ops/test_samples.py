"""SamplePlan, gather_samples and scatter_samples: values, gradients, trees, layouts, attacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import torch_threads
from torch import Tensor

from dynops import SamplePlan, ops
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LONG = 3 * 8192 + 5  # elements: rows that the CPU kernels cut in pieces
SHAPES = {
    "vectors": (6, 5),
    "numbers": (6,),
    "tokens": (6, 3, 7),
    "maps": (6, 3, 4, 5),
    "long rows": (6, LONG),
    "clips": (6, 2, 3, 4, 5),
}
KEEPS = {
    "some": [1, 0, 1, 0, 0, 1],
    "first": [1, 1, 0, 0, 0, 0],
    "last": [0, 0, 0, 0, 0, 1],
    "none": [0] * 6,
    "all": [1] * 6,
}


def plans(keep: list[int]):
    mask = torch.tensor(keep, dtype=torch.bool)
    yield SamplePlan.from_mask(mask)
    yield SamplePlan.from_mask(mask, sum(keep) + 2)
    yield SamplePlan.from_mask(mask, 2)


def kept_of(plan: SamplePlan) -> list[int]:
    return [i for i in plan.index.tolist() if i >= 0]


def share_of(scale: Tensor | None, count: int, x: Tensor) -> Tensor:
    share = torch.ones(count) if scale is None else scale[:count]
    return share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def merged(rows: Tensor, plan: SamplePlan, base: Tensor | None, add: bool, scale: Tensor | None) -> Tensor:
    """What scatter_samples is to give, a line for each of its forms, in the dtype of rows."""
    kept = kept_of(plan)
    out = rows.new_zeros(plan.batch, *rows.shape[1:]) if base is None else base.clone()
    value = rows[: len(kept)] * share_of(scale, len(kept), rows)
    if add:
        value = base[kept] + value
    elif scale is not None and base is not None:
        value = value + (1 - share_of(scale, len(kept), rows)) * base[kept]
    out[kept] = value
    return out


def assert_merged(actual: Tensor, exact: Tensor, dense: Tensor, what: str) -> None:
    """Within the error budget; few numbers, whose error in ``dense`` may be zero by luck, within four roundings of 1,
    which is the size of the terms."""
    if exact.numel() < 100 and actual.dtype == dense.dtype and actual.shape == exact.shape:
        assert ((actual.double() - exact).abs() <= 4 * torch.finfo(actual.dtype).eps).all(), what
    else:
        assert_within_budget(actual, exact, dense, what)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, *DTYPES])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 1, 1)])
def test_plan_of_a_mask(dtype, shape):
    keep = torch.tensor([1, 0, 1, 0, 0, 1])
    plan = SamplePlan.from_mask(keep.to(dtype).view(shape))
    assert plan.index.tolist() == [0, 2, 5] and plan.index.dtype == torch.int32
    assert (plan.batch, plan.num_rows, plan.count, plan.density) == (6, 3, None, 0.5)
    assert plan.mask().tolist() == keep.bool().tolist()
    assert plan.inverse().tolist() == [0, -1, 1, -1, -1, 2]
    assert plan.dropped().index.tolist() == [1, 3, 4]
    assert not plan.is_full and not plan.is_empty and plan.dropped().dropped().index.equal(plan.index)


def test_capacity_plans_pad_and_drop():
    keep = torch.tensor([1, 0, 1, 0, 0, 1])
    padded, cut = SamplePlan.from_mask(keep, 5), SamplePlan.from_mask(keep, 2)
    assert padded.index.tolist() == [0, 2, 5, -1, -1] and padded.count.tolist() == [3]
    assert cut.index.tolist() == [0, 2] and cut.count.tolist() == [2]
    assert padded.mask().equal(keep.bool()) and padded.density == 0.5
    assert kept_of(padded.dropped()) == [1, 3, 4] and padded.dropped().count.tolist() == [3]
    assert not SamplePlan.from_mask(torch.ones(2), 2).is_full  # nobody may look at the count


def test_full_and_empty_plans():
    full, none = SamplePlan.full(4), SamplePlan.from_mask(torch.zeros(4))
    assert full.is_full and not full.is_empty and full.mask().all()
    assert none.is_empty and not none.is_full and not none.mask().any()
    nobody = SamplePlan.from_mask(torch.zeros(0))
    assert nobody.is_full and nobody.is_empty and nobody.density == 0 and nobody.mask().shape == (0,)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), max_size=20), st.data())
def test_shrink_keeps_the_slots_of_the_batch(keep, data):
    slots = [i for i, kept in enumerate(keep) if kept]
    for capacity in (None, len(keep)):
        plan = SamplePlan.from_mask(torch.tensor(keep, dtype=torch.bool), capacity)
        left = slots
        while left:
            stays = data.draw(st.lists(st.booleans(), min_size=plan.num_rows, max_size=plan.num_rows))
            left = [slot for slot, stay in zip(left, stays, strict=False) if stay]
            stays = torch.tensor(stays, dtype=torch.bool)
            if capacity is None:
                assert plan.shrink(SamplePlan.from_mask(stays)).index.equal(plan.shrink(stays).index)
            plan = plan.shrink(stays)
            assert kept_of(plan) == left and plan.batch == len(keep)
            if not left or len(left) == len(slots):
                break


def test_pixels_are_the_whole_maps_of_the_samples():
    keep = torch.tensor([0, 1, 0, 1])
    for plan in (SamplePlan.from_mask(keep), SamplePlan.from_mask(keep, 3)):
        pixels = plan.pixels((3, 5))
        assert pixels.mask().equal(keep.bool()[:, None, None].expand(4, 3, 5))
        assert pixels is plan.pixels((3, 5))
        reads = pixels.needed(3, 1, 1)
        assert reads.shape == (4, 3, 5) and reads.mask().equal(pixels.mask())
        strided = pixels.needed(3, 2, 1, in_size=(6, 9))
        assert strided.mask().equal(keep.bool()[:, None, None].expand(4, 6, 9))
        gaps = pixels.needed(1, 2, 0, in_size=(6, 9))  # reads every other pixel of the samples
        assert gaps.mask().sum() == 2 * 15


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SamplePlan.from_mask([1, 0]), TypeError, "keep: expected a tensor"),
        (lambda: SamplePlan.from_mask(torch.zeros(2, dtype=torch.complex64)), TypeError, "keep: .*complex64"),
        (lambda: SamplePlan.from_mask(torch.tensor(1)), ValueError, r"keep: expected \[N\]"),
        (lambda: SamplePlan.from_mask(torch.ones(2, 3)), ValueError, r"got shape \(2, 3\)"),
        (lambda: SamplePlan.from_mask(torch.ones(2), -1), ValueError, "capacity: .*-1"),
        (lambda: SamplePlan(torch.ones(2), 4), TypeError, "index: expected int32"),
        (lambda: SamplePlan.full(4).shrink(torch.ones(3)), ValueError, "one value for each of 4 rows, got 3"),
        (lambda: SamplePlan.full(4).shrink(SamplePlan.full(3)), ValueError, "a compact plan of the 4 rows"),
    ],
)
def test_plans_refuse(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gather_and_scatter_move_samples(shape, dtype):
    x = random_tensor(*shape).mul(8).to(dtype)
    for keep in KEEPS.values():
        for plan in plans(keep):
            kept, rows = kept_of(plan), ops.gather_samples(x, plan)
            assert rows.dtype == dtype and rows[: len(kept)].equal(x[kept]) and not rows[len(kept) :].any()
            new = random_tensor(*rows.shape).mul(8).to(dtype)
            for base in (None, x):
                out = ops.scatter_samples(new, plan, base)
                assert out.dtype == dtype and out.equal(merged(new, plan, base, False, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False], ids=["add", "mix"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scatter_adds_and_mixes(shape, add, dtype):
    x = random_tensor(*shape, dtype=dtype)
    for keep in KEEPS.values():
        for plan in plans(keep):
            rows, scale = random_tensor(plan.num_rows, *shape[1:], dtype=dtype), random_tensor(plan.num_rows)
            scale[::2] = 1
            scales = (None, scale) if add else (scale,)
            for share in scales:
                actual = ops.scatter_samples(rows, plan, x, add=add, scale=share)
                exact = merged(rows.double(), plan, x.double(), add, share)
                assert_merged(actual, exact, merged(rows, plan, x, add, share), f"{keep} {plan}")
                left = plan.dropped().mask()
                assert actual[left].equal(x[left])


def test_scale_without_a_base():
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1]))
    rows, scale = random_tensor(2, 3), random_tensor(2)
    expected = merged(rows, plan, None, False, scale)
    assert ops.scatter_samples(rows, plan, scale=scale).equal(expected)


def test_a_row_of_scale_one_stands_alone():
    """A skipped shortcut may hold anything where the module's output replaces it."""
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1]))
    for columns in (4, LONG):
        rows, base = random_tensor(2, columns), random_tensor(3, columns)
        base[0] = float("nan")
        out = ops.scatter_samples(rows, plan, base, scale=torch.tensor([1.0, 0.5]))
        assert out[0].equal(rows[0]) and out.isfinite().all()


def test_unused_rows_of_a_capacity_plan_reach_nothing():
    """Nor does anything reach them: their gradients are zero."""
    plan, base = SamplePlan.from_mask(torch.tensor([1, 0, 1]), 3), random_tensor(3, 4).requires_grad_()
    rows, scale = random_tensor(3, 4), torch.tensor([1.0, 0.5, float("nan")], requires_grad=True)
    rows[2] = float("nan")
    rows.requires_grad_()
    for below, add, share in (
        (None, False, None),
        (base, False, None),
        (base, True, scale),
        (base, False, scale),
    ):
        out = ops.scatter_samples(rows, plan, below, add=add, scale=share)
        leaves = [t for t in (rows, below, share) if t is not None]
        grads = torch.autograd.grad(out.sum(), leaves)
        assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        assert not grads[0][2].any() and (share is None or not grads[-1][2].any())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(form):
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1, 1]))
    x = random_tensor(4, 3, 5, 6).contiguous(memory_format=form)
    rows = ops.gather_samples(x, plan)
    added = ops.scatter_samples(rows, plan, x, add=True)
    put = ops.scatter_samples(rows, plan, x.contiguous())
    for value in (rows, added, put):
        assert value.is_contiguous(memory_format=form)
    assert put.equal(x)


def test_trees():
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1]))
    state = {
        "maps": [random_tensor(3, 2, 4, 4), random_tensor(3, 5)],
        "count": (torch.arange(3), "name", None),
    }
    small = ops.gather_samples(state, plan)
    assert small["maps"][0].equal(state["maps"][0][[0, 2]]) and small["count"][0].tolist() == [0, 2]
    assert small["count"][1:] == ("name", None)
    back = ops.scatter_samples(small, plan, state)
    assert back["maps"][1].equal(state["maps"][1]) and back["count"][0].equal(state["count"][0])
    with pytest.raises(ValueError, match="base: expected a tree like rows"):
        ops.scatter_samples(small, plan, state["maps"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", [True, False], ids=["add", "mix"])
def test_gradients_of_the_kernels(add, dtype):
    """Against autograd through the formula in float64; the formula in the dtype sets the error budget."""
    plan = SamplePlan.from_mask(torch.tensor(KEEPS["some"]))
    tensors = [
        random_tensor(3, 2, 40, 50, dtype=dtype),
        random_tensor(6, 2, 40, 50, dtype=dtype),
        random_tensor(3),
    ]
    dy = random_tensor(6, 2, 40, 50, dtype=dtype)

    def gradients(function, wide: torch.dtype | None):
        own = [t.to(wide or t.dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*own), own, dy.to(wide or dtype))

    ours = gradients(lambda r, x, s: ops.scatter_samples(r, plan, x, add=add, scale=s), None)
    dense = gradients(lambda r, x, s: merged(r, plan, x, add, s), None)
    exact = gradients(lambda r, x, s: merged(r, plan, x, add, s), torch.float64)
    for name, a, e, d in zip(("rows", "base", "scale"), ours, exact, dense, strict=True):
        if name == "scale":  # three sums of 4000 products, whose error in the dense form may be zero by luck
            assert (a - e).norm() <= 8 * torch.finfo(dtype).eps * e.norm()
        else:
            assert_within_budget(a, e, d, name)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p, r, x: ops.gather_samples(x, torch.ones(3)), TypeError, "plan: expected a SamplePlan"),
        (lambda p, r, x: ops.gather_samples(x[:2], p), ValueError, r"x: expected \[3, ...\] .*got shape \(2, 4\)"),
        (lambda p, r, x: ops.gather_samples(torch.tensor(1.0), p), ValueError, "x: expected"),
        (lambda p, r, x: ops.gather_samples([x, x[:1]], p), ValueError, "x: expected"),
        (lambda p, r, x: ops.scatter_samples(x, p), ValueError, r"rows: expected \[2, ...\]"),
        (lambda p, r, x: ops.scatter_samples(r, p, x[:2]), ValueError, r"base: expected \[3, ...\]"),
        (lambda p, r, x: ops.scatter_samples(r, p, x[:, :3]), ValueError, r"base: expected samples of shape \(4,\)"),
        (lambda p, r, x: ops.scatter_samples(r, p, x.double()), TypeError, "base: expected the dtype of rows"),
        (lambda p, r, x: ops.scatter_samples(r, p, 1.0), TypeError, "base: expected a tensor"),
        (lambda p, r, x: ops.scatter_samples(r, p, add=True), ValueError, "base: expected a tensor"),
        (lambda p, r, x: ops.scatter_samples(r, p, x, scale=torch.ones(3)), ValueError, r"scale: expected \[2\]"),
        (lambda p, r, x: ops.scatter_samples(r, p, x, scale=torch.tensor([1, 1])), TypeError, "scale: expected a floating"),
        (lambda p, r, x: ops.scatter_samples(r, p, x, scale=2.0), TypeError, "scale: expected a floating"),
        (lambda p, r, x: ops.gather_samples(x.to("meta"), p), ValueError, "x: expected it on the plan's device"),
    ],
)  # fmt: skip
def test_ops_refuse(call, error, says):
    plan = SamplePlan.from_mask(torch.tensor([1, 0, 1]))
    with pytest.raises(error, match=says):
        call(plan, random_tensor(2, 4), random_tensor(3, 4))


@pytest.mark.parametrize("columns", [4, LONG])
@pytest.mark.parametrize("index", [[2, 0], [0, 0], [0, 3], [-1, 1]])
def test_the_binary_refuses_an_index_outside(index, columns):
    with pytest.raises(ValueError, match="index: expected"):
        SamplePlan(torch.tensor(index, dtype=torch.int32), 3)
    plan = SamplePlan._made(torch.tensor(index, dtype=torch.int32), 3)  # the last guard
    x, rows = random_tensor(3, columns), random_tensor(2, columns)
    for call in (
        lambda: ops.gather_samples(x, plan),
        lambda: ops.scatter_samples(rows, plan),
        lambda: ops.scatter_samples(rows, plan, x, add=True),
    ):
        with pytest.raises(RuntimeError, match="index: expected ascending positions"):
            call()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.booleans(), max_size=9),
    st.sampled_from([(), (1,), (7,), (3, 2, 3), (2, LONG)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_batch(keep, shape, dtype, add, threads):
    plan = SamplePlan.from_mask(torch.tensor(keep, dtype=torch.bool))
    x, rows = random_tensor(len(keep), *shape, dtype=dtype), random_tensor(plan.num_rows, *shape, dtype=dtype)
    scale = random_tensor(plan.num_rows)
    with torch_threads(threads):
        actual = ops.scatter_samples(rows, plan, x, add=add, scale=scale)
        gathered = ops.gather_samples(x, plan)
    assert gathered.equal(x[plan.mask()])
    exact = merged(rows.double(), plan, x.double(), add, scale)
    assert_merged(actual, exact, merged(rows, plan, x, add, scale), "scatter")
