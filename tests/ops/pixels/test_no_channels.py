"""Convolutions without input channels: their sums are empty."""

import torch

from dynops import PixelPlan
from dynops.ops import sparse_conv2d


def test_outputs_are_the_bias():
    x, weight, bias = torch.randn(2, 0, 3, 3), torch.randn(4, 0, 1, 1), torch.randn(4)
    mask = torch.rand(2, 3, 3) < 0.5
    out = sparse_conv2d(x, weight, bias, PixelPlan.from_mask(mask), backend="cpp")
    assert torch.equal(out, torch.where(mask[:, None], bias.view(-1, 1, 1), 0))
