"""FBS: each sample computes the channels that matter for it, boosted by their saliency (Gao et al., ICLR 2019).

A layer's kept output channels are the next layer's kept input channels, so that the work falls with the square of the
share that is kept. The saliency takes the place of the norm's scale.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dynops import ChannelPlan
from dynops.gates import ChannelGate
from dynops.nn import ChannelConv2d

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 300
WIDTHS, KEEP = (64, 64, 128, 128), 0.5


class Layer(nn.Module):
    """relu(saliency * norm(conv(x))) at the most salient half of the output channels."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.gate = ChannelGate(channels, out, KEEP)
        self.conv = ChannelConv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def full(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map, and the saliency ``[N, O]`` of all channels."""
        kept, saliency = self.gate(x)  # kept: the saliency, zero where it is not among the largest
        return F.relu(kept[:, :, None, None] * self.norm(self.conv(x))), saliency

    def dynamic(self, x: Tensor, live: ChannelPlan | None) -> tuple[Tensor, ChannelPlan]:
        """The map, and the plan of its channels; ``live`` are those of ``x``."""
        kept = self.gate(x).mask
        plan = ChannelPlan.from_mask(kept)
        return self.conv(x, live, plan, scale=kept, norm=self.norm, activation="relu"), plan


class FBSNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.layers = nn.ModuleList(Layer(c, o, stride=o // c) for c, o in pairwise(WIDTHS))
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense-masked: logits, and the mean saliency, which a loss keeps small."""
        x, total = F.relu(self.stem(x)), 0.0
        for layer in self.layers:
            x, saliency = layer.dense(x)
            total = total + saliency.mean()
        return self.head(x.mean((2, 3))), total


def build() -> nn.Module:
    return FBSNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, saliency = model(x)
        return F.cross_entropy(logits, y) + 1e-4 * saliency

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    if mode == "dense":
        return model(x)[0]
    x, live = F.relu(model.stem(x)), None
    for layer in model.layers:
        if mode == "full":
            x = layer.full(x)
        else:
            x, live = layer.dynamic(x, live)
    return model.head(x.mean((2, 3)))


if __name__ == "__main__":
    main(__name__)
