"""Halting at its limits: nothing to do, all or nobody halts, NaN, BatchNorm, autocast, compile, wrong input."""

from typing import NamedTuple

import pytest
import torch
from halting_cases import WIDTH, Attending, Cell, by_script, scripted
from torch import Tensor, nn

from dynops.nn.samples.halting import Halting
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dense", [False, True])
def test_empty_positions(dense):
    for shape in ((0, 4, WIDTH), (3, 0, WIDTH)):
        for mixes, step in ((False, Cell()), (True, Attending())):
            layer = Halting(
                step, lambda s: s.mean(1).sigmoid(), 3, level="position", mixes=mixes, dense=dense
            )
            out = layer(torch.zeros(shape))
            assert out.output.shape == shape and out.ponder.shape == out.steps.shape == shape[:2]


@pytest.mark.parametrize("dense", [False, True])
def test_a_nan_score_counts_as_zero(dense):
    nan = float("nan")
    scores = torch.tensor([[nan, 0.5, nan, 0.6, 0.0], [0.5, 0.5, nan, nan, nan]])
    out = by_script(dense=dense)(scripted(scores))
    assert out.steps.tolist() == [4, 2] and out.ponder.tolist() == [4.5, 2.5]
    assert out.output.value.isfinite().all()


def test_batchnorm_in_training_sees_what_runs_and_with_dense_everything():
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3, momentum=1.0)
    scores = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    x = random_tensor(4, 3, 5, 5)

    def step(state, n):
        return norm(state[0]), state[1], state[1][:, n - 1]

    for dense, rows in ((False, slice(2, 3)), (True, slice(0, 4))):
        Halting(step, lambda s: s[2], 2, dense=dense)((x, scores, scores[:, 0]))
        first = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True)
        torch.testing.assert_close(norm.running_mean, first[rows].mean((0, 2, 3)), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(norm.running_var, first[rows].transpose(0, 1).flatten(1).var(1))


def test_a_decision_of_a_gate_is_a_score():
    class Decision(NamedTuple):
        mask: Tensor
        score: Tensor

    x = random_tensor(3, WIDTH)
    decide = lambda s: Decision(torch.ones(len(s)), torch.full((len(s), 1), 0.5))  # noqa: E731
    assert Halting(lambda s, n: s, decide, 4)(x).steps.tolist() == [2, 2, 2]
    assert Halting(lambda s, n: s, decide, 4, weighted=False)(x).steps.tolist() == [1, 1, 1]


def test_wrong_arguments():
    step, halt = lambda s, n: s, lambda s: s.mean(1)
    for wrong, error, match in (
        ({"max_steps": 0}, ValueError, "max_steps: expected an int >= 1, got 0"),
        ({"epsilon": 1.0}, ValueError, "epsilon"),
        ({"max_fraction": 1.5}, ValueError, "max_fraction"),
        ({"level": "token"}, ValueError, "level: expected one of"),
        ({"mixes": True}, ValueError, "mixes: expected False"),
        ({"step": 3}, TypeError, "step: expected a module or a function, got int"),
        ({"halt": None}, TypeError, "halt: expected a module or a function, got NoneType"),
    ):
        with pytest.raises(error, match=match):
            Halting(**({"step": step, "halt": halt, "max_steps": 3} | wrong))


@pytest.mark.parametrize("dense", [False, True])
def test_wrong_inputs_and_results(dense):
    x = random_tensor(4, WIDTH)

    def layer(step=lambda s, n: s, halt=lambda s: s.mean(1), **options):
        return Halting(step, halt, 3, dense=dense, **options)

    with pytest.raises(TypeError, match="state: expected a tensor"):
        layer()(3)
    with pytest.raises(ValueError, match=r"state: expected \[4, ...\]"):
        layer()((x, x[:3]))
    with pytest.raises(ValueError, match=r"state: expected a tensor \[B, T, C\]"):
        layer(level="position")(x)
    with pytest.raises(ValueError, match=r"step: expected it to return \[4, ...\]"):
        layer(step=lambda s, n: s[:3])(x)
    with pytest.raises(ValueError, match=r"halt: expected it to return \[4\], got shape \(4, 6\)"):
        layer(halt=lambda s: s)(x)
    with pytest.raises(
        TypeError, match=r"halt: expected it to return a floating tensor \[4\], got torch.bool"
    ):
        layer(halt=lambda s: s.mean(1) > 0)(x)
