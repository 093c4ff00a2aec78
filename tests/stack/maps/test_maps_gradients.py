"""Gradients of maps through functions of autograd and through checkpoints."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dynops
from dynops.stack.maps import SparseMap, entered
from dynops.testing import MaskedPolicy

C, SIZE = 6, (8, 12)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT, SCALE, SHIFT = rand(C, C, 3, 3), rand(C), rand(C, seed=1)
MASK = rand(2, 4, 6, seed=2) < -0.3


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


PARTS = {
    "norm": lambda x: F.relu(F.batch_norm(x, SHIFT, SCALE.abs() + 1, SCALE, SHIFT)),
    "activation": lambda x: torch.relu(x).sigmoid(),
    "dense": lambda x: torch.sigmoid(x.flip(1)) * x,
    "convolution": lambda x: torch.sin(F.conv2d(x, WEIGHT, padding=1)),
}


def run(part):
    x, weight = rand(2, C, *SIZE).requires_grad_(), WEIGHT.clone().requires_grad_()
    with dynops.use_mask(MASK) as active, entered():
        active._used = True
        y = F.conv2d(SparseMap.of_input(x, active), weight, padding=1)
        y = F.conv2d(y, weight, padding=1)
        out = (part(y) * 2 + y).dense()
    out.square().sum().backward()
    return out, x.grad, weight.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_a_checkpoint_changes_nothing(name, reentrant):
    part = PARTS[name]
    for a, b in zip(run(lambda x: checkpoint(part, x, use_reentrant=reentrant)), run(part), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_flow_through_functions_of_autograd():
    for a, b in zip(run(lambda x: Swish.apply(x) + 1), run(lambda x: F.silu(x) + 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_hooks_of_gradients_are_called():
    seen, maps = [], []

    def part(x):
        y = F.conv2d(x, WEIGHT, padding=1)
        y.register_hook(seen.append)
        y.retain_grad()
        maps.append(y)
        return y * 3

    for a, b in zip(run(part), run(lambda x: F.conv2d(x, WEIGHT, padding=1) * 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(seen) == 1 and torch.equal(maps[0].grad, seen[0]) and seen[0].norm() > 0


def test_the_norm_of_a_samples_pixels():
    """Of two derivatives, and zero where all pixels are zero, as torch has it."""
    x, mask = rand(3, C, *SIZE).requires_grad_(), MASK[[0, 1, 0]]
    found = []
    for context in (dynops.use_mask(mask), MaskedPolicy(mask)):
        with context as active, entered() if active is not None else contextlib.nullcontext():
            y = F.conv2d(
                SparseMap.of_input(x, active) if isinstance(active, dynops.use_mask) else x, WEIGHT, padding=1
            )
            norm = (y * torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1)).norm(p=2, dim=(2, 3))
        (grad,) = torch.autograd.grad((norm * rand(3, C)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        found.append((norm, grad, second))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert a.isfinite().all() and a.abs().sum() > 0
        n = 2 if i == 2 else 3  # torch's second derivative at zero is NaN
        torch.testing.assert_close(a[:n], b[:n], rtol=1e-9, atol=1e-10)
