"""Networks with exits, and every exit computed for every sample with the choice made afterwards."""

import torch
from torch import Tensor, nn

from dynops.nn.samples.exits import EarlyExit
from dynops.testing import random_tensor

CLASSES, EXITS = 5, 3


class Scale(nn.Module):
    """A product and a sum for each value: the same bits in any batch."""

    def __init__(self, channels: int, seen: list | None = None):
        super().__init__()
        self.weight = nn.Parameter(random_tensor(channels, 1, 1))
        self.bias = nn.Parameter(random_tensor(channels, 1, 1))
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(x)
        return x * self.weight + self.bias


class Pick(nn.Module):
    """Logits: the first values of a sample, as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES] * 4


def pick_model(criterion, seen: list | None = None, exits: int = EXITS, **options) -> EarlyExit:
    return EarlyExit(
        [Scale(3, seen) for _ in range(exits)], [Pick() for _ in range(exits)], criterion, **options
    ).eval()


class Calls(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def replay_model(criterion, exits: int, **options) -> EarlyExit:
    """On a state ``[n, E, ...]`` that holds the logits of all exits."""
    heads = [Calls(lambda state, e=e: state[:, e]) for e in range(exits)]
    return EarlyExit([nn.Identity()] * exits, heads, criterion, **options).eval()


def conv_model(criterion, exits: int = EXITS, norm: bool = False, **options) -> EarlyExit:
    torch.manual_seed(1)
    stages, heads = [], []
    for e in range(exits):
        parts = [nn.Conv2d(3 if e == 0 else 6, 6, 3, padding=1)] + [nn.BatchNorm2d(6)] * norm + [nn.ReLU()]
        stages.append(nn.Sequential(*parts))
        heads.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)))
    return EarlyExit(stages, heads, criterion, **options).double().eval()


@torch.no_grad()
def halve(model, x):
    """Thresholds at which half of the samples would leave at each exit, halfway between two confidences."""
    confidence = torch.stack(model(x, confidence=True).confidence)
    model.criterion.set_threshold(model.criterion.to_threshold(confidence.double().quantile(0.5, dim=1)))
    return model


def every_exit(model: EarlyExit, x) -> list[Tensor]:
    """All logits, from the modules alone."""
    logits = []
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x)
        logits.append(head(x))
    return logits


def choose(logits: list[Tensor], exits: Tensor) -> Tensor:
    return torch.stack(logits)[exits, torch.arange(len(exits))]


def first_exit(leaves: list[Tensor]) -> Tensor:
    """int64 ``[N]``: the first exit at which a sample leaves. ``leaves``: at all exits but the last."""
    asked = torch.stack([*leaves, torch.ones_like(leaves[0])])
    return asked.int().argmax(0)


class First(nn.Module):
    def forward(self, state):
        return state[0]
