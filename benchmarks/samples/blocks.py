"""Residual blocks that some samples of a batch skip: a mask, or ConvNet-AIG's gate, to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynops.gates import PooledGate
from dynops.nn import Skip

from ..harness.contenders import bound, calibrated, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import LayerMacs
from ..pixels.model import network_versions
from ..resnet import BasicBlock
from .contests import Contest, contested, our_versions, random_keep
from .tables import GATED, WORST

# (N, C, H) of the blocks that the project's targets are stated for
TARGET_SIZES = ((16, 64, 56), (8, 256, 14), (32, 128, 28))
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the samples
GATED_SHARES = (1.0, 0.5, 0.0)  # where the gate is in the timing too; the others have its own time


class Sum(nn.Module):
    """``x + module(x)``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(x)
        out += x
        return out


def branch(channels: int) -> nn.Module:
    """Two 3x3 convolutions with their norms and a ReLU between."""
    block = BasicBlock(channels, channels)
    return nn.Sequential(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)


@dataclass(frozen=True)
class Case:
    """A block on ``[n, channels, h, h]``, some samples of which skip it.

    "residual": the layer is ``x + g * F(x)`` with F = :func:`branch`, and no ReLU follows the sum. "replace": it is SkipNet's,
    ``block(x)`` or ``x`` with the ReLU inside of the block; of an x that has no negative numbers, as after a
    ReLU, ConvNet-AIG's ``relu(x + g * F(x))`` is the same.
    """

    mode: str
    n: int
    channels: int
    h: int
    shares: tuple[float, ...] = SHARES
    variants: tuple[str, ...] = ("plain", GATED)
    p99: bool = False

    @property
    def group(self) -> str:
        return WORST if self.p99 else f"{self.mode} block"

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.n},{self.channels},{self.h}x{self.h}"

    def modules(self, x: Tensor) -> tuple[nn.Module, nn.Module]:
        """``(F, the dense block)``, on the same parameters, in eval mode and calibrated on ``x``."""
        torch.manual_seed(0)
        inner = branch(self.channels) if self.mode == "residual" else BasicBlock(self.channels, self.channels)
        dense = Sum(inner) if self.mode == "residual" else inner
        calibrated(dense, x[:4])
        return inner, dense


def all_cases(quick: bool = False) -> list[Case]:
    if quick:
        return [
            Case("residual", *TARGET_SIZES[1], (1.0, 0.5, 0.0)),
            Case("replace", *TARGET_SIZES[1], (0.5,)),
        ]
    cases = [Case(mode, *size) for mode in ("residual", "replace") for size in TARGET_SIZES]
    return [*cases, Case("replace", *TARGET_SIZES[1], (1.0,), p99=True)]


def headline_cases() -> list[Case]:
    return [Case("replace", *TARGET_SIZES[1], (0.5,), (GATED,))]


def measure(case: Case, setting: Setting) -> list[Row]:
    """The rows of one block: every share of kept samples, timed in one interleaved run with the dense block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n, case.channels, case.h, case.h, generator=generator).relu_()
    inner, dense = case.modules(x)
    macs = float(LayerMacs(dense, x).dense)
    x, dense = x.to(**setting.options), dense.to(**setting.options)
    dense_calls = network_versions(dense, x, setting)
    layers, contests = {}, []
    for version, own, copied, prepared in our_versions(x, setting):
        module = prepared(copied(inner))
        path = "samples" if version.endswith("compiled") else None
        layers[version] = Skip(module, mode=case.mode, path=path).eval(), own
    for share in case.shares:
        if setting.backward and share == 0:
            continue  # no gradient reaches the parameters
        keep = random_keep(case.n, share, generator).to(setting.device)
        gate = fitted_gate(x, share)
        for variant in case.variants:
            if variant == "plain" or (share in GATED_SHARES and not setting.backward):
                contests.append(_contest(case, setting, layers, x, share, keep, gate, macs, variant))
    return contested(setting, dense_calls, macs, contests, case.p99)


def _contest(case: Case, setting: Setting, layers, x, share: float, keep, gate, macs, variant) -> Contest:
    if variant == GATED:
        keep = gate(x).mask.detach()  # in half precision perhaps one more or less
        ours = {name: bound(_gated, layer, gate, own) for name, (layer, own) in layers.items()}
    else:
        ours = {name: bound(layer, own, keep) for name, (layer, own) in layers.items()}
    if setting.backward:
        ours = {name: with_backward(call, layers[name][0].parameters()) for name, call in ours.items()}
    kept = float(keep.double().mean())
    weights = sum(p.numel() for p in next(iter(layers.values()))[0].parameters())
    return Contest(
        case.group,
        case.name,
        mask="all" if share == 1 else "none" if share == 0 else "random",
        density=kept,
        macs=macs * kept + (gate_macs(gate) * case.n if variant == GATED else 0),
        ours=ours,
        variant=variant,
        gates={name: bound(gate, own) for name, (_, own) in layers.items()},
        saves=0 < share < 1,
        values=weights + 2 * x.numel(),  # every sample is read and written, kept or not
        replay=_capturable(case, layers, keep) if setting.graph and variant == "plain" else None,
    )


def _capturable(case: Case, layers: dict[str, tuple[Skip, Tensor]], keep: Tensor) -> Callable[[], Tensor]:
    """The call in the last memory format, channels_last, with room for exactly the kept samples: nothing waits."""
    layer, own = list(layers.values())[-1]
    share = float(keep.double().mean())
    return bound(Skip(layer.module, mode=case.mode, max_fraction=share).eval(), own, keep)


def _gated(layer: Skip, gate: Callable, x: Tensor) -> Tensor:
    return layer(x, gate(x).mask)


def gate_macs(gate: PooledGate) -> int:
    """MACs of the gate for one sample."""
    return sum(m.weight.numel() for m in (gate.fc1, gate.fc2))


def fitted_gate(x: Tensor, share: float) -> PooledGate:
    """A gate with random weights whose threshold keeps ``round(share * N)`` of these samples, in eval mode."""
    gate = PooledGate(x.shape[1], device=x.device, dtype=x.dtype).eval()
    with torch.no_grad():
        pooled = gate.fc1(x.mean((2, 3)))
        gate.fc1bn.running_mean.copy_(pooled.mean(0))
        gate.fc1bn.running_var.copy_(pooled.var(0, unbiased=False))
        nn.init.normal_(gate.fc2.weight)
        nn.init.zeros_(gate.fc2.bias)
        closed, opened = gate.fc2(gate.fc1bn(pooled).relu()).unbind(1)
        margin = (opened - closed).sort(descending=True).values
        kept = round(share * len(x))
        above = margin[kept - 1] if kept else margin[0] + 2
        below = margin[kept] if kept < len(x) else margin[-1] - 2
        gate.fc2.bias[1] = -(above + below) / 2
    return gate
