"""Comparison in the relative Euclidean norm, and norms whose every parameter counts."""

from torch import Tensor, nn


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """The default is for float64."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= tolerance * max(expected.norm().item(), 1e-30)


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
