"""Criteria that remember: patience, trees, and what a run has of their confidences."""

import math

import pytest
import torch
from exit_cases import (
    CLASSES,
    choose,
    first_exit,
    replay_model,
)
from torch import Tensor

from dynops.nn.samples.criteria import (
    Criterion,
    MaxSoftmax,
    Patience,
)
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


def test_confidences_of_every_exit_are_those_of_the_run():
    for criterion in (Patience(2), MaxSoftmax(0.5, [2.0, 1.0, 1.0]), Carried(1.0)):
        model = replay_model(criterion, 4)
        x = random_tensor(20, 4, 3)
        with torch.no_grad():
            leaves = [c >= criterion.threshold for c in model(x, confidence=True).confidence]
            exits = model(x).exits
            assert torch.equal(exits, first_exit(leaves)) and len(set(exits.tolist())) >= 2


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
