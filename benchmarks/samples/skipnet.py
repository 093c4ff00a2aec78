"""SkipNet of the shape of ResNet-110: each of its 54 blocks is skipped by half of the samples.

Papers: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2, with 1x1 convolutions in the
shortcuts that change width; Wang et al., SkipNet (ECCV 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynops.gates import RecurrentGate
from dynops.nn import Skip

from ..harness.contenders import bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import LayerMacs
from ..pixels.model import network_versions
from ..resnet import BasicBlock
from .contests import Contest, contested, our_versions

GROUP = "SkipNet"
WIDTHS = (16, 32, 64)
SIZE = 32  # pixels on a side of a CIFAR image


class CifarResNet(nn.Module):
    """Stem, three stages of ``depth`` blocks of two 3x3 convolutions, global mean, classifier; depth 18: ResNet-110."""

    def __init__(self, depth: int = 18, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(inplace=True),
        )
        blocks, before = [], WIDTHS[0]
        for width in WIDTHS:
            for _ in range(depth):
                blocks.append(_block(before, width))
                before = width
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, num_classes]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def _block(before: int, width: int) -> BasicBlock:
    if before == width:
        return BasicBlock(width, width)
    shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(before, width, 2, shortcut)


class SkipNet(nn.Module):
    """The blocks of a :class:`CifarResNet`, each in a :class:`dynops.nn.Skip`, and SkipNet's recurrent gate if asked. ``prepared`` may compile a block.

    Called as ``net(x, keep)`` with keep bool ``[blocks, N]``, the samples that run each block. The recurrent gate is
    computed in front of every block as it would be; its weights are random, so ``keep`` then takes the place of
    what it decided.
    """

    def __init__(self, net: CifarResNet, recurrent: bool, prepared: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.stem, self.fc = net.stem, net.fc
        self.layers = nn.ModuleList()
        for block in net.blocks:
            own = prepared(block)
            path = None if own is block else "samples"
            self.layers.append(Skip(own, block.downsample, mode="replace", path=path))
        self.gate = RecurrentGate([block.conv1.in_channels for block in net.blocks]) if recurrent else None

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # [N, 3, H, W], [blocks, N] -> [N, num_classes]
        x, state = self.stem(x), None
        for i, layer in enumerate(self.layers):
            decided = keep[i]
            if self.gate is not None:
                decision, state = self.gate(x, state, i)
                decided = decision.mask.detach().copy_(decided)
            x = layer(x, decided)
        return self.fc(x.mean((2, 3)))


def gates_alone(gate: RecurrentGate, maps: list[Tensor]) -> Tensor:
    """Every step of the gate on the inputs of the blocks."""
    state = None
    for i, x in enumerate(maps):
        decision, state = gate(x, state, i)
    return decision.mask


def block_inputs(net: CifarResNet, x: Tensor) -> list[Tensor]:
    """The input of each block where all are open."""
    maps, x = [], net.stem(x)
    for block in net.blocks:
        maps.append(x)
        x = block(x)
    return maps


def computed_macs(net: CifarResNet, x: Tensor, keep: Tensor) -> float:
    """MACs of a call with ``keep``: stem, classifier and shortcuts of every sample, the rest of a block where it runs."""
    shares = keep.double().mean(1).tolist()
    total = 0.0
    for name, (_, macs) in LayerMacs(net, x).layers.items():
        inside = name.startswith("blocks.") and "downsample" not in name
        total += macs * (shares[int(name.split(".")[1])] if inside else 1)
    return total


def gate_macs(gate: RecurrentGate, samples: int) -> int:
    steps = len(gate.channels)
    cell = gate.rnn.weight_ih.numel() + gate.rnn.weight_hh.numel() + gate.proj.weight.numel()
    return samples * (steps * cell + gate.hidden * sum(gate.channels))


def all_cases(quick: bool = False) -> list[int]:
    """The depths: 18 is ResNet-110."""
    return [3 if quick else 18]


def measure(depth: int, setting: Setting, batch: int = 32, share: float = 0.5) -> list[Row]:
    """Rows without and with the recurrent gate, against the dense network."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    net = calibrated(CifarResNet(depth), x)
    keep = torch.rand(len(net.blocks), batch, generator=generator) < share
    macs, computed = float(LayerMacs(net, x).dense), computed_macs(net, x, keep)
    net.to(**setting.options)
    x, keep, density = x.to(**setting.options), keep.to(setting.device), float(keep.double().mean())
    dense = network_versions(net, x, setting)
    case = f"ResNet-{6 * depth + 2}, {batch},3,{SIZE}x{SIZE}"
    contests = []
    for recurrent in (False, True):
        ours, gates, extra = {}, {}, 0
        for version, own, copied, prepared in our_versions(x, setting):
            torch.manual_seed(1)  # the same gate in all versions
            ours_net = SkipNet(copied(net), recurrent, prepared).to(**setting.options).eval()
            ours[version] = bound(ours_net, own, keep)
            if recurrent:
                extra = gate_macs(ours_net.gate, batch)
                with torch.inference_mode():
                    gates[version] = bound(gates_alone, ours_net.gate, block_inputs(net, own))
        variant = "recurrent gate" if recurrent else "plain"
        mask = "random for each block and sample"
        contests.append(Contest(GROUP, case, mask, density, computed + extra, ours, variant, gates))
    return contested(setting, dense, macs, contests)
