"""MSDNet: exits on the coarse scale of a densely connected network of two scales (Huang et al., ICLR 2018).

The state that shrinks as samples leave is a list of maps. The thresholds of the largest softmax probability are
fitted on validation images, so that the MACs of a sample are within a budget on average.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import EarlyExit, MaxSoftmax, fit_thresholds

from ..common import Digits, Length, fit
from ..measure import full_macs, main
from .early_exit import run  # noqa: F401

SIZE, STEPS = 16, 150
FINE, COARSE, GROWTH, EXITS = 16, 32, 12, 3
BUDGET = 0.5  # of the MACs of the whole network


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Stem(nn.Module):
    """The image at two scales."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = conv(1, FINE), conv(FINE, COARSE, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


class Layer(nn.Module):
    """Adds to each scale a convolution of itself, and to the coarse one also a convolution of the fine one."""

    def __init__(self, fine: int, coarse: int):
        super().__init__()
        self.fine, self.down = conv(fine, GROWTH), conv(fine, GROWTH, 2)
        self.coarse = conv(coarse, GROWTH)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fine, coarse = maps
        return [
            torch.cat([fine, self.fine(fine)], 1),
            torch.cat([coarse, self.coarse(coarse), self.down(fine)], 1),
        ]


class Head(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.linear = conv(channels, 32, 2), nn.Linear(32 * (SIZE // 4) ** 2, 10)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.linear(self.conv(maps[1]).flatten(1))


def build() -> nn.Module:
    widths = [(FINE + i * GROWTH, COARSE + 2 * i * GROWTH) for i in range(2 * EXITS + 1)]
    layers = [Layer(*width) for width in widths]
    stages = [nn.Sequential(Stem(), *layers[:2])]
    stages += [nn.Sequential(*layers[2 * i : 2 * i + 2]) for i in range(1, EXITS)]
    heads = [Head(widths[2 * i][1]) for i in range(1, EXITS + 1)]
    return EarlyExit(stages, heads, MaxSoftmax(1.0))


def first_exits(model: EarlyExit, x: Tensor, exits: int) -> list[Tensor]:
    """The logits of the first exits, to count their MACs."""
    state, logits = x, []
    for stage, head in zip(model.stages[:exits], model.heads[:exits], strict=True):
        state = stage(state)
        logits.append(head(state))
    return logits


def train(model: nn.Module, data: Digits, length: Length) -> None:
    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        return sum(F.cross_entropy(logits, y) for logits in model(x, all_exits=True))

    fit(model, data.train, loss, length)
    images, labels = data.valid
    costs = [full_macs(partial(first_exits, model, exits=n), images) for n in range(1, EXITS + 1)]
    with torch.inference_mode():
        logits = model(images, all_exits=True)
    fitted = fit_thresholds(logits, labels, BUDGET * costs[-1], costs)
    model.criterion.set_threshold(fitted.threshold)


if __name__ == "__main__":
    main(__name__)
