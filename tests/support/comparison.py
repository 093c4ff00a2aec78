"""Comparison in the relative Euclidean norm, and norms whose every parameter counts."""

import torch
from torch import Tensor, nn

from dynops.testing import random_tensor


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """The default is for float64."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= tolerance * max(expected.norm().item(), 1e-30)


def same_up_to_rounding(actual, expected) -> None:
    """Tensors of float64, or sequences of them, value by value."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def close_gradients(actual: Tensor, expected: Tensor, inputs, tolerance: float = 1e-12) -> None:
    """Both have the same gradients with respect to ``inputs``, by one upstream gradient."""
    dy = random_tensor(*expected.shape, dtype=expected.dtype)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (actual, expected)), strict=True):
        close(a, b, tolerance)


def randomised(module: nn.Module) -> nn.Module:
    """Gives norms statistics and affine parameters that are not the initial ones."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight, m.bias, m.running_mean):
                if tensor is not None:
                    tensor.data.normal_()
            if m.running_var is not None:
                m.running_var.uniform_(0.5, 2)
    return module
