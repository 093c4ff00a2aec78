"""Every op on tensors that lie in memory in ways of their own."""

import pytest
import torch
from contract_cases import NAMES, samples_on
from torch import Tensor

D = torch.ops.dynops
of_every_op = pytest.mark.parametrize("name", NAMES)


def spaced(t: Tensor) -> Tensor:
    """Every other element of a larger tensor of NaN."""
    wide = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
    return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def turned(t: Tensor) -> Tensor:
    """The first dimension innermost."""
    return t.permute(*range(1, t.dim()), 0).contiguous().permute(-1, *range(t.dim() - 1))


def sliced(t: Tensor) -> Tensor:
    """The end of each dimension of a larger tensor, at an address of no alignment."""
    wide = torch.full([size + 1 for size in t.shape], float("nan"), dtype=t.dtype)
    return wide[tuple(slice(1, None) for _ in t.shape)].copy_(t)


def results(name: str, arguments) -> tuple:
    out = getattr(D, name)(*arguments)
    return (out,) if isinstance(out, Tensor) else tuple(out)


@of_every_op
@pytest.mark.parametrize("view", [spaced, turned, sliced])
def test_any_strides(name, view):
    for arguments in samples_on("cpu")[name]:
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        others = [view(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        for actual, expected in zip(results(name, others), results(name, arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@of_every_op
def test_an_expanded_gradient(name):
    """``out.sum().backward()`` sends one whose strides are all zero."""
    for arguments in samples_on("cpu")[name]:
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        if leaves:
            outs = [results(name, arguments)[0] for _ in range(2)]
            losses = outs[0].sum(), (outs[1] * torch.ones_like(outs[1])).sum()
            grads = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
