"""ExpertPlan: what it holds, whom a capacity drops, and what it refuses."""

import pytest
import torch
from expert_cases import KINDS, choices, sorted_pairs, with_capacity
from hypothesis import given, settings
from hypothesis import strategies as st

from dynops import ExpertPlan
from dynops.ops import index as reference
from dynops.testing import available_backends

pytestmark = pytest.mark.usefixtures("poisoned")

D = torch.ops.dynops
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
IMPLEMENTATIONS = {"reference": reference._expert_index} | (
    {"cpp": D.expert_index} if "cpp" in available_backends() else {}
)


def check(plan: ExpertPlan, index, experts: int, capacity: int | None) -> None:
    """Every attribute, from the choices alone."""
    kept = with_capacity(index, experts, capacity)
    flat, order = kept.flatten().tolist(), sorted_pairs(kept)
    counts = [flat.count(e) for e in range(experts)]
    assert plan.order.tolist() == order
    assert plan.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    row = {pair: p for p, pair in enumerate(order)}
    expected = [-1 if flat[pair] == experts else row[pair] for pair in range(len(flat))]
    assert plan.position.shape == index.shape and plan.position.flatten().tolist() == expected
    assert plan.counts.tolist() == counts
    assert plan.expert.tolist() == [flat[pair] for pair in order]
    assert plan.token.tolist() == [pair // index.shape[1] for pair in order]
    assert (plan.tokens, plan.topk) == tuple(index.shape)
    assert (plan.num_experts, plan.num_rows, plan.capacity) == (experts, len(flat), capacity)
    for t in (plan.order, plan.offsets, plan.position, plan.counts, plan.expert, plan.token):
        assert t.dtype == torch.int32


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_integers(dtype):
    index = choices("some dropped", 30, 2, 5)
    check(ExpertPlan.from_topk(index.to(dtype), 5, 7), index, 5, 7)


def test_one_choice_needs_no_second_dimension():
    index = torch.tensor([2, 0, 2, 1])
    check(ExpertPlan.from_topk(index, 3), index[:, None], 3, None)


def test_choices_need_not_be_contiguous():
    index = choices("random", 40, 6, 5)
    for view in (index[:, ::2], index[::3], index.t(), index[:1].expand(4, 6), index[0, 0].expand(3, 2)):
        check(ExpertPlan.from_topk(view, 5, 9), view, 5, 9)


def test_first_choices_find_places_before_second_ones():
    index = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    plan = ExpertPlan.from_topk(index, 2, capacity=2)
    assert plan.position.tolist() == [[0, 2], [1, -1], [3, -1], [-1, -1]]
    assert plan.order.tolist() == [0, 2, 1, 4, 3, 5, 6, 7] and plan.offsets.tolist() == [0, 2, 4]


def test_many_experts_and_many_pairs():
    """More than a byte, than 16 bits, of either."""
    index = torch.randint(0, 70_001, (40_000, 2))
    plan, order = ExpertPlan.from_topk(index, 70_000), index.flatten().argsort(stable=True)
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.counts.long(), index.flatten().bincount(minlength=70_001)[:70_000])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 9), st.sampled_from(KINDS), st.none() | st.integers(0, 20), st.integers(0, 99))  # fmt: skip
def test_every_implementation_does_as_the_oracle(tokens, topk, experts, kind, capacity, seed):
    torch.manual_seed(seed)
    index = choices(kind, tokens, topk, experts)
    for run in IMPLEMENTATIONS.values():
        plan = ExpertPlan(*run(index, experts, -1 if capacity is None else capacity), capacity)
        check(plan, index, experts, capacity)


def test_repr():
    plan = ExpertPlan.from_topk(choices("random", 8, 2, 3), 3, 4)
    assert repr(plan) == repr(plan.to("meta")) == "ExpertPlan(8 tokens, 2 of 3 experts, capacity 4)"


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("index, low, high", [([[0, 4]], 0, 4), ([[-1, 2]], -1, 2), ([[2**40, -(2**35)]], -(2**35), 2**40), ([[2**32, 0]], 0, 2**32)])  # fmt: skip
def test_a_choice_out_of_range_is_an_error(index, low, high, implementation, monkeypatch):
    index = torch.tensor(index)
    with pytest.raises(RuntimeError, match=rf"index: expected values in \[0, 3\], got {low} to {high}"):
        IMPLEMENTATIONS[implementation](index, 3, -1)
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, 3\], got {low} to {high}"):
        ExpertPlan.from_topk(index, 3)


I32 = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize("error, match, make", [
    (TypeError, r"index: expected integers \[T, K\], got torch.float32", lambda: ExpertPlan.from_topk(torch.ones(2, 2), 3)),
    (TypeError, r"index: expected integers \[T, K\], got torch.bool", lambda: ExpertPlan.from_topk(torch.ones(2, 2).bool(), 3)),
    (TypeError, r"index: expected integers \[T, K\], got list", lambda: ExpertPlan.from_topk([[1]], 3)),
    (ValueError, r"index: expected \[T, K\].*\(2, 2, 1\)", lambda: ExpertPlan.from_topk(torch.ones(2, 2, 1).long(), 3)),
    (ValueError, r"index: expected \[T, K\] with K >= 1.*\(2, 0\)", lambda: ExpertPlan.from_topk(torch.ones(2, 0).long(), 3)),
    (ValueError, r"index: expected fewer than 2\*\*31 pairs, got 2147483648", lambda: ExpertPlan.from_topk(torch.zeros(1, 1).long().expand(2**30, 2), 3)),
    (ValueError, r"num_experts: expected an int >= 1, got 0", lambda: ExpertPlan.from_topk(torch.ones(2, 2).long(), 0)),
    (ValueError, r"num_experts: .*3.0", lambda: ExpertPlan.from_topk(torch.ones(2, 2).long(), 3.0)),
    (ValueError, r"capacity: expected an int >= 0 or None, got -1", lambda: ExpertPlan.from_topk(torch.ones(2, 2).long(), 3, -1)),
    (ValueError, r"capacity: .*1.25", lambda: ExpertPlan.from_topk(torch.ones(2, 2).long(), 3, 1.25)),
    (TypeError, r"order: expected int32 of 1 dimensions, got torch.int64", lambda: ExpertPlan(I32.long(), I32, I32.view(2, 2))),
    (TypeError, r"position: expected int32 of 2 dimensions", lambda: ExpertPlan(I32, I32, I32)),
    (ValueError, r"order, offsets, position: expected \[T \* K\], \[E \+ 1\] and \[T, K\], got \(3,\)", lambda: ExpertPlan(I32[:3], I32, I32.view(2, 2))),
    (ValueError, r"order, offsets, position: .*\(1,\)", lambda: ExpertPlan(I32, I32[:1], I32.view(2, 2))),
])  # fmt: skip
def test_refusals(error, match, make):
    with pytest.raises(error, match=match):
        make()
