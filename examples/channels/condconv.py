"""CondConv: each sample has a convolution of its own, a mixture of a few kernels (Yang et al., NeurIPS 2019).

By linearity the mixture of E convolutions' outputs is one convolution with the mixture of their kernels. The network it
is compared with computes the E outputs (as one convolution of E * O channels) and mixes them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import CondConv2d

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 400
EXPERTS, WIDTHS = 4, (32, 64, 64)


class Layer(nn.Module):
    """A conditional convolution with its router, norm and relu."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv = CondConv2d(channels, out, 3, stride, padding=1, num_experts=EXPERTS, routing=True)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        return F.relu(self.norm(self.conv(x) if mode == "dynamic" else self.dense(x)))

    def dense(self, x: Tensor) -> Tensor:
        """The E convolutions as one, then the weighted sum of its parts."""
        conv = self.conv
        mix = torch.sigmoid(conv.routing_fn(x.mean((2, 3))))  # [N, E]
        weight = conv.weight.view(-1, *conv.weight_shape[1:])  # [E * O, C, 3, 3]
        if x.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        outs = F.conv2d(x, weight, None, conv.stride, conv.padding)
        return (outs.unflatten(1, (EXPERTS, -1)) * mix[:, :, None, None, None]).sum(1)


class CondNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.layers = nn.ModuleList(Layer(c, o, stride=2) for c, o in pairwise(WIDTHS))
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x, mode)
        return self.head(x.mean((2, 3)))


def build() -> nn.Module:
    return CondNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains with dynops' layers, whose gradients are those of the dense form."""
    fit(model, data.train, lambda x, y, _: F.cross_entropy(model(x, "dynamic"), y), length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)  # "full" is "dense": there is nothing to open


if __name__ == "__main__":
    main(__name__)
