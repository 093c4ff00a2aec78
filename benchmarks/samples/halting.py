"""Loops whose length depends on the sample: adaptive computation time around a block.

Papers: Graves, Adaptive Computation Time (2016); Leroux et al., IamNN (2018) for blocks of shared weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynops.nn.samples.halting import Halting

from ..harness.contenders import bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import LayerMacs
from ..pixels.model import network_versions
from ..resnet import BasicBlock
from .contests import Contest, TokenMLP, contested, our_versions

GROUP = "halting"
MAX_STEPS = 8


class FixedDepth(nn.Module):
    """The loop without halting: every step for every sample."""

    def __init__(self, block: nn.Module, steps: int):
        super().__init__()
        self.block, self.steps = block, steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.block(x)
        return x


class HaltingHead(nn.Module):
    """The halting score of ``x``, computed as it would be.

    The weights are random, so that the score is then replaced: by 1 where ``left`` says that this was the last step, by 0
    elsewhere.
    """

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


def all_cases(quick: bool = False) -> list[Loop]:
    return list(LOOPS[: 1 if quick else None])


def measure(loop: Loop, setting: Setting) -> list[Row]:
    torch.manual_seed(0)
    x = torch.randn(loop.shape)
    block, head = calibrated(loop.build(loop.shape[1]), x[:8]), HaltingHead(loop.shape[1])
    steps = halting_steps(loop.shape[0])
    step_macs = LayerMacs(block, x).dense / len(x)
    scored = int(steps.sum())  # no sample takes the last step, the only one without a score
    computed = scored * (step_macs + head.linear.in_features)
    block.to(**setting.options), head.to(**setting.options)
    x, steps = x.to(**setting.options), steps.to(setting.device)
    dense = network_versions(FixedDepth(block, MAX_STEPS), x, setting)
    ours, gates = {}, {}
    for version, own, copied, prepared in our_versions(x, setting):
        layer = Halting(_step_of(prepared(copied(block))), head, MAX_STEPS)
        ours[version] = bound(layer, {"x": own, "left": steps})
        gates[version] = bound(_score_all, head, own, steps)
    density = float(steps.double().mean()) / MAX_STEPS
    case = f"{loop.name}, {','.join(map(str, loop.shape))}, {MAX_STEPS} steps"
    contest = Contest(GROUP, case, "1 to 7 steps", density, computed, ours, gates=gates)
    return contested(setting, dense, step_macs * len(x) * MAX_STEPS, [contest])


def halting_steps(samples: int) -> Tensor:
    """int32 ``[N]``: each of 1 ... 7 equally often, in a random order."""
    steps = torch.arange(samples, dtype=torch.int32) % (MAX_STEPS - 1) + 1
    return steps[torch.randperm(samples, generator=torch.Generator().manual_seed(0))]


def _step_of(block: nn.Module) -> Callable:
    return lambda state, n: {"x": block(state["x"]), "left": state["left"] - 1}


def _score_all(head: HaltingHead, x: Tensor, steps: Tensor) -> None:
    """The scores of all steps, of as many samples as there are then."""
    for n in range(1, MAX_STEPS):
        running = int((steps >= n).sum())
        head({"x": x[:running], "left": steps[:running]})
