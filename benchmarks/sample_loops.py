"""Loops whose length depends on the sample: ACT around a block, Skip RNN against nn.LSTM.

Papers: Graves, Adaptive Computation Time (2016), with Leroux et al., IamNN (2018) for blocks of shared weights;
Campos et al., Skip RNN (ICLR 2018).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynops.nn.samples.halting import Halting
from dynops.nn.steps.rnn import SkipRNN

from .layers import Setting
from .models import LayerMacs, calibrated
from .report import Row
from .resnet import BasicBlock
from .sample_contests import FORMATS, Contest, TokenMLP, bound, dense_calls, formats, measure
from .timing import progress

HALTING, SKIP_RNN = "halting", "Skip RNN"
MAX_STEPS = 8


# ----------------------------------------------------------------------------------------- halting


class FixedDepth(nn.Module):
    """What it is without halting: every step for every sample."""

    def __init__(self, block: nn.Module, steps: int):
        super().__init__()
        self.block, self.steps = block, steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.block(x)
        return x


class HaltingHead(nn.Module):
    """The halting score of ``x``; computed as it would be, and then replaced by 1 where ``left`` says that this
    was the last step and by 0 elsewhere, as the weights are random."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, 1)

    def forward(self, state: dict[str, Tensor]) -> Tensor:
        x = state["x"] if state["x"].dim() == 2 else state["x"].mean((2, 3))
        return self.linear(x).sigmoid().view(-1).copy_(state["left"] <= 0)


@dataclass(frozen=True)
class Loop:
    """``build(shape[1])`` repeated up to 8 times; a sample halts after one of 1 ... 7 steps, all equally often."""

    name: str
    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]


LOOPS = (
    Loop("block of two 3x3", lambda channels: BasicBlock(channels, channels), (32, 64, 28, 28)),
    Loop("MLP of tokens", TokenMLP, (512, 512)),
)


def run_halting(setting: Setting, loops: tuple[Loop, ...] = LOOPS) -> list[Row]:
    rows = []
    for loop in progress(list(loops), "halting", "loop"):
        rows += measure_loop(loop, setting)
    return rows


def measure_loop(loop: Loop, setting: Setting) -> list[Row]:
    torch.manual_seed(0)
    x = torch.randn(loop.shape)
    block, head = calibrated(loop.build(loop.shape[1]), x[:8]), HaltingHead(loop.shape[1])
    steps = halting_steps(loop.shape[0])
    step_macs = LayerMacs(block, x).dense / len(x)
    scored = int(steps.sum())  # no sample takes the last step, the only one without a score
    computed = scored * (step_macs + head.linear.in_features)
    options = {"device": setting.device, "dtype": setting.dtype}
    block.to(**options), head.to(**options)
    x, steps = x.to(**options), steps.to(setting.device)
    dense = dense_calls(FixedDepth(block, MAX_STEPS), x, setting)
    ours, gates = {}, {}
    for name, own in formats(x).items():
        for step, compiled in blocks_of(block, name, setting):
            layer = Halting(_step_of(step), head, MAX_STEPS)
            version = compiled if name == "eager" else f"{name} {compiled}"
            ours[version] = bound(layer, {"x": own, "left": steps})
            gates[version] = bound(_score_all, head, own, steps)
    density = float(steps.double().mean()) / MAX_STEPS
    case = f"{loop.name}, {','.join(map(str, loop.shape))}, {MAX_STEPS} steps"
    contest = Contest(HALTING, case, "1 to 7 steps", density, computed, ours, gates=gates)
    return measure(setting, dense, step_macs * len(x) * MAX_STEPS, [contest])


def halting_steps(samples: int) -> Tensor:
    """int32 ``[N]``: each of 1 ... 7 equally often, in a random order."""
    steps = torch.arange(samples, dtype=torch.int32) % (MAX_STEPS - 1) + 1
    return steps[torch.randperm(samples, generator=torch.Generator().manual_seed(0))]


def blocks_of(block: nn.Module, name: str, setting: Setting) -> list[tuple[nn.Module, str]]:
    """The block in the format ``name``, eager, and compiled for any number of samples."""
    own = copy.deepcopy(block)
    own = own.to(memory_format=FORMATS[name]) if name in FORMATS else own
    found = [(own, "eager")]
    return [*found, (torch.compile(own, dynamic=True), "compiled")] if setting.compiled else found


def _step_of(block: nn.Module) -> Callable:
    return lambda state, n: {"x": block(state["x"]), "left": state["left"] - 1}


def _score_all(head: HaltingHead, x: Tensor, steps: Tensor) -> None:
    """The scores of all steps, of as many samples as there are then."""
    for n in range(1, MAX_STEPS):
        running = int((steps >= n).sum())
        head({"x": x[:running], "left": steps[:running]})


# ---------------------------------------------------------------------------------------- Skip RNN

LSTMS = ((32, 128, 256), (64, 64, 512))  # B, T, and I = H


def run_skip_rnn(setting: Setting, sizes: tuple[tuple[int, int, int], ...] = LSTMS) -> list[Row]:
    rows = []
    for size in progress(list(sizes), "Skip RNN", "layer"):
        rows += measure_lstm(*size, setting)
    return rows


def measure_lstm(batch: int, time: int, size: int, setting: Setting) -> list[Row]:
    """Half of the updates: by the layer's own gate ("plain"), and by decisions given for all steps."""
    torch.manual_seed(0)
    options = {"device": setting.device, "dtype": setting.dtype}
    x = torch.randn(batch, time, size).to(**options)
    dense, ours = {}, {}
    for name, first in (("batch first", True), ("time first", False)):
        torch.manual_seed(1)  # the same parameters
        lstm = nn.LSTM(size, size, batch_first=first).to(**options).eval()
        own = x if first else x.transpose(0, 1).contiguous()
        dense[name] = bound(lstm, own)
        ours[name] = half_updates(SkipRNN.from_dense(lstm)), own
    given = (torch.rand(batch, time, generator=torch.Generator().manual_seed(0)) < 0.5).to(x.device)
    with torch.inference_mode():
        layer, own = ours["batch first"]
        own_updates = int(layer(own).updates.sum())
    cell = 4 * size * (size + size)
    gates = {name: bound(_rates, layer, x[:, 0], own_updates // batch) for name, (layer, _) in ours.items()}
    calls = {name: bound(layer, own) for name, (layer, own) in ours.items()}
    by_mask = {
        name: bound(layer, own, updates=given if layer.batch_first else given.t().contiguous())
        for name, (layer, own) in ours.items()
    }
    case = f"LSTM, {batch},{time},{size}"
    total = batch * time
    given_updates = int(given.sum())
    contests = [
        Contest(SKIP_RNN, case, "its gate", own_updates / total, own_updates * (cell + size), calls, gates=gates),
        Contest(
            SKIP_RNN, case, "random", given_updates / total, given_updates * cell, by_mask, "decisions given"
        ),
    ]  # fmt: skip
    return measure(setting, dense, total * cell, contests)


def half_updates(layer: SkipRNN) -> SkipRNN:
    """The layer with a gate that asks for an update at about every second step: rates around 0.35."""
    with torch.no_grad():
        layer.gate.weight.mul_(0.5)
        layer.gate.bias.fill_(math.log(0.35 / 0.65))
    return layer.eval()


def _rates(layer: SkipRNN, state: Tensor, updates: int) -> None:
    for _ in range(updates):
        layer.gate(state).sigmoid()


def run(setting: Setting, quick: bool = False) -> list[Row]:
    if quick:
        return run_halting(setting, LOOPS[:1]) + run_skip_rnn(setting, LSTMS[:1])
    return run_halting(setting) + run_skip_rnn(setting)
