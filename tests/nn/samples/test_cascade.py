"""Cascade against every model on every sample."""

import pytest
import torch
from exit_cases import CLASSES, choose, conv_model, first_exit, halve
from torch import nn

from dynops.nn.samples.criteria import (
    Entropy,
    IDKClass,
    LearnedExit,
    Margin,
    MaxSoftmax,
)
from dynops.nn.samples.exits import Cascade

pytestmark = pytest.mark.usefixtures("poisoned")


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
