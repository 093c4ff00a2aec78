"""Networks that half of the remaining samples leave at each of three exits.

Papers: Teerapittayanon et al., BranchyNet (ICPR 2016); Huang et al., Multi-scale dense networks (ICLR 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynops.nn.samples.criteria import MaxSoftmax
from dynops.nn.samples.exits import EarlyExit
from dynops.nn.tokens.exits import TokenExit, TokenSequential

from ..harness.contenders import bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import LayerMacs
from ..pixels.model import network_versions
from ..resnet import BasicBlock, resnet18
from .contests import Contest, TokenMLP, contested, our_versions, random_keep

GROUP, TOKENS = "early exit", "token exit"
STAGES, CLASSES = 4, 100


def equal_stages() -> list[nn.Module]:
    """Four stages of as many MACs: two blocks of two 3x3 convolutions, 64 channels, each."""
    return [nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)) for _ in range(STAGES)]


def resnet18_stages() -> list[nn.Module]:
    """ResNet-18 as it is used on CIFAR: a 3x3 stem without a pool, then its four stages."""
    net = resnet18()
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
    )
    return [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]


def mlp_stages() -> list[nn.Module]:
    """Two feed-forward layers of a transformer each, 512 channels."""
    return [nn.Sequential(TokenMLP(512), TokenMLP(512)) for _ in range(STAGES)]


@dataclass(frozen=True)
class Case:
    """A network of four stages on ``shape``, and the channels after each of them; ``[B, T, C]``: each token leaves by itself."""

    name: str
    build: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    widths: tuple[int, int, int, int]

    @property
    def of_tokens(self) -> bool:
        return len(self.shape) == 3

    @property
    def rows(self) -> int:
        """Samples or tokens."""
        return self.shape[0] * self.shape[1] if self.of_tokens else self.shape[0]

    def modules(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """``(stages, heads)`` with random weights, in eval mode and calibrated."""
        torch.manual_seed(0)
        stages = nn.ModuleList(self.build())
        heads = nn.ModuleList(head(width, pooled=not self.of_tokens) for width in self.widths)
        calibrated(nn.Sequential(*stages, heads[-1]), torch.randn(8, *self.shape[1:]))
        return stages.eval(), heads.eval()


def head(channels: int, pooled: bool) -> nn.Module:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else []
    return nn.Sequential(*pool, nn.Linear(channels, CLASSES))


def all_cases(quick: bool = False) -> list[Case]:
    cases = [
        Case("ResNet-18", resnet18_stages, (32, 3, 32, 32), (64, 128, 256, 512)),
        Case("four equal stages", equal_stages, (32, 64, 28, 28), (64,) * 4),
        Case("8 MLPs", mlp_stages, (8, 64, 512), (512,) * 4),
    ]
    return [replace(cases[0], shape=(16, 3, 32, 32))] if quick else cases


def headline_cases() -> list[Case]:
    return all_cases(quick=True)


class Halves(nn.Module):
    """The largest softmax probability, computed as it would be. The weights are random, so that then half of the samples leave."""

    def __init__(self, batch: int):
        super().__init__()
        self.sure = MaxSoftmax(0.5)
        generator = torch.Generator().manual_seed(0)
        while batch > 1:
            self.register_buffer(f"of{batch}", random_keep(batch, 0.5, generator))
            batch //= 2

    def forward(self, logits: Tensor, exit: int, state: Tensor | None = None) -> Tensor:
        return self.sure(logits, exit).leave.copy_(getattr(self, f"of{len(logits)}"))


def measure(case: Case, setting: Setting) -> list[Row]:
    """The row of a network, against all of its stages and the last head."""
    stages, heads = case.modules()
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    macs, computed = network_macs(stages, heads, x)
    stages.to(**setting.options), heads.to(**setting.options)
    x, criterion = x.to(**setting.options), Halves(case.rows).to(setting.device)
    dense = network_versions(nn.Sequential(*stages, heads[-1]), x, setting)
    ours, gates = {}, {}
    for version, own, copied, prepared in our_versions(x, setting):
        own_stages, own_heads = copied(stages), copied(heads)
        states = remaining_states(own_stages, own.flatten(0, 1) if case.of_tokens else own)
        each = [prepared(stage) for stage in own_stages]
        ours[version] = bound(exit_net(case, each, own_heads, criterion), own)
        gates[version] = bound(heads_alone, own_heads, criterion, states)
    kept = sum(len(state) for state in states) / (STAGES * case.rows)
    title = f"{case.name}, {','.join(map(str, case.shape))}, 3 exits"
    group = TOKENS if case.of_tokens else GROUP
    contest = Contest(group, title, "half leave", kept, computed, ours, gates=gates)
    return contested(setting, dense, macs, [contest])


def exit_net(case: Case, stages: list[nn.Module], heads: nn.ModuleList, criterion: nn.Module) -> nn.Module:
    if case.of_tokens:
        stages = [TokenSequential(stage) for stage in stages]
    return (TokenExit if case.of_tokens else EarlyExit)(stages, list(heads), criterion).eval()


def network_macs(stages: nn.ModuleList, heads: nn.ModuleList, x: Tensor) -> tuple[float, float]:
    """MACs of all stages and the last head, and of the parts that run: half of the samples leave at each head."""
    dense = computed = 0.0
    with torch.no_grad():
        for i, (stage, own_head) in enumerate(zip(stages, heads, strict=True)):
            stage_macs, x = LayerMacs(stage, x).dense, stage(x)
            head_macs = LayerMacs(own_head, x).dense
            dense += stage_macs + (head_macs if i == STAGES - 1 else 0)
            computed += (stage_macs + head_macs) / 2**i
    return dense, computed


def remaining_states(stages: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """The input of each head: the output of its stage, of as many samples as there are then."""
    states = []
    with torch.inference_mode():
        for stage in stages:
            x = stage(x)
            states.append(x)
            x = x[: len(x) // 2]
    return states


def heads_alone(heads: nn.ModuleList, criterion: Halves, states: list[Tensor]) -> None:
    for i, (own_head, state) in enumerate(zip(heads, states, strict=True)):
        logits = own_head(state)
        if i < STAGES - 1:
            criterion(logits, i)
