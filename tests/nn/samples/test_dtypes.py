"""Dtypes of layers that treat samples, under autocast: no decision changes them."""

import copy
import itertools

import pytest
import torch
from exit_cases import Calls
from torch import nn

from dynops.nn import (
    Cascade,
    ConvExperts,
    EarlyExit,
    Experts,
    Halting,
    MaxSoftmax,
    Skip,
    TokenExit,
    TokenSequential,
)
from dynops.nn.steps.cells import compacted_cell
from dynops.testing import random_tensor

N = 6


def conv(channels: int = 4) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


def wide() -> nn.Module:
    """What ends in a norm under a GPU's autocast."""
    return Calls(torch.Tensor.float)


BRANCHES = {
    "conv": conv,
    "conv, wide": lambda: nn.Sequential(conv(), wide()),
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
}


@pytest.mark.parametrize("branch", ["conv", "conv, wide"])
@pytest.mark.parametrize("below", [None, *BRANCHES])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_autocast_gives_a_dtype_that_no_gate_changes(branch, below, mode):
    module, shortcut = BRANCHES[branch](), below and BRANCHES[below]()
    for dtype, grad, dense in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (False, True)
    ):
        x = random_tensor(4, 4, 6, 6).to(dtype)
        for gate in ([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]):
            layer = Skip(module, shortcut, mode, dense=dense).eval()  # a new one: nothing has run before
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                made, plain = layer(x, torch.tensor(gate)), x if shortcut is None else shortcut(x)
                exact = torch.promote_types(module(x).dtype, plain.dtype)
            skipped = [n for n in range(4) if not gate[n]]
            assert made.dtype == exact
            assert torch.equal(made[skipped], plain[skipped].to(exact))


def test_a_convolution_stack_under_autocast_rounds_no_skipped_sample():
    block = nn.Sequential(conv(32), nn.ReLU(), conv(32)).eval()
    x = random_tensor(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for gate in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = Skip(block).eval()(x, torch.tensor(gate))
        assert out.dtype == torch.float32
        assert all(torch.equal(out[n], x[n]) for n in range(4) if not gate[n])


def test_asking_for_a_dtype_leaves_no_trace():
    norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before, x = copy.deepcopy(norm.state_dict()), random_tensor(4, 4, 3, 3).bfloat16()
    layer, state = Skip(norm, nn.Conv2d(4, 4, 1)), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_in_layers_with_exits_and_experts(dtype):
    x = random_tensor(N, 4, 6, 6).to(dtype)

    def head(*last):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), *last)

    def dtypes(calls):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return {call().dtype for call in calls}

    widened = BRANCHES["conv, wide"]
    for heads in ([head(), head(wide())], [head(wide()), head()]):
        exits = [EarlyExit([conv(), widened()], heads, MaxSoftmax(t)).eval() for t in (0.0, 0.26, 2.0)]
        cascades = [
            Cascade([nn.Sequential(conv(), h) for h in heads], MaxSoftmax(t)).eval() for t in (0.0, 0.26, 2.0)
        ]
        for models in (exits, cascades):
            assert len(dtypes([lambda m=m: m(x).logits for m in models])) == 1

    one, other = conv(), widened()
    for weighted in (True, False):
        layers = [
            Halting(lambda s, n: one(s) if n == 1 else other(s), score, 3, weighted=weighted, dense=dense)
            for dense in (False, True)
            for score in (lambda s: torch.ones(len(s)), lambda s: (torch.arange(len(s)) % 2) * 1.0)
        ]
        assert len(dtypes([lambda m=m: m(x).output for m in layers])) == 1
    choices = (torch.full((N,), 3), torch.zeros(N).long(), torch.arange(N) % 4)
    branches = [conv(), widened(), conv()]
    made = dtypes([lambda i=i: ConvExperts(branches)(x, i) for i in choices])
    assert made == {torch.float32}  # the widest of the branches
    tokens = random_tensor(7, 8).to(dtype)
    experts, dropped = Experts(4, 8, 6), torch.full((7, 2), 4)
    calls = [lambda t=t, i=i: experts(tokens[:t], i[:t]) for t in (0, 7) for i in (dropped, dropped - 2)]
    assert len(dtypes(calls)) == 1
    hidden = random_tensor(3, 5, 8).to(dtype)
    stages = [
        TokenSequential(nn.Linear(8, 8)),
        TokenSequential(nn.Linear(8, 8), wide()),
    ]
    models = [
        TokenExit(stages, [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4), wide())], MaxSoftmax(t)).eval()
        for t in (0.0, 0.4, 2.0)
    ]
    assert len(dtypes([lambda m=m: m(hidden).logits for m in models])) == 1
    assert len(dtypes([lambda m=m: m(hidden).hidden for m in models])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_keeps_the_dtype_of_its_state(dtype):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x, h):
            return self.linear(torch.cat([x, h.relu_()], 1))

    cell, x, state = Cell(), random_tensor(N, 8), random_tensor(N, 8).to(dtype)
    for dense, update in itertools.product((False, True), ([0] * N, [1] * N, [1, 0, 1, 0, 1, 0])):
        u, given = torch.tensor(update, dtype=torch.float32), state.clone()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            made = compacted_cell(cell, x.to(dtype), given, u, dense=dense)
            exact = torch.where(u[:, None] != 0, cell(x.to(dtype), state.clone()).to(dtype), state)
        assert torch.equal(given, state) and torch.equal(made, exact) and made.dtype == dtype
