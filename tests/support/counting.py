"""A block, its MACs and a counter, for tests of counting."""

import torch
from torch import nn

from dynops.budget import MacCounter

BLOCK = 16 * 9 * 4 * 4  # MACs of block() for one sample


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 4, 4)


def count(model: nn.Module, *args, **kwargs) -> MacCounter:
    with MacCounter(model) as macs:
        model(*args, **kwargs)
    return macs


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
