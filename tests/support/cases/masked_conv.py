"""A 3x3 convolution at a mask, and the dense one that it is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dynops.testing import in_layout, random_mask, random_tensor


def inputs(n=2, c=16, o=24, size=14, density=0.4, dtype=torch.float32):
    x = in_layout(random_tensor(n, c, size, size, dtype=dtype), "channels_last")
    mask = random_mask((n, size, size), density)
    return x, random_tensor(o, c, 3, 3, dtype=dtype), random_tensor(o, dtype=dtype), mask


def expected(x, weight, bias, mask):
    return F.conv2d(x, weight, bias, padding=1) * mask[:, None]


def assert_near(actual, exact):
    error = (actual.double() - exact.double()).norm() / exact.double().norm()
    assert error < 8 * torch.finfo(actual.dtype).eps, f"relative error {error:.2e}"
