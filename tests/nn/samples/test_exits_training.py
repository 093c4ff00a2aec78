"""EarlyExit in training: gradients, visits, norms, gradient equilibrium."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exit_cases import CLASSES, EXITS, First, conv_model, every_exit, first_exit, halve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynops import SamplePlan
from dynops.nn.samples.criteria import (
    LearnedExit,
    MaxSoftmax,
)
from dynops.nn.samples.exits import ExitOutput

pytestmark = pytest.mark.usefixtures("poisoned")


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
