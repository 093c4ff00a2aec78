"""Halting of the positions of sequences, by themselves and under attention."""

import pytest
import torch
from halting_cases import EPSILON, STEPS, WIDTH, Attending, assert_same, cell_and_halt, gradients, reference
from torch import Tensor

from dynops.nn.samples.halting import Halting, pad_positions
from dynops.plans import SamplePlan
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dense", [False, True])
def test_positions_that_do_not_mix_are_samples(dense):
    step, halt = cell_and_halt()
    x = random_tensor(3, 4, WIDTH, dtype=torch.float64)
    out = Halting(step, halt, STEPS, level="position", dense=dense)(x)
    expected = reference(step, halt, x.flatten(0, 1))
    assert out.output.shape == x.shape and out.ponder.shape == out.steps.shape == (3, 4)
    assert_same((out.output.flatten(0, 1), out.ponder.flatten(), out.steps.flatten()), expected)


def mixed_reference(step: Attending, halt, hidden: Tensor):
    """Universal Transformer, position by position."""
    b, t = hidden.shape[:2]
    total, output = [[0.0] * t for _ in range(b)], [[0.0] * t for _ in range(b)]
    ponder, steps = [[None] * t for _ in range(b)], torch.zeros(b, t, dtype=torch.int32)
    for n in range(1, STEPS + 1):
        new = [[hidden[i, j] for j in range(t)] for i in range(b)]
        for i in range(b):
            for j in range(t):
                if ponder[i][j] is not None:
                    continue
                s = new[i][j] = step.rows(hidden[i, j : j + 1], hidden[i], n)[0]
                h = halt(s).reshape(())
                last = n == STEPS or bool(total[i][j] + h >= 1 - EPSILON)
                output[i][j] = output[i][j] + (1 - total[i][j] if last else h) * s
                if last:
                    ponder[i][j], steps[i, j] = n + 1 - total[i][j], n
                total[i][j] = total[i][j] + h
        hidden = torch.stack([torch.stack(row) for row in new])
    ponder = torch.stack(
        [torch.stack([torch.as_tensor(p, dtype=hidden.dtype) for p in row]) for row in ponder]
    )
    return torch.stack([torch.stack(row) for row in output]), ponder, steps


@pytest.mark.parametrize("dense", [False, True])
def test_attention_reads_the_last_state_of_halted_positions(dense):
    step, (_, halt) = Attending().double(), cell_and_halt()
    x = random_tensor(3, 5, WIDTH, dtype=torch.float64).requires_grad_()
    out = Halting(step, halt, STEPS, level="position", mixes=True, dense=dense)(x)
    expected = mixed_reference(step, halt, x)
    assert len(out.steps.unique()) > 2
    assert_same(out, expected)
    inputs = [x, *step.parameters(), *halt.parameters()]
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_padded_positions():
    plan = SamplePlan.from_mask(torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1]))
    rows = random_tensor(5, 2)
    padded, slots = pad_positions(rows, plan, (3, 3))
    assert padded.shape == (3, 3, 2) and torch.equal(padded.flatten(0, 1)[slots], rows)
    assert torch.equal(padded[0, :2], rows[:2]) and torch.equal(padded[2], rows[2:])
    assert padded[1].abs().sum() == 0 == padded[0, 2].abs().sum()
    none = SamplePlan.from_mask(torch.zeros(6))
    assert pad_positions(rows[:0], none, (3, 2))[0].shape == (3, 0, 2)
    with pytest.raises(ValueError, match="compact plan of 2 \\* 3"):
        pad_positions(rows, plan, (2, 3))
