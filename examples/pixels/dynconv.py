"""DynConv: residual blocks that compute the pixels which a gate asks for (Verelst and Tuytelaars, CVPR 2020).

A squeeze unit decides for each pixel by a Gumbel-sigmoid; a loss holds the network to a share of its pixels. The block runs
on packed rows, and its first layer also where the 3x3 convolution reads it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.budget import cost_loss
from dynops.gates import SpatialGate, set_noise
from dynops.nn import SparseSequential

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 24, 120
WIDTH, INNER, BLOCKS, TARGET = 32, 32, 3, 0.3


class Block(nn.Module):
    """x + gate * bottleneck(x)."""

    def __init__(self):
        super().__init__()
        self.gate = SpatialGate(WIDTH)
        self.chain = SparseSequential(
            nn.Conv2d(WIDTH, INNER, 1, bias=False), nn.BatchNorm2d(INNER), nn.ReLU(),
            nn.Conv2d(INNER, INNER, 3, padding=1, bias=False), nn.BatchNorm2d(INNER), nn.ReLU(),
            nn.Conv2d(INNER, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
        """The map, and the gate's mask ``[N, 1, H, W]``."""
        if mode == "full":
            return F.relu(x + self.chain(x)), None
        mask = self.gate(x).mask
        change = self.chain(x, mask) if mode == "dynamic" else mask * self.chain(x)
        return F.relu(x + change), mask


class DynConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(16 * WIDTH, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the masks of the blocks."""
        x, masks = F.relu(self.stem(x)), []
        for block in self.blocks:
            x, mask = block(x, mode)
            masks.append(mask)
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1)), masks


def build() -> nn.Module:
    return DynConvNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form: a closed gate learns what it missed. The second half is without noise, as evaluation is."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        set_noise(model, progress < 0.5)
        logits, masks = model(x, "dense")
        return F.cross_entropy(logits, y) + 10 * cost_loss(masks, [1.0] * BLOCKS, TARGET)

    gates = (p for block in model.blocks for p in block.gate.parameters())
    fit(model, data.train, loss, length, gates=gates)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
