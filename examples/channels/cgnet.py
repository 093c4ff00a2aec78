"""CGNet: a quarter of the input channels is read everywhere, the rest where it matters (Hua et al., NeurIPS 2019).

The sum over the first channels, normalised, has to pass a learned threshold; each output of each channel decides for
itself. A loss pulls the thresholds to their target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops import budget
from dynops.nn import ChannelGatedConv2d

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 200
WIDTH, PARTS, TARGET = 64, 4, 1.5


class Layer(nn.Module):
    """A channel-gated convolution, norm and relu."""

    def __init__(self):
        super().__init__()
        self.conv = ChannelGatedConv2d(WIDTH, WIDTH, 3, padding=1, p=PARTS, th=0.0)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        run = {"dynamic": self.conv, "dense": self.dense, "full": self.full}[mode]
        return F.relu(self.norm(run(x)))

    def full(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, None, padding=1)

    def dense(self, x: Tensor) -> Tensor:
        first = self.conv.base_channels
        partial = F.conv2d(x[:, :first], self.conv.weight[:, :first], padding=1)
        rest = F.conv2d(x[:, first:], self.conv.weight[:, first:], padding=1)
        return partial + (self.conv.bn(partial) > self.conv.threshold) * rest


class CGNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        x = F.relu(self.stem(x))
        for i, layer in enumerate(self.layers):
            x = layer(F.max_pool2d(x, 2) if i == 2 else x, mode)
        return self.head(x.mean((2, 3)))


def build() -> nn.Module:
    return CGNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains with dynops' layer, which then computes the rest everywhere: its surrogate gradient needs it."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        thresholds = budget.threshold_target_loss(model, TARGET)
        return F.cross_entropy(model(x, "dynamic"), y) + 1e-2 * thresholds

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)


if __name__ == "__main__":
    main(__name__)
