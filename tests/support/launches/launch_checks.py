"""Comparison of launches with the reference, whose sums of gradients are made in the dtype of the dense layer."""

import contextlib

import pytest
import torch
from torch import Tensor

from dynops.ops import dense_conv
from dynops.ops.channels import conv as channels
from dynops.ops.pixels import conv as pixels
from dynops.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _torch_weight_grad(grad: Tensor, x: Tensor, weight_shape: list[int], g) -> Tensor:
    return dense_conv.dense_conv_grads(grad, x, grad.new_empty(weight_shape), g, [False, True])[
        1
    ].contiguous()


@contextlib.contextmanager
def torch_weight_grads():
    """Inside it the references of pixels and channels sum dW and db as the dense layer does."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pixels, channels):
            patch.setattr(module, "dense_weight_grad", _torch_weight_grad)
            patch.setattr(module, "dense_bias_grad", lambda grad: grad.sum((0, 2, 3)))
        yield


def check(method, kernel, plain, **changes):
    """``method`` with the kernel, against the reference in float64 and in the same dtype."""
    with torch_weight_grads():
        dense = method(plain, **changes)
    results = method(kernel, **changes), method(plain, True, **changes), dense
    for value in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert_within_budget(*value)


def check_all(inputs, kernels, plain, **changes) -> None:
    """A convolution, with ``changes``, and its two gradients."""
    check(inputs.conv, kernels.conv, plain._conv, **changes)
    check(inputs.input_grad, kernels.conv_input_grad, plain._conv_input_grad)
    check(inputs.weight_grad, kernels.conv_weight_grad, plain._conv_weight_grad)


def check_named_backends(call, tensors) -> None:
    """``call(*leaves, backend=...)``, with and without gradients, and the gradients: those of the reference."""
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = call(*leaves, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        with torch.no_grad():
            results.append([out, call(*leaves, backend=backend), *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def of_cases(cases, half, slow=()):
    """Each case in float32, and those named in ``half`` in half precision; ``slow``: dtypes that are marked so."""
    examples = [(name, dtype) for dtype in DTYPES for name in (cases if dtype == torch.float32 else half)]
    marks = {dtype: [pytest.mark.slow] if dtype in slow else [] for dtype in DTYPES}
    each = [pytest.param(n, d, id=f"{n}-{str(d)[6:]}", marks=marks[d]) for n, d in examples]
    return pytest.mark.parametrize("name,dtype", each)
