"""Steps, scores and the equations of halting, for its tests."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynops.nn.samples.halting import Halting, pad_positions
from dynops.ops import gather_samples
from dynops.plans import SamplePlan
from dynops.testing import random_tensor

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
