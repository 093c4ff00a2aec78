"""SACT: each pixel leaves a stage of residual units when its halting scores add up to 1 (Figurnov et al., CVPR 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.gates import SpatialHaltingHead
from dynops.nn import SparseSequential, SpatialHalting

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 120
WIDTH, INNER, UNITS, PONDER = 64, 32, 4, 0.2


def unit() -> SparseSequential:
    """The residual of a bottleneck unit, which runs on packed rows where a plan says so."""
    return SparseSequential(
        nn.Conv2d(WIDTH, INNER, 1, bias=False), nn.BatchNorm2d(INNER), nn.ReLU(),
        nn.Conv2d(INNER, INNER, 3, padding=1, bias=False), nn.BatchNorm2d(INNER), nn.ReLU(),
        nn.Conv2d(INNER, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH),
    )  # fmt: skip


class SACTNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        halts = [SpatialHaltingHead(WIDTH, bias=-1.0) for _ in range(UNITS - 1)]
        self.stage = SpatialHalting([unit() for _ in range(UNITS)], halts)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Logits, and the ponder cost: the mean over all pixels."""
        x, ponder = F.relu(self.stem(x)), x.new_zeros(())
        if mode == "full":
            for residual in self.stage.units:
                x = x + residual(x)
        else:
            self.stage.dense = mode == "dense"
            x, ponder, _ = self.stage(x)
        return self.head(F.relu(x).mean((2, 3))), ponder.mean()


def build() -> nn.Module:
    return SACTNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form, so that the norms' statistics are those of whole maps."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, ponder = model(x, "dense")
        return F.cross_entropy(logits, y) + PONDER * ponder

    fit(model, data.train, loss, length, gates=model.stage.halts.parameters())


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
