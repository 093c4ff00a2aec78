"""Halting of samples and positions, against a loop over the samples in Python and against the dense-masked form."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn.sample_halting import Halting, pad_positions
from dynops.ops import gather_samples
from dynops.plans import SamplePlan
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH, STEPS, EPSILON = 6, 5, 0.01


class Cell(nn.Module):
    """A step of its own for every n, on ``[K, C]``."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.sizes: list[int] = []

    def forward(self, state: Tensor, n: int) -> Tensor:
        self.sizes.append(len(state))
        return torch.tanh(self.linear(state) + 0.1 * n)


def cell_and_halt(dtype=torch.float64, spread: float = 4.0) -> tuple[Cell, nn.Sequential]:
    """With scores so spread that samples halt at different steps."""
    halt = nn.Sequential(nn.Linear(WIDTH, 1), nn.Sigmoid()).to(dtype)
    with torch.no_grad():
        halt[0].weight.copy_(random_tensor(1, WIDTH) * spread)
        halt[0].bias.fill_(-1.0)
    return Cell().to(dtype), halt


def reference(step, halt, state: Tensor, max_steps=STEPS, epsilon=EPSILON, weighted=True):
    """Graves' equations for one sample after the other."""
    outputs, ponders, counts = [], [], []
    for s in state.split(1):
        total, output = torch.zeros((), dtype=s.dtype), torch.zeros(())
        for n in range(1, max_steps + 1):
            s = step(s, n)
            h = halt(s).reshape(()) if n < max_steps else None
            last = h is None or bool(total + h >= 1 - epsilon)
            output = output + (1 - total if last else h) * s
            if last:
                break
            total = total + h
        outputs.append(output if weighted else s)
        ponders.append(n + 1 - total)
        counts.append(n)
    return torch.cat(outputs), torch.stack(ponders), torch.tensor(counts, dtype=torch.int32)


def gradients(out, inputs) -> list[Tensor]:
    """Of a sum in which every value of output and ponder has another factor."""
    output, ponder, _ = out
    factors = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    shares = torch.linspace(1.5, 0.5, ponder.numel(), dtype=ponder.dtype).view(ponder.shape)
    return torch.autograd.grad((factors * output).sum() + (shares * ponder).sum(), inputs)


def assert_same(actual, expected, rtol=1e-12) -> None:
    assert torch.equal(actual[2], expected[2]), (actual[2], expected[2])
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(actual[1], expected[1].view_as(actual[1]), rtol=rtol, atol=rtol)


# --------------------------------------------------------------------------------- the formula


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
    """With leaves for the gates of each sample: ``s + g (step(s) - s)``, g = 1 where one more step was taken."""
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


class Scripted(NamedTuple):
    """A state whose scores are given: ``score`` is that of the step which made it."""

    value: Tensor
    scores: Tensor  # [N, STEPS]
    score: Tensor
    age: Tensor  # int, the steps that a sample has seen


def scripted_step(state: Scripted, n: int) -> Scripted:
    value = torch.sin(state.value * 1.3 + n)
    return Scripted(value, state.scores, state.scores[:, n - 1], state.age + 1)


def scripted(scores: Tensor, value: Tensor | None = None) -> Scripted:
    value = random_tensor(len(scores), 2, 3, dtype=torch.float64) if value is None else value
    return Scripted(value, scores, scores[:, 0], torch.zeros(len(scores), dtype=torch.int64))


def by_script(**options) -> Halting:
    return Halting(scripted_step, lambda state: state.score, STEPS, **options)


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


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    """Finite differences of output and ponder, at scores whose sums are far from the threshold."""
    scores = torch.tensor(
        [[0.3, 0.3, 0.9, 0.1, 0.1], [0.9, 0.5, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.3]], dtype=torch.float64
    ).requires_grad_(weighted)
    value = random_tensor(3, 4, dtype=torch.float64).requires_grad_()

    def function(value, scores):
        out = by_script(weighted=weighted)(scripted(scores, value))
        return (out.output.value, out.ponder) if weighted else out.output.value

    assert by_script()(scripted(scores, value)).steps.tolist() == [3, 2, 5]
    assert torch.autograd.gradcheck(function, (value, scores))


@pytest.mark.parametrize("dense", [False, True])
def test_ponder_has_a_gradient_through_the_remainder_only(dense):
    scores = torch.tensor([[0.3, 0.3, 0.9, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5, 0.5]]).requires_grad_()
    ponder = by_script(dense=dense)(scripted(scores)).ponder
    torch.testing.assert_close(ponder, torch.tensor([3 + 0.4, 1 + 1.0]))
    (dscores,) = torch.autograd.grad(ponder.sum(), scores)
    assert dscores.tolist() == [[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]]


# ------------------------------------------------------------------------------------ computation


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


class PooledScore(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x.mean((2, 3))) - 0.5)


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


def test_a_convolutional_step_learns_as_in_the_dense_form():
    step, halt = ConvStep().double(), PooledScore().double()
    x = random_tensor(8, 4, 5, 5, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        halt.linear.weight.mul_(6)
    inputs = [x, *step.parameters(), *halt.parameters()]
    compact, dense = (Halting(step, halt, 6, dense=dense)(x) for dense in (False, True))
    assert len(compact.steps.unique()) > 1
    assert_same(compact, dense)
    for ours, theirs in zip(gradients(compact, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# -------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("dense", [False, True])
def test_positions_that_do_not_mix_are_samples(dense):
    step, halt = cell_and_halt()
    x = random_tensor(3, 4, WIDTH, dtype=torch.float64)
    out = Halting(step, halt, STEPS, level="position", dense=dense)(x)
    expected = reference(step, halt, x.flatten(0, 1))
    assert out.output.shape == x.shape and out.ponder.shape == out.steps.shape == (3, 4)
    assert_same((out.output.flatten(0, 1), out.ponder.flatten(), out.steps.flatten()), expected)


class Attending(nn.Module):
    """One head of attention and a tanh: queries of the running positions, keys and values of all."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def rows(self, queries: Tensor, hidden: Tensor, n: int) -> Tensor:
        attention = torch.softmax(self.q(queries) @ self.k(hidden).mT, -1)
        return torch.tanh(queries + attention @ self.v(hidden) + 0.2 * n)

    def forward(self, hidden: Tensor, plan: SamplePlan, n: int) -> Tensor:
        rows = gather_samples(hidden.flatten(0, 1), plan)
        queries, slots = pad_positions(rows, plan, hidden.shape[:2])
        return self.rows(queries, hidden, n).flatten(0, 1)[slots]


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


# ---------------------------------------------------------------------------------------- survive


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_all_halt_at_once_or_never(dense, batch):
    x = random_tensor(batch, WIDTH)
    for value, steps in ((1.0, 1), (0.0, STEPS), (float("nan"), STEPS)):
        layer = Halting(lambda s, n: s + n, lambda s, v=value: torch.full((len(s),), v), STEPS, dense=dense)
        out = layer(x)
        assert out.steps.tolist() == [steps] * batch and out.ponder.tolist() == [steps + 1.0] * batch
        torch.testing.assert_close(out.output, x + sum(range(1, steps + 1)))


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


def test_autocast_runs_as_the_step_does():
    step, halt = cell_and_halt(torch.float32)
    x = random_tensor(9, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"weighted": False}, {"dense": True}):
            out = Halting(step, halt, STEPS, **options)(x)
            assert out.output.dtype == step(x, 1).dtype and out.ponder.dtype == torch.float32
            out.output.float().sum().backward()


def test_a_decision_of_a_gate_is_a_score():
    class Decision(NamedTuple):
        mask: Tensor
        score: Tensor

    x = random_tensor(3, WIDTH)
    decide = lambda s: Decision(torch.ones(len(s)), torch.full((len(s), 1), 0.5))  # noqa: E731
    assert Halting(lambda s, n: s, decide, 4)(x).steps.tolist() == [2, 2, 2]
    assert Halting(lambda s, n: s, decide, 4, weighted=False)(x).steps.tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------- compile


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        step, halt = cell_and_halt(torch.float32)
        step.forward = lambda state, n: torch.tanh(step.linear(state) + 0.1 * n)
        self.before, self.halting = nn.Linear(WIDTH, WIDTH), Halting(step, halt, STEPS, **options)

    def forward(self, x):
        output, ponder, steps = self.halting(self.before(x))
        return output * 2, ponder, steps


def test_a_dense_model_compiles_whole_and_a_compacted_one_in_parts():
    torch._dynamo.reset()
    x = random_tensor(2, 4, WIDTH)
    model = Model(level="position", max_fraction=0.5)
    expected = model(x)
    for dense in (True, False):
        model.halting.dense = dense
        assert_same(torch.compile(model, backend="eager", fullgraph=dense)(x), expected, rtol=1e-5)


# ----------------------------------------------------------------------------------------- errors


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
