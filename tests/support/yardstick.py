"""The dense op's own gradients of weight and bias: the yardstick of kernels where the reference sums in a wider dtype."""

import contextlib

import pytest
from torch import Tensor

from dynops.ops import dense_conv
from dynops.ops.channels import conv as channels
from dynops.ops.pixels import conv as pixels


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
