"""ACT: a block of shared weights that each sample repeats until its halting scores add up to 1 (Graves, 2016).

A convolutional block, as in IamNN (Leroux et al., 2018). The static network repeats it for every sample as often as any
may.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import Halting

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 150
WIDTH, MAX_STEPS, PONDER = 64, 6, 0.15


class Step(nn.Module):
    """relu(x + change(x)); the norm is one of each sample's own, as its statistics differ from step to step."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, WIDTH), nn.GroupNorm(8, WIDTH)

    def forward(self, x: Tensor, n: int) -> Tensor:
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(x + change)


class Halt(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.linear.bias, 0.0)  # two or three steps at first

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x.mean((2, 3))))


class ACTNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)
        self.halting = Halting(Step(), Halt(), MAX_STEPS)
        self.head = nn.Linear(4 * WIDTH, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Logits, and the ponder cost."""
        x, ponder = F.relu(self.stem(x)), x.new_zeros(())
        if mode == "full":
            for n in range(1, MAX_STEPS + 1):
                x = self.halting.step(x, n)
        else:
            self.halting.dense = mode == "dense"
            x, ponder, _ = self.halting(x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1)), ponder.mean()


def build() -> nn.Module:
    return ACTNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the compacted form: its gradients are those of the dense form, and steps that no sample takes cost nothing."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, ponder = model(x, "dynamic")
        return F.cross_entropy(logits, y) + PONDER * ponder

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
