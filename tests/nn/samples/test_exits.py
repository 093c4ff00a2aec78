"""EarlyExit and Cascade, against every exit computed for every sample and the choice made afterwards."""

import copy
import math

import pytest
import torch
from exit_cases import (
    CLASSES,
    Calls,
    First,
    Pick,
    Scale,
    choose,
    every_exit,
    first_exit,
    halve,
    pick_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops import backends
from dynops.nn.samples.criteria import (
    Entropy,
    IDKClass,
    LearnedExit,
    Margin,
    MaxSoftmax,
    Patience,
    Verdict,
)
from dynops.nn.samples.exits import Cascade, EarlyExit, at_most
from dynops.stack import traced
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


CRITERIA = {  # a criterion, and the same decision from all logits by a formula of its own
    "max softmax": (lambda: MaxSoftmax(0.5), lambda z, e: z.softmax(1).max(1).values >= 0.5),
    "one for each": (lambda: MaxSoftmax([0.7, 0.3]), lambda z, e: z.softmax(1).max(1).values >= (0.7, 0.3)[e]),
    "temperature": (lambda: MaxSoftmax(0.5, [2.0, 0.5]), lambda z, e: (z / (2, 0.5)[e]).softmax(1).max(1).values >= 0.5),
    "entropy": (
        lambda: Entropy(1.0),
        lambda z, e: torch.distributions.Categorical(logits=z).entropy() <= 1.0,
    ),
    "normalized": (
        lambda: Entropy(0.6, normalize=True),
        lambda z, e: torch.distributions.Categorical(logits=z).entropy() / math.log(CLASSES) <= 0.6,
    ),
    "margin": (lambda: Margin(0.2), lambda z, e: z.softmax(1).sort(1).values[:, -2:].diff(dim=1)[:, 0] >= 0.2),
    "idk": (lambda: IDKClass(1, 0.8), lambda z, e: 1 - z.softmax(1)[:, 1] >= 0.8),
    "callable": (lambda: lambda z, e, state: z[:, 0] > 0.5 - e, lambda z, e: z[:, 0] > 0.5 - e),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_the_dense_form_bit_for_bit(name, dtype):
    make, formula = CRITERIA[name]
    model = pick_model(make()).to(dtype)
    x = random_tensor(40, 3, 4, 4, dtype=dtype)
    logits = every_exit(model, x)
    wide = [each.float() if dtype == torch.bfloat16 else each for each in logits]
    expected = first_exit([formula(z, e) for e, z in enumerate(wide[:-1])])
    out = model(x)
    assert len(set(expected.tolist())) >= 2  # else the test sees little
    assert out.exits.dtype == torch.int64 and torch.equal(out.exits, expected)
    assert out.logits.dtype == dtype and torch.equal(out.logits, choose(logits, expected))


@torch.no_grad()
def test_stages_run_on_the_remaining_samples_in_order():
    seen = []
    model = pick_model(lambda logits, e, x: torch.arange(len(x)) % 2 == 0, seen)
    x = random_tensor(11, 3, 4, 4)
    out = model(x)
    assert [len(x) for x in seen] == [11, 5, 2]
    assert out.exits.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0]
    assert torch.equal(seen[1], model.stages[0](x)[1::2])


def tree_stage(state: dict, e: int) -> dict:
    """A stage on a dict of lists of maps with a counter, an int and a text."""
    return {
        "maps": [state["maps"][0] * 2 + e, state["maps"][1] - 1],
        "steps": state["steps"] + 1,
        "depth": state["depth"] + 1,
        "at": state["at"],
        "name": state["name"],
    }


class TreeHead(nn.Module):
    def forward(self, state):
        assert state["name"] == "msdnet"
        sums = torch.stack([m.flatten(1)[:, 0] for m in state["maps"]], 1)
        return torch.cat([sums, state["steps"][:, None].to(sums.dtype) + state["depth"]], 1)


def tree_of(leave_at: Tensor) -> dict:
    n = len(leave_at)
    big = random_tensor(n, 4, 6, 6).to(memory_format=torch.channels_last)
    steps = torch.arange(n) * 10
    return {
        "maps": [big, random_tensor(n, 2, 3, 3)],
        "steps": steps,
        "depth": 0,
        "at": leave_at,
        "name": "msdnet",
    }


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(0, 9), exits=st.integers(1, 5))
def test_any_exit_pattern_of_a_tree_of_maps(data, n, exits):
    at = data.draw(st.lists(st.integers(0, exits), min_size=n, max_size=n))
    at = torch.tensor(at, dtype=torch.int64)
    model = EarlyExit(
        [Calls(lambda state, e=e: tree_stage(state, e)) for e in range(exits)],
        [TreeHead() for _ in range(exits)],
        lambda logits, e, state: state["at"] <= e,
    ).eval()
    state = tree_of(at)
    logits, dense = [], state
    for e in range(exits):
        dense = tree_stage(dense, e)
        logits.append(TreeHead()(dense))
    out = model(state)
    expected = at.clamp(max=exits - 1)
    assert torch.equal(out.exits, expected)
    assert torch.equal(out.logits, choose(logits, expected) if n else logits[0])
    assert all(torch.equal(a, b) for a, b in zip(model(state, all_exits=True), logits, strict=True))


@torch.no_grad()
def test_logits_that_are_maps_keep_their_format():
    for layout in (torch.channels_last, torch.contiguous_format):
        model = EarlyExit([Scale(3), Scale(3)], [nn.Identity()] * 2, MaxSoftmax(0)).eval()
        x = random_tensor(12, 3, 2, 2).to(memory_format=layout)
        halve(model, x)
        logits = every_exit(model, x)
        leaves = logits[0].softmax(1).max(1).values.mean((1, 2)) >= model.criterion.threshold[0]
        out = model(x)
        assert 0 < leaves.sum() < 12
        assert torch.equal(out.logits, torch.where(leaves.view(-1, 1, 1, 1), *logits))
        assert out.logits.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_where_nobody_leaves_nothing_is_copied():
    """The next stage gets the very tensor that the last one returned."""
    returned, seen = [], []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(x)
            returned.append(x + 1)
            return returned[-1]

    model = EarlyExit([Watched() for _ in range(3)], [Pick() for _ in range(3)], MaxSoftmax(2.0)).eval()
    x = random_tensor(4, 3, 4, 4)
    model(x)  # the first call tells that the stages write nowhere
    returned.clear(), seen.clear()
    out = model(x)
    assert out.exits.tolist() == [2] * 4 and torch.equal(out.logits, Pick()(x + 1 + 1 + 1))
    assert seen[0] is x and seen[1] is returned[0] and seen[2] is returned[1]


@torch.no_grad()
@pytest.mark.parametrize(
    "criterion",
    [MaxSoftmax(-1.0), Entropy(1e9), Margin(-1.0), IDKClass(0, -1.0), Patience(1), Patience(1, 1e9)],
    ids=lambda c: f"{type(c).__name__}{'' if getattr(c, 'tolerance', None) is None else ' of values'}",
)
def test_a_nan_confidence_never_leaves(criterion):
    model = pick_model(criterion)
    x = torch.ones(4, 3, 4, 4)  # everybody agrees with itself from the second exit on
    for stage in model.stages:
        stage.weight.fill_(1.0)
    x[1] = math.nan
    x[3, 0, 0, 0] = math.nan
    out = model(x)
    at = 1 if isinstance(criterion, Patience) else 0
    assert out.exits.tolist() == [at, 2, at, 2]
    assert out.logits[1].isnan().all() and out.logits[[0, 2]].isfinite().all()


@torch.no_grad()
def test_infinite_logits_are_defined():
    z = torch.tensor([[0.0, -math.inf, 0.0], [math.inf, 0.0, 0.0], [-math.inf, 2.0, -math.inf]])
    assert MaxSoftmax(0.4)(z, 0).leave.tolist() == [True, False, True]
    assert torch.equal(Entropy(0.7)(z, 0).confidence[[0, 2]], -torch.tensor([math.log(2), 0.0]))
    assert Entropy(0.7)(z, 0).leave.tolist() == [True, False, True]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 10))
def test_at_most_takes_the_least_confident(data, n):
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    values = st.sampled_from([0.0, 0.25, 0.5, math.inf, -math.inf, math.nan])
    confidence = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
    most = data.draw(st.integers(0, n))
    rank = sorted(
        (i for i in range(n) if keep[i]),
        key=lambda i: (-math.inf if math.isnan(confidence[i]) else float(confidence[i]), i),
    )
    chosen = [i in rank[:most] for i in range(n)]
    assert at_most(keep, confidence, most).tolist() == chosen


@torch.no_grad()
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0, [0.75, 0.2]])
def test_max_fraction_is_a_hard_cap_when_nobody_wants_to_leave(fraction):
    """A slowdown attack: every confidence is below every threshold."""
    seen = []
    model = pick_model(MaxSoftmax(2.0), seen, max_fraction=fraction)
    x = random_tensor(20, 3, 4, 4)
    out = model(x)
    each = fraction if isinstance(fraction, list) else [fraction] * 2
    allowed = [math.floor(each[0] * 20), math.floor(each[1] * 20)]
    passed = [int((out.exits > e).sum()) for e in range(2)]
    assert passed == [allowed[0], min(allowed)]
    assert [len(x) for x in seen] == [n for n in (20, *passed) if n]
    logits = every_exit(model, x)
    assert torch.equal(out.logits, choose(logits, out.exits))
    sure = logits[0].softmax(1).max(1).values
    if 0 < passed[0] < 20:
        assert sure[out.exits > 0].max() <= sure[out.exits == 0].min()


@torch.no_grad()
def test_max_fraction_keeps_nan_and_leaves_the_willing_alone():
    model = pick_model(MaxSoftmax(0.5), max_fraction=0.25)
    x = random_tensor(8, 3, 4, 4)
    x[5] = math.nan
    out = model(x)
    assert out.exits[5] == 2 and (out.exits > 0).sum() <= 2
    free = pick_model(MaxSoftmax(0.0), max_fraction=0.25)
    assert free(x[:5]).exits.tolist() == [0] * 5


@torch.no_grad()
def test_max_fraction_orders_a_callables_samples_by_softmax_or_by_its_own_confidence():
    x = random_tensor(10, 3, 4, 4)

    def stay(logits, e, state):
        return torch.zeros(len(logits), dtype=torch.bool)

    def stay_by_index(logits, e, state):
        return Verdict(stay(logits, e, state), -torch.arange(len(logits)).float())

    model = pick_model(stay, exits=2, max_fraction=0.3)
    sure = model.heads[0](model.stages[0](x)).softmax(1).max(1).values
    assert set((model(x).exits == 1).nonzero()[:, 0].tolist()) == set(sure.argsort()[:3].tolist())
    model.criterion = stay_by_index
    assert (model(x).exits == 1).nonzero()[:, 0].tolist() == [7, 8, 9]


class PassesFeatures(nn.Module):
    """IMTA: head e reads the features of head e - 1."""

    def forward(self, state):
        x, before = state
        features = x.flatten(1)[:, :CLASSES] + (0 if before is None else before)
        return features * 2, (x, features)


class OnFirst(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, state):
        x, before = state if isinstance(state, tuple) else (state, None)
        return self.stage(x), before


@torch.no_grad()
def test_a_head_hands_features_to_the_next_one():
    stages = [OnFirst(Scale(3)) for _ in range(3)]
    model = EarlyExit(stages, [PassesFeatures() for _ in range(3)], MaxSoftmax([0.6, 0.4])).eval()
    x = random_tensor(30, 3, 4, 4)
    dense, state = [], x
    for stage, head in zip(stages, model.heads, strict=True):
        logits, state = head(stage(state))
        dense.append(logits)
    expected = first_exit([z.softmax(1).max(1).values >= (0.6, 0.4)[e] for e, z in enumerate(dense[:-1])])
    out = model(x)
    assert len(set(expected.tolist())) == 3
    assert torch.equal(out.exits, expected) and torch.equal(out.logits, choose(dense, expected))


def test_state_dict_keys_and_checkpoints_keep_thresholds():
    model = pick_model(MaxSoftmax([0.5, 0.6], 1.5))
    keys = {f"stages.{e}.{name}" for e in range(3) for name in ("weight", "bias")}
    assert set(model.state_dict()) == keys | {"criterion.threshold", "criterion.temperature"}
    other = pick_model(MaxSoftmax(0.9))
    other.load_state_dict(model.state_dict())
    assert other.criterion.threshold.tolist() == [0.5, 0.6] and float(other.criterion.temperature) == 1.5
    plain = pick_model(lambda z, e, s: z[:, 0] > 0)
    assert set(plain.state_dict()) == keys
    model.criterion.set_threshold(torch.tensor([0.1, 0.2]))
    model.criterion.set_temperature([2.0, 3.0])
    assert model.state_dict()["criterion.threshold"].tolist() == pytest.approx([0.1, 0.2])


def test_bad_arguments_are_named():
    stages, heads = [Scale(3), Scale(3)], [Pick(), Pick()]
    with pytest.raises(ValueError, match=r"^heads: expected one for each of 2 stages, got 1"):
        EarlyExit(stages, heads[:1], MaxSoftmax(0.5))
    with pytest.raises(ValueError, match=r"^stages: expected one module or more, got none"):
        EarlyExit([], [], MaxSoftmax(0.5))
    with pytest.raises(ValueError, match=r"^models: expected one module or more"):
        Cascade([], MaxSoftmax(0.5))
    with pytest.raises(TypeError, match=r"^criterion: expected a Criterion or a callable, got float"):
        EarlyExit(stages, heads, 0.5)
    for bad in (1.5, -0.1, math.nan, [], [2.0]):
        with pytest.raises(ValueError, match=r"^max_fraction: expected a number in \[0, 1\]"):
            EarlyExit(stages, heads, MaxSoftmax(0.5), max_fraction=bad)
    with pytest.raises(ValueError, match=r"^threshold: expected a number, or one for each of 4 exits"):
        pick_model(MaxSoftmax([0.5, 0.5]), exits=4)
    with pytest.raises(ValueError, match=r"^heads: expected one for each of 4 exits but the last, got 1"):
        pick_model(LearnedExit([nn.Linear(2, 1)]), exits=4)
    with pytest.raises(ValueError, match=r"^confidence: expected all_exits with it"):
        pick_model(MaxSoftmax(0.5))(random_tensor(2, 3, 4, 4), all_exits=False, confidence=True)


def test_bad_verdicts_and_states_are_named():
    x = random_tensor(4, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^criterion: expected leave \[4\] at exit 0, got shape \(3,\)"):
        pick_model(lambda z, e, s: torch.ones(3, dtype=torch.bool))(x)
    with pytest.raises(
        TypeError, match=r"^criterion: expected leave as a bool tensor \[4\], got torch.float32"
    ):
        pick_model(lambda z, e, s: torch.ones(4))(x)
    with pytest.raises(TypeError, match=r"^criterion: expected leave as a bool tensor \[4\], got bool"):
        pick_model(lambda z, e, s: True)(x)
    with pytest.raises(TypeError, match=r"^heads\[0\]: expected logits \[n, ...\], got dict"):
        EarlyExit([Scale(3)], [Calls(lambda x: {})], MaxSoftmax(0.5))(x)
    named = EarlyExit(
        [nn.Identity()] * 2, [First()] * 2, lambda z, e, s: z[:, 0] > 0, shared={1: False}
    ).eval()
    with pytest.raises(
        ValueError,
        match=r"^state\[1\]: expected \[4, ...\], as shared=\{1: False\} says, got shape \(\)",
    ):
        named((random_tensor(4, 3), torch.tensor(1.0)))


def test_stages_of_convolutions_run_on_rows(monkeypatch):
    """Without gradients; the logits are those of the stages themselves, whose hooks, modes and replacements hold."""
    stages = [
        nn.Sequential(
            nn.Conv2d(c, 32, 3, stride, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)
        )
        for c, stride in ((3, 1), (32, 2), (32, 1))
    ]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)) for _ in stages]
    taken, run = [], traced.run_rows
    monkeypatch.setattr(traced, "run_rows", lambda *a: taken.append(a[1][0].shape[0]) or run(*a))

    def leaves(logits, exit, state):
        return torch.arange(len(logits)) % 2 == 0

    model = EarlyExit(stages, heads, leaves).eval()
    x = random_tensor(9, 3, 12, 14)
    expected = model(x)  # with gradients: the stages are called
    assert taken == []
    with torch.no_grad():
        logits, exits = model(x)
        assert taken == ([9, 4, 2] if backends.has_binary() else [])
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget(logits, exact.logits, expected.logits, "logits")
        assert exits.equal(expected.exits)
        model.stages[1][3] = nn.Conv2d(32, 32, 3, padding=1)
        assert not model(x).logits.equal(logits)
        called = []
        model.stages[0].register_forward_hook(lambda *_: called.append(1))
        del taken[:]
        model(x)
        assert called == [1] and 9 not in taken
    assert copy.deepcopy(model)(x).exits.equal(exits)
