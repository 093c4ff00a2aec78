"""Halting of samples, against a loop over the samples in Python and against the dense-masked form."""

import pytest
import torch
from halting_cases import (
    STEPS,
    WIDTH,
    Scripted,
    assert_same,
    by_script,
    cell_and_halt,
    gradients,
    reference,
    scripted,
    scripted_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn.samples.halting import Halting
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_values_and_gradients_are_those_of_a_loop_over_samples(dense, max_steps):
    step, halt = cell_and_halt()
    x = random_tensor(9, WIDTH, dtype=torch.float64).requires_grad_()
    out = Halting(step, halt, max_steps, dense=dense)(x)
    expected = reference(step, halt, x, max_steps)
    assert_same(out, expected)
    inputs = [x, *step.parameters(), *(halt.parameters() if max_steps > 1 else ())]
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    if max_steps == 5:
        assert len(out.steps.unique()) >= 3  # else nothing was compacted twice


@pytest.mark.parametrize("dense", [False, True])
def test_the_last_state_is_the_output(dense):
    step, halt = cell_and_halt()
    x = random_tensor(9, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        out = Halting(step, halt, STEPS, weighted=False, dense=dense)(x)
        assert_same(out, reference(step, halt, x, weighted=False))


@pytest.mark.parametrize("dense", [False, True])
def test_a_hard_gate_has_the_gradient_of_a_gate_on_the_next_step(dense):
    """With a leaf for each gate: ``s + g (step(s) - s)``, g = 1 where one more step was taken."""
    step, _ = cell_and_halt()
    x = random_tensor(3, WIDTH, dtype=torch.float64)
    hard = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64).requires_grad_()

    def scripted(state, n):
        return step(state[0], n), state[1], state[1][:, min(n, 4) - 1]

    layer = Halting(scripted, lambda state: state[2], STEPS, weighted=False, dense=dense)
    out, ponder, steps = layer((x, hard, hard[:, 0]))
    assert steps.tolist() == [3, 1, 5]
    (ours,) = torch.autograd.grad(out[0].square().sum(), hard, retain_graph=True)

    gates = torch.ones(3, STEPS, dtype=torch.float64).requires_grad_()
    states = []
    for i, s in enumerate(x.split(1)):
        s = step(s, 1)
        for n in range(2, int(steps[i]) + 1):
            s = s + gates[i, n - 2] * (step(s, n) - s)
        states.append(s)
    expected = torch.cat(states)
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12)
    (theirs,) = torch.autograd.grad(expected.square().sum(), gates)
    torch.testing.assert_close(ours, -theirs[:, :4], rtol=1e-11, atol=1e-12)
    assert (ours != 0).sum() == 2 + 0 + 4
    assert ponder.tolist() == [4, 2, 6]  # n + R, R = 1
    (dponder,) = torch.autograd.grad(ponder.sum(), hard)
    assert dponder.tolist() == [[-1, -1, 0, 0], [0, 0, 0, 0], [-1, -1, -1, -1]]


@pytest.mark.parametrize("dense", [False, True])
def test_epsilon_is_what_may_be_missing(dense):
    scores = torch.tensor([[0.6, 0.395, 0.1, 0.1, 0.1], [0.995, 0.1, 0.1, 0.1, 0.1], [0.9] + [0.0] * 4])
    for epsilon, steps in ((0.01, [2, 1, 5]), (0.0, [3, 2, 5]), (0.2, [2, 1, 1])):
        assert by_script(dense=dense, epsilon=epsilon)(scripted(scores)).steps.tolist() == steps


@pytest.mark.parametrize("dense", [False, True])
def test_sums_are_wide(dense):
    """Forty terms in bfloat16 lose no more than the rounding of the result."""
    x = random_tensor(4, WIDTH, dtype=torch.bfloat16)
    layer = Halting(
        lambda s, n: s + 0.125, lambda s: torch.full((len(s),), 0.02, dtype=s.dtype), 40, dense=dense
    )
    score, states = float(torch.tensor(0.02, dtype=torch.bfloat16)), [x]
    for _ in range(40):
        states.append(states[-1] + 0.125)
    exact = sum(score * s.double() for s in states[1:40]) + (1 - 39 * score) * states[40].double()
    output = layer(x).output
    assert output.dtype == torch.bfloat16
    assert ((output.double() - exact).abs() <= exact.abs() * 2**-8).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=STEPS, max_size=STEPS), max_size=7
    ),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3, 0.8, 1.0]),
)
def test_any_pattern_of_halting(rows, weighted, max_fraction):
    """Weights add up to 1, and the forms agree in everything, whoever halts when."""
    scores = torch.tensor(rows, dtype=torch.float64).reshape(-1, STEPS).requires_grad_()
    state = scripted(scores)
    results, derivatives = [], []
    for dense in (False, True):
        layer = by_script(weighted=weighted, dense=dense, max_fraction=max_fraction)
        out = layer(state)
        results.append(out)
        loss = out.output.value.square().sum() + out.ponder.square().sum()
        derivatives.append(torch.autograd.grad(loss, scores, allow_unused=True)[0])
    (ours, theirs) = results
    assert torch.equal(ours.steps, theirs.steps)
    torch.testing.assert_close(ours.ponder, theirs.ponder, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.output.value, theirs.output.value, rtol=1e-13, atol=1e-15)
    assert torch.equal(ours.output.age, ours.steps.long()) and torch.equal(theirs.output.age, ours.output.age)
    torch.testing.assert_close(derivatives[0], derivatives[1], rtol=1e-12, atol=1e-13)
    if max_fraction in (None, 1.0):
        assert_same(
            (ours.output.value, ours.ponder, ours.steps),
            script_reference(state, weighted) if len(scores) else theirs._replace(output=theirs.output.value),
        )
    # a constant that goes through the sum comes out as it was: the weights add up to 1
    torch.testing.assert_close(ours.output.scores, scores, rtol=1e-13, atol=1e-15)


def script_reference(state: Scripted, weighted: bool):
    outputs, ponders, counts = [], [], []
    for value, scores in zip(state.value.split(1), state.scores, strict=True):
        one = iter(scores)
        result = reference(
            lambda s, n: torch.sin(s * 1.3 + n), lambda _, one=one: next(one), value, weighted=weighted
        )
        for results, part in zip((outputs, ponders, counts), result, strict=True):
            results.append(part)
    return torch.cat(outputs), torch.cat(ponders), torch.cat(counts)


@pytest.mark.parametrize("dense", [False, True])
def test_ponder_has_a_gradient_through_the_remainder_only(dense):
    scores = torch.tensor([[0.3, 0.3, 0.9, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5, 0.5]]).requires_grad_()
    ponder = by_script(dense=dense)(scripted(scores)).ponder
    torch.testing.assert_close(ponder, torch.tensor([3 + 0.4, 1 + 1.0]))
    (dscores,) = torch.autograd.grad(ponder.sum(), scores)
    assert dscores.tolist() == [[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_only_what_has_not_halted_is_computed():
    step, halt = cell_and_halt()
    x = random_tensor(12, WIDTH, dtype=torch.float64)
    steps = Halting(step, halt, STEPS)(x).steps
    assert step.sizes == [int((steps >= n).sum()) for n in range(1, int(steps.max()) + 1)]
    step.sizes.clear()
    Halting(step, halt, STEPS, dense=True)(x)
    assert step.sizes == [12] * STEPS


@pytest.mark.parametrize("dense", [False, True])
def test_the_cap_holds_for_any_scores(dense):
    """None wants to halt: those furthest from it go on, of equals the first ones."""
    scores = torch.zeros(10, STEPS)
    scores[:, 0] = torch.tensor([0.1, 0.5, 0.2, 0.2, 0.2, 0.3, 0.0, 0.4, 0.2, 0.6])
    sizes = []

    def step(state, n):
        sizes.append(len(state.value))
        return scripted_step(state, n)

    layer = Halting(step, lambda state: state.score, STEPS, max_fraction=0.49, dense=dense)
    out = layer(scripted(scores))
    assert out.steps.tolist() == [5, 1, 5, 5, 1, 1, 5, 1, 1, 1]
    assert sizes == ([10] * 5 if dense else [10, 4, 4, 4, 4])
    assert out.ponder.tolist() == pytest.approx([5.9, 2, 5.8, 5.8, 2, 2, 6, 2, 2, 2])
    layer.max_fraction = 0.0
    assert layer(scripted(scores)).steps.tolist() == [1] * 10
    layer.max_fraction = 1.0
    assert layer(scripted(scores)).steps.tolist() == [5] * 10


class ConvStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, n: int) -> Tensor:
        return x + torch.relu(self.conv(x)) * 0.3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_in_both_formats_and_dtypes(memory_format, dtype):
    step, x = ConvStep().to(dtype), random_tensor(8, 4, 5, 5, dtype=dtype).to(memory_format=memory_format)
    scores = torch.tensor([[0.3, 0.3, 0.9], [1.0, 0, 0], [0.2, 0.1, 0.1], [0.4, 0.7, 0.0]] * 2)

    def run(layer, x):
        state = (x, scores, scores[:, 0])
        return Halting(lambda s, n: (layer(s[0], n), s[1], s[1][:, n - 1]), lambda s: s[2], 3)(state)

    with torch.no_grad():
        out = run(step, x)
        twin = ConvStep().double()
        twin.load_state_dict({key: value.double() for key, value in step.state_dict().items()})
        exact = run(twin, x.double())
        # the masked form in the same dtype, as it is usually written
        running, total, masked, s = torch.ones(8), torch.zeros(8), torch.zeros_like(x), x
        for n in range(1, 4):
            s = step(s, n)
            halts = (total + scores[:, n - 1] >= 0.99) | (n == 3)
            weight = torch.where(halts, 1 - total, scores[:, n - 1]) * running
            masked = masked + weight.to(dtype).view(-1, 1, 1, 1) * s
            total, running = total + scores[:, n - 1], running * ~halts
    assert out.output[0].is_contiguous(memory_format=memory_format)
    assert out.output[0].dtype == dtype and out.ponder.dtype == torch.float32
    assert out.steps.tolist() == [3, 1, 3, 2] * 2
    assert_within_budget(out.output[0], exact.output[0], masked)
