"""Skip RNN against nn.LSTM: half of the updates are skipped.

Paper: Campos et al., Skip RNN (ICLR 2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynops.nn.steps.rnn import SkipRNN

from ..harness.contenders import bound
from ..harness.rows import Row
from ..harness.setting import Setting
from .contests import Contest, contested

GROUP = "Skip RNN"
LSTMS = ((32, 128, 256), (64, 64, 512))  # B, T, and I = H


def all_cases(quick: bool = False) -> list[tuple[int, int, int]]:
    return list(LSTMS[: 1 if quick else None])


def measure(sizes: tuple[int, int, int], setting: Setting) -> list[Row]:
    """The rows of half of the updates: by the layer's own gate ("plain"), and by decisions given for all steps."""
    batch, time, size = sizes
    torch.manual_seed(0)
    x = torch.randn(batch, time, size).to(**setting.options)
    dense, ours = {}, {}
    for name, first in (("batch first", True), ("time first", False)):
        torch.manual_seed(1)  # the same parameters
        lstm = nn.LSTM(size, size, batch_first=first).to(**setting.options).eval()
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
        Contest(GROUP, case, "its gate", own_updates / total, own_updates * (cell + size), calls, gates=gates),
        Contest(
            GROUP, case, "random", given_updates / total, given_updates * cell, by_mask, "decisions given"
        ),
    ]  # fmt: skip
    return contested(setting, dense, total * cell, contests)


def half_updates(layer: SkipRNN) -> SkipRNN:
    """The layer with a gate that asks for an update at about every second step: rates around 0.35."""
    with torch.no_grad():
        layer.gate.weight.mul_(0.5)
        layer.gate.bias.fill_(math.log(0.35 / 0.65))
    return layer.eval()


def _rates(layer: SkipRNN, state: Tensor, updates: int) -> None:
    for _ in range(updates):
        layer.gate(state).sigmoid()
