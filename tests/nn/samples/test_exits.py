"""EarlyExit and Cascade, against every exit computed for every sample and the choice made afterwards."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops import SamplePlan, backends
from dynops.nn.samples.criteria import (
    Criterion,
    Entropy,
    IDKClass,
    LearnedExit,
    Margin,
    MaxSoftmax,
    Patience,
    Verdict,
)
from dynops.nn.samples.exits import Cascade, EarlyExit, ExitOutput, at_most
from dynops.stack import sample_stack
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

CLASSES, EXITS = 5, 3


class Scale(nn.Module):
    """A product and a sum for each value: the same bits in any batch."""

    def __init__(self, channels: int, seen: list | None = None):
        super().__init__()
        self.weight = nn.Parameter(random_tensor(channels, 1, 1))
        self.bias = nn.Parameter(random_tensor(channels, 1, 1))
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(x)
        return x * self.weight + self.bias


class Pick(nn.Module):
    """Logits: the first values of a sample, as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES] * 4


def pick_model(criterion, seen: list | None = None, exits: int = EXITS, **options) -> EarlyExit:
    return EarlyExit(
        [Scale(3, seen) for _ in range(exits)], [Pick() for _ in range(exits)], criterion, **options
    ).eval()


class Replay(nn.Module):
    """The logits of exit e, from a state ``[n, E, ...]`` that holds those of all exits."""

    def __init__(self, e: int):
        super().__init__()
        self.e = e

    def forward(self, state: Tensor) -> Tensor:
        return state[:, self.e]


def replay_model(criterion, exits: int, **options) -> EarlyExit:
    return EarlyExit([nn.Identity()] * exits, [Replay(e) for e in range(exits)], criterion, **options).eval()


def conv_model(criterion, exits: int = EXITS, norm: bool = False, **options) -> EarlyExit:
    torch.manual_seed(1)
    stages, heads = [], []
    for e in range(exits):
        parts = [nn.Conv2d(3 if e == 0 else 6, 6, 3, padding=1)] + [nn.BatchNorm2d(6)] * norm + [nn.ReLU()]
        stages.append(nn.Sequential(*parts))
        heads.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)))
    return EarlyExit(stages, heads, criterion, **options).double().eval()


@torch.no_grad()
def halve(model, x):
    """Thresholds at which half of the samples would leave at each exit, halfway between two confidences."""
    confidence = torch.stack(model(x, confidence=True).confidence)
    model.criterion.set_threshold(model.criterion.to_threshold(confidence.double().quantile(0.5, dim=1)))
    return model


def every_exit(model: EarlyExit, x) -> list[Tensor]:
    """All logits, from the modules alone."""
    logits = []
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x)
        logits.append(head(x))
    return logits


def choose(logits: list[Tensor], exits: Tensor) -> Tensor:
    return torch.stack(logits)[exits, torch.arange(len(exits))]


def first_exit(leaves: list[Tensor]) -> Tensor:
    """int64 ``[N]``: the first exit at which a sample leaves. ``leaves``: at all exits but the last."""
    asked = torch.stack([*leaves, torch.ones_like(leaves[0])])
    return asked.int().argmax(0)


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


# ---------------------------------------------------------------------------------- the dense form


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


class TreeStage(nn.Module):
    def __init__(self, e: int):
        super().__init__()
        self.e = e

    def forward(self, state):
        return tree_stage(state, self.e)


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
        [TreeStage(e) for e in range(exits)],
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


# ---------------------------------------------------------------------------------------- survive


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


# ----------------------------------------------------------------------------------- max_fraction


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


# ------------------------------------------------------------------------------ memory of criteria


def patience_by_hand(logits: list[Tensor], patience: list[int], tolerance: float | None) -> list[int]:
    exits = []
    for i in range(len(logits[0])):
        count, at = 0, len(logits) - 1
        for e in range(len(logits) - 1):
            if e:
                now, before = logits[e][i], logits[e - 1][i]
                same = (
                    (now - before).abs().max() < tolerance if tolerance else now.argmax() == before.argmax()
                )
                count = count + 1 if same else 0
            if count >= patience[e]:
                at = e
                break
        exits.append(at)
    return exits


@torch.no_grad()
@pytest.mark.parametrize("tolerance", [None, 1.5])
@pytest.mark.parametrize("patience", [1, 2, 3, [9, 1, 3, 2, 1]])
def test_patience_counts_in_compacted_batches(tolerance, patience):
    model = replay_model(Patience(patience, tolerance), 6)
    logits = list(random_tensor(6, 60, 2))
    each = patience if isinstance(patience, list) else [patience] * 5
    out = model(torch.stack(logits, 1))
    assert out.exits.tolist() == patience_by_hand(logits, each, tolerance)
    assert len(set(out.exits.tolist())) >= 2
    assert torch.equal(out.logits, choose(logits, out.exits))


@torch.no_grad()
def test_patience_over_positions_and_scalars():
    z = random_tensor(4, CLASSES, 3, 3)
    other = z.clone()
    other[2, :, 1, 1] = z[2, :, 1, 1].flip(0) * torch.arange(CLASSES)
    assert other[2, :, 1, 1].argmax() != z[2, :, 1, 1].argmax()
    first = Patience(1)(z, 0)
    assert not first.leave.any()
    assert Patience(1)(other, 1, None, first.memory).leave.tolist() == [True, True, False, True]
    values = Patience(1, 0.1)
    first = values(torch.tensor([1.0, 2.0, math.nan]), 0)
    assert values(torch.tensor([1.05, 2.2, math.nan]), 1, None, first.memory).leave.tolist() == [
        True,
        False,
        False,
    ]


class Carried(Criterion):
    """Leaves where the sum of all logits so far is large: remembers a tree."""

    def measure(self, logits, exit, state=None, memory=None):
        total = logits[:, 0] + (memory["sum"][0] if memory else 0)
        return total, {"sum": [total], "exit": exit}


@torch.no_grad()
def test_a_criterions_memory_is_a_tree_that_shrinks_with_the_batch():
    model = replay_model(Carried(1.0), 4)
    x = random_tensor(50, 4, CLASSES)
    sums = x[:, :-1, 0].cumsum(1).T
    expected = first_exit(list(sums >= 1.0))
    assert len(set(expected.tolist())) >= 3
    assert torch.equal(model(x).exits, expected)


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


# ------------------------------------------------------------------------------------------ training


def test_training_returns_every_exit_and_gradients_reach_all():
    model = conv_model(MaxSoftmax(0.0)).train()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    assert isinstance(logits, list) and len(logits) == EXITS
    reference = every_exit(model, x)
    assert all(torch.equal(a, b) for a, b in zip(logits, reference, strict=True))
    sum(F.cross_entropy(z, torch.arange(6) % CLASSES) for z in logits).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert isinstance(model.eval()(x), ExitOutput) and isinstance(model(x, all_exits=True), list)


@settings(max_examples=6, deadline=None)
@given(at=st.lists(st.integers(0, EXITS - 1), min_size=1, max_size=5))
def test_gradients_through_exits_in_training_are_the_masked_dense_forms(at):
    at = torch.tensor(at)
    model = conv_model(lambda logits, e, state: state[1] <= e)
    for e in range(EXITS):
        model.stages[e] = OnPair(model.stages[e])
        model.heads[e] = nn.Sequential(First(), model.heads[e])
    twin = copy.deepcopy(model)
    x = torch.randn(len(at), 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(len(at), CLASSES, dtype=torch.float64)
    out = model.train()((x, at), all_exits=False)
    (out.logits * weight).sum().backward()
    masked = sum((z * (at == e)[:, None] * weight).sum() for e, z in enumerate(every_exit(twin, (y, at))))
    masked.backward()
    assert torch.equal(out.exits, at)
    pairs = [(x, y), *zip(model.parameters(), twin.parameters(), strict=True)]
    for a, b in pairs:
        grad = torch.zeros_like(b) if a.grad is None else a.grad  # a stage that did not run has none
        assert (grad - b.grad).norm() <= 1e-12 * (1 + b.grad.norm())


class OnPair(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, state):
        return self.stage(state[0]), state[1]


class First(nn.Module):
    def forward(self, state):
        return state[0]


def test_visits_give_elfs_loss():
    """A sample pays at every exit that it passes."""
    x, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % CLASSES
    model = halve(conv_model(MaxSoftmax(0)), x).train()
    visits = list(model.visits(x))
    loss = sum(F.cross_entropy(v.logits, labels[v.index], reduction="sum") for v in visits) / 8
    exits = model(x, all_exits=False).exits
    assert len(set(exits.tolist())) >= 2
    dense = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in every_exit(model, x)])
    passed = torch.arange(EXITS)[:, None] <= exits
    expected = (dense * passed).sum() / 8
    assert (loss - expected).abs() <= 1e-12 * expected
    assert [v.exit for v in visits] == list(range(len(visits)))
    for v in visits:
        both = torch.cat([v.leaving().index, v.staying.index]).sort().values
        assert both.tolist() == list(range(len(v.index))) and isinstance(v.staying, SamplePlan)


def test_batchnorm_in_training_sees_the_remaining_samples():
    model = conv_model(lambda z, e, s: torch.arange(len(z)) > 0, exits=2, norm=True).train()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    out = model(x, all_exits=False)
    assert out.exits.tolist() == [1, 0, 0, 0, 0] and out.logits.isfinite().all()
    norm, conv = model.stages[1][1], model.stages[1][0]
    with torch.no_grad():
        first = model.stages[0](x)[:1]
        assert torch.allclose(norm.running_mean, 0.1 * conv(first).mean((0, 2, 3)), rtol=1e-9)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(x[:, :, :1, :1], all_exits=False)


def test_a_learned_exit_gets_gradients_through_its_confidence():
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)) for _ in range(2)]
    model = conv_model(LearnedExit(heads, 0.5)).train()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    scores = model(x, confidence=True)
    assert len(scores.logits) == 3 and [tuple(c.shape) for c in scores.confidence] == [(5,), (5,)]
    state = model.stages[0](x)
    assert torch.allclose(scores.confidence[0], heads[0](state)[:, 0].sigmoid(), rtol=1e-12)
    sum(c.sum() for c in scores.confidence).backward()
    assert all(p.grad is not None for head in heads for p in head.parameters())
    model.eval()
    with torch.no_grad():
        out = model(x)
        asked = model(x, confidence=True).confidence
    assert torch.equal(out.exits, first_exit([c >= 0.5 for c in asked]))


def test_confidences_of_every_exit_are_those_of_the_run():
    for criterion in (Patience(2), MaxSoftmax(0.5, [2.0, 1.0, 1.0]), Carried(1.0)):
        model = replay_model(criterion, 4)
        x = random_tensor(20, 4, 3)
        with torch.no_grad():
            leaves = [c >= criterion.threshold for c in model(x, confidence=True).confidence]
            exits = model(x).exits
            assert torch.equal(exits, first_exit(leaves)) and len(set(exits.tolist())) >= 2


def test_gradient_equilibrium():
    """Each stage gets the mean, not the sum, of the gradients of the heads behind it (IMTA)."""
    model = conv_model(MaxSoftmax(0.5), gradient_equilibrium=True).train()
    twin = conv_model(MaxSoftmax(0.5)).train()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(6) % CLASSES
    losses = [F.cross_entropy(z, labels) for z in twin(x)]
    parts = [
        torch.autograd.grad(loss, list(twin.stages.parameters()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    names = [name for name, _ in twin.stages.named_parameters()]
    expected = {}
    for i, name in enumerate(names):
        behind = EXITS - int(name.split(".")[0])
        expected[name] = sum(part[i] for part in parts if part[i] is not None) / behind
    logits = model(x)
    assert all(torch.equal(a, b) for a, b in zip(logits, twin(x), strict=True))
    sum(F.cross_entropy(z, labels) for z in logits).backward()
    for name, p in model.stages.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-12 * expected[name].norm()
    heads = zip(model.heads.parameters(), twin.heads.parameters(), strict=True)
    sum(losses).backward()
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-12) for a, b in heads)


def test_gradient_equilibrium_where_heads_hand_on_the_state():
    """What passes through the heads is as if it had passed beside them."""

    class Through(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x), x

    plain = conv_model(MaxSoftmax(0.5), gradient_equilibrium=True)
    through = conv_model(MaxSoftmax(0.5), gradient_equilibrium=True)
    through.heads = nn.ModuleList([Through(head) for head in through.heads])
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for model in (plain, through):
        sum(z.square().sum() for z in model.train()(x)).backward()
    for a, b in zip(plain.stages.parameters(), through.stages.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-12 * a.grad.norm()


# ------------------------------------------------------------------------------------------ cascade


def cascade_of(criterion, models: int = 3, **options) -> Cascade:
    torch.manual_seed(3)
    made = [nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)) for _ in range(models)]
    return Cascade(made, criterion, **options).double().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "criterion", [Margin(0.15), MaxSoftmax([0.35, 0.3]), IDKClass(-1, 0.8), Entropy(1.5)], ids=repr
)
def test_cascade_is_the_dense_form(criterion):
    model = cascade_of(criterion)
    x = torch.randn(40, 3, 4, 4, dtype=torch.float64)
    logits = [m(x) for m in model.models]
    expected = first_exit([criterion(z, e).leave for e, z in enumerate(logits[:-1])])
    out = model(x)
    assert len(set(expected.tolist())) == 3
    assert torch.equal(out.exits, expected)
    assert (out.logits - choose(logits, expected)).norm() <= 1e-12 * out.logits.norm()
    assert all(torch.equal(a, b) for a, b in zip(model(x, all_exits=True), logits, strict=True))


@torch.no_grad()
def test_cascade_of_trees_with_a_learned_router_and_a_cap():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.linear(x["values"]) + x["shift"]

    router = LearnedExit([nn.Linear(CLASSES, 1) for _ in range(2)], 0.5, reads="logits")
    model = Cascade([Reads() for _ in range(3)], router, max_fraction=0.5).eval()
    x = {"values": torch.randn(21, 4), "shift": 0.5, "ids": torch.arange(21)}
    scores = model(x, confidence=True)
    out = model(x)
    assert torch.allclose(out.logits, choose(scores.logits, out.exits), rtol=1e-5)
    stays = scores.confidence[0] < 0.5
    assert int((out.exits > 0).sum()) == min(10, int(stays.sum())) and 0 < stays.sum() < 21


@torch.no_grad()
def test_a_cascade_of_early_exits():
    """Bolukbasi et al.: exits inside a network, then the next network."""
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    inner = halve(conv_model(MaxSoftmax(0)), x)
    model = Cascade(
        [inner, nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()], MaxSoftmax(0)
    ).eval()
    first, second = inner(x).logits, model.models[1](x)
    sure = first.softmax(1).max(1).values
    model.criterion.set_threshold(sure.quantile(0.5))
    settled = sure >= model.criterion.threshold
    assert len(set(inner(x).exits.tolist())) >= 2
    out = model(x)
    assert torch.equal(out.exits, (~settled).long())
    assert torch.allclose(out.logits, torch.where(settled[:, None], first, second), rtol=1e-10)


# --------------------------------------------------------------------------------- module contract


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


# -------------------------------------------------------------------------------------------- errors


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
        EarlyExit([Scale(3)], [Dict()], MaxSoftmax(0.5))(x)
    named = EarlyExit(
        [nn.Identity()] * 2, [First()] * 2, lambda z, e, s: z[:, 0] > 0, shared={1: False}
    ).eval()
    with pytest.raises(
        ValueError,
        match=r"^state\[1\]: expected \[4, ...\], as shared=\{1: False\} says, got shape \(\)",
    ):
        named((random_tensor(4, 3), torch.tensor(1.0)))


class Dict(nn.Module):
    def forward(self, x):
        return {}


def test_stages_of_convolutions_run_on_rows(monkeypatch):
    """Without gradients; the logits are those of the stages themselves, whose hooks, modes and replacements hold."""
    stages = [
        nn.Sequential(
            nn.Conv2d(c, 32, 3, stride, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)
        )
        for c, stride in ((3, 1), (32, 2), (32, 1))
    ]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)) for _ in stages]
    taken, run = [], sample_stack.run_rows
    monkeypatch.setattr(sample_stack, "run_rows", lambda *a: taken.append(a[2].shape[0]) or run(*a))

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
