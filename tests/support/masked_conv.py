"""A 3x3 convolution at a mask, and the dense one that it is compared with."""

import torch
import torch.nn.functional as F
from torch import nn

from dynops import PixelPlan, ops
from dynops.kept import Mark
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


def unseen(weight: torch.Tensor) -> int:
    """An element of a contiguous weight that the fingerprint does not read."""
    flat, mark = weight.data.view(-1), Mark(weight)
    for i in range(16, weight.numel(), 16):
        flat[i] += 1
        seen = not mark.holds(weight)
        flat[i] -= 1
        if not seen and mark.holds(weight):
            return i
    raise AssertionError("every line is read")


class Net(nn.Module):
    """A weight and what the op makes of it, checked against the dense layer at every call."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        x, weight, bias, self.mask = inputs(dtype=dtype)
        self.x, self.plan = x, PixelPlan.from_mask(self.mask)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def check(self):
        with torch.no_grad():
            for weight in (self.weight, self.weight[8:16]):
                x, bias = self.x.to(weight.dtype), self.bias[: len(weight)]
                out = ops.sparse_conv2d(x, weight, bias, self.plan, padding=1)
                assert_near(out, expected(x.double(), weight.double(), bias.double(), self.mask))


def in_place(net):
    with torch.no_grad():
        net.weight.mul_(3)
