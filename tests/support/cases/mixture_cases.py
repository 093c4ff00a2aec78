"""Sizes, choices and parameters for tests of mixtures of experts."""

import math

import torch
from torch import nn

from dynops.testing import random_tensor

E, H, M, T, K = 5, 12, 7, 9, 2  # experts, hidden, intermediate, tokens, choices


def randomised(module: nn.Module) -> nn.Module:
    """The same module with unit-scale values: a small one would hide a wrong term."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(random_tensor(*parameter.shape) * (2 / math.sqrt(fan) if fan > 1 else 1))
    return module


def routed(tokens: int = T, choices: int = K, dropped: bool = True):
    """An index with dropped pairs, and weights."""
    index = torch.stack([torch.randperm(E + dropped)[:choices] for _ in range(tokens)]) if tokens else None
    index = torch.zeros(0, choices, dtype=torch.int64) if index is None else index
    return index, torch.rand(tokens, choices) + 0.5
