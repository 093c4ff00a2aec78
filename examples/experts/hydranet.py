"""HydraNet: a stem, branches of which each sample runs the 2 best of 6, and a combiner (Mullapudi et al., CVPR 2018).

The paper assigns classes to branches beforehand. Here the gate learns it, held to even use by a loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import ConvExperts, TopKRouter, load_balance_loss

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 200
WIDTH, BRANCHES, TOP_K = 48, 6, 2


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


def branch() -> nn.Sequential:
    return nn.Sequential(conv(WIDTH, WIDTH), conv(WIDTH, WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class HydraNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(1, 16), conv(16, WIDTH, stride=2))
        self.gate = TopKRouter(WIDTH, BRANCHES, TOP_K)
        self.experts = ConvExperts([branch() for _ in range(BRANCHES)], combine="concat")
        self.combiner = nn.Linear(BRANCHES * WIDTH, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Logits, and the loss that spreads the samples over the branches (zero in "full")."""
        x = self.stem(x)
        if mode == "full":
            return self.combiner(torch.cat([branch(x) for branch in self.experts.branches], 1)), x.new_zeros(
                ()
            )
        routing = self.gate(x.mean((2, 3)))
        if mode == "dynamic":
            features = self.experts(x, routing.index, routing.weight)
        else:
            weight = torch.zeros_like(routing.probs).scatter(1, routing.index, routing.weight)  # [N, E]
            features = torch.stack([branch(x) for branch in self.experts.branches], 1) * weight[..., None]
            features = features.flatten(1)
        return self.combiner(features), load_balance_loss(routing.probs, routing.index)


def build() -> nn.Module:
    return HydraNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form, so that the norms' statistics are those of all samples."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, balance = model(x, "dense")
        return F.cross_entropy(logits, y) + 0.01 * balance

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
