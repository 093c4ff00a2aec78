"""One call of every layer: how it is made and what it gets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dynops
from dynops import nn as dnn
from dynops.testing import random_mask, random_tensor

N, C, H, W = 4, 16, 12, 10


CONV_ARGUMENTS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (2, 5), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 0), "groups": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
]


class Layer(NamedTuple):
    """``module(*inputs)``; ``whole``: torch.compile takes it without a graph break."""

    module: nn.Module
    inputs: tuple
    whole: bool = True


def x(channels: int = C, n: int = N) -> Tensor:
    return random_tensor(n, channels, H, W).to(memory_format=torch.channels_last)


def mask(density: float = 0.3) -> Tensor:
    return random_mask((N, H, W), density)


class Converted(nn.Module):
    """A small residual network under :func:`dynops.convert_`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU())
        self.first, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.second, self.pool = nn.Conv2d(C, C, 1), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(C, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(self.pool(x).flatten(1))


class Active(nn.Module):
    """A converted model with the context around it."""

    def __init__(self, block_size=None):
        super().__init__()
        self.model, self.block_size = Converted().eval(), block_size
        dynops.convert_(self.model)

    def forward(self, x, mask):
        with dynops.active(mask, self.block_size):
            return self.model(x)


class Halt(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, 1)

    def forward(self, state):
        return torch.sigmoid(self.linear(state)).squeeze(-1)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, state, n):
        return torch.tanh(self.linear(state) + 0.1 * n)


def conv(**options) -> dict:
    return {"kernel_size": 3, "padding": 1, **options}


def chain() -> nn.Module:
    return dnn.SparseSequential(
        nn.Conv2d(C, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, **conv(groups=32)),
        nn.Conv2d(32, C, 1),
    )


def stack() -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, **conv()), nn.ReLU(), nn.Conv2d(C, C, **conv()))


def exits(**options) -> nn.Module:
    stages = [nn.Sequential(nn.Conv2d(C, C, **conv()), nn.ReLU()) for _ in range(2)]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5)) for _ in range(2)]
    return dnn.EarlyExit(stages, heads, dnn.MaxSoftmax(0.3), **options)


def halting_pixels(**options) -> nn.Module:
    units = [dnn.SparseSequential(nn.Conv2d(C, C, **conv()), nn.ReLU()) for _ in range(3)]
    halts = [nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid()) for _ in range(2)]
    return dnn.SpatialHalting(units, halts, **options)


def tokens() -> nn.Module:
    stages = [dnn.TokenEncoderLayer(C, 2, 24, batch_first=True) for _ in range(2)]
    return dnn.TokenExit(stages, [nn.Linear(C, 5) for _ in range(2)], dnn.MaxSoftmax(0.3))


def channels(n: int = N) -> Tensor:
    return torch.rand(n, C) < 0.6


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 4, (tokens, 2)), torch.rand(tokens, 2)


LAYERS: dict[str, Callable[[], Layer]] = {
    "SparseConv2d": lambda: Layer(dnn.SparseConv2d(C, 32, **conv()), (x(), mask())),
    "SparseConvTranspose2d": lambda: Layer(dnn.SparseConvTranspose2d(C, 8, 3, padding=1), (x(), mask())),
    "SparseSequential": lambda: Layer(chain(), (x(), mask())),
    "SparseBlocks": lambda: Layer(dnn.SparseBlocks(stack(), 4), (x(), mask(0.03))),
    "ChannelConv2d": lambda: Layer(dnn.ChannelConv2d(C, C, **conv()), (x(), channels(), channels())),
    "ChannelLinear": lambda: Layer(dnn.ChannelLinear(C, C), (random_tensor(N, 5, C), channels(), channels())),
    "SlimmableConv2d": lambda: Layer(dnn.SlimmableConv2d([8, C], [12, 24], 3, padding=1), (x(8), 0)),
    "CondConv2d": lambda: Layer(dnn.CondConv2d(C, 24, 3, padding=1, routing=True), (x(),)),
    "DynamicConv2d": lambda: Layer(dnn.DynamicConv2d(C, 24, 3, padding=1), (x(),)),
    "ChannelGatedConv2d": lambda: Layer(dnn.ChannelGatedConv2d(C, 24, 3, padding=1), (x(),)),
    "GroupedDynamicConv2d": lambda: Layer(dnn.GroupedDynamicConv2d(C, 24, 3, padding=1), (x(),)),
    "Experts": lambda: Layer(dnn.Experts(4, C, 24), (random_tensor(30, C), *routed(30))),
    "MoE": lambda: Layer(dnn.MoE.from_sizes(C, 24, 4, 2, shared_intermediate=16), (random_tensor(30, C),)),
    "ConvExperts": lambda: Layer(dnn.ConvExperts([stack() for _ in range(4)]), (x(), *routed(N)), False),
    "Skip": lambda: Layer(dnn.Skip(stack()), (x(), torch.arange(N) % 2 == 0), False),
    "Skip with a capacity": lambda: Layer(
        dnn.Skip(stack(), max_fraction=0.5), (x(), torch.arange(N) % 2 == 0)
    ),
    "Skip, dense": lambda: Layer(dnn.Skip(stack(), dense=True), (x(), torch.rand(N))),
    "EarlyExit": lambda: Layer(exits(), (x(),), False),
    "EarlyExit, all": lambda: Layer(exits(), (x(), True)),
    "Halting": lambda: Layer(dnn.Halting(Step(), Halt(), 3), (random_tensor(N, C),), False),
    "Halting, dense": lambda: Layer(dnn.Halting(Step(), Halt(), 3, dense=True), (random_tensor(N, C),)),
    "SpatialHalting": lambda: Layer(halting_pixels(), (x(),), False),
    "SpatialHalting, dense": lambda: Layer(halting_pixels(dense=True), (x(),)),
    "TokenExit": lambda: Layer(tokens(), (random_tensor(N, 6, C),), False),
    "TokenExit, all": lambda: Layer(tokens(), (random_tensor(N, 6, C), None, None, True)),
    "SkimRNN, dense": lambda: Layer(dnn.SkimRNN(C, 12, 4, dense=True), (random_tensor(6, N, C),)),
    "SkipRNN": lambda: Layer(dnn.SkipRNN(C, 12), (random_tensor(N, 6, C),), False),
    "convert_": lambda: Layer(Active(), (x(), mask(0.05))),
    "convert_ in blocks": lambda: Layer(Active((4, 2)), (x(), mask(0.02))),
}


def layer_of(name: str) -> Layer:
    """In eval mode, with statistics in its norms."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for module in layer.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return layer._replace(module=layer.module.eval())
