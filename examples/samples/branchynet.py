"""BranchyNet: a sample leaves at the first branch whose prediction has little entropy (Teerapittayanon et al., ICPR 2016).

The static network it is compared with has no branches.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import EarlyExit, Entropy

from ..common import Digits, Length, fit
from ..measure import main
from .early_exit import run  # noqa: F401

SIZE, STEPS = 16, 200
WIDTHS, ENTROPY = (32, 64, 128), 0.25  # nats
WEIGHTS = (0.5, 0.7, 1.0)  # of the branches' losses


def conv(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def build() -> nn.Module:
    first, second, third = WIDTHS
    stages = (
        nn.Sequential(*conv(1, first), *conv(first, first, 2)),
        nn.Sequential(*conv(first, second), *conv(second, second)),
        nn.Sequential(*conv(second, third, 2), *conv(third, third)),
    )
    heads = (
        nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10)) for width in WIDTHS
    )
    return EarlyExit(stages, heads, Entropy(ENTROPY))


def train(model: nn.Module, data: Digits, length: Length) -> None:
    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        exits = model(x, all_exits=True)
        return sum(w * F.cross_entropy(z, y) for w, z in zip(WEIGHTS, exits, strict=True))

    fit(model, data.train, loss, length)


if __name__ == "__main__":
    main(__name__)
