"""The residual network whose blocks SkipNet, ConvNet-AIG and BlockDrop skip."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import Skip

WIDTHS = (32, 32, 32, 64, 64, 64)  # of the blocks; maps are halved where the width doubles


def change(width: int) -> nn.Sequential:
    """The branch that a residual block adds to its input."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
    )  # fmt: skip


class ResNet(nn.Module):
    """Six residual blocks ``relu(x + gate * change(x))``, each with a gate for each sample."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.down = nn.Conv2d(WIDTHS[0], WIDTHS[-1], 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Skip(change(width), mode="residual") for width in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor, mode: str, decide: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Logits. ``decide(i, x)`` is the gate ``[N]`` of block i for its input; in mode "full" there is none."""
        x = F.relu(self.stem(x))
        for i, block in enumerate(self.blocks):
            if x.shape[1] != WIDTHS[i]:
                x = F.relu(self.down(x))
            x = F.relu(self.run(block, x, mode, None if mode == "full" else decide(i, x)))
        return self.head(x.mean((2, 3)))

    def run(self, block: Skip, x: Tensor, mode: str, gate: Tensor | None) -> Tensor:
        if gate is None:
            return x + block.module(x)
        block.dense = mode == "dense"
        return block(x, gate)
