"""The dense convolution of a geometry and its gradients, for references and the dense fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import ConvGeometry
from ..kernels.layout import in_format_of
from .epilogue import ACTIVATIONS


def dense_conv(x: Tensor, weight: Tensor, g: ConvGeometry, bias: Tensor | None = None) -> Tensor:
    """The convolution of every pixel, ``[N, O, out_h, out_w]``."""
    stride, dilation = (g.stride_h, g.stride_w), (g.dil_h, g.dil_w)
    left, right, top, bottom = g.margins
    if g.transposed:
        full = F.conv_transpose2d(x, weight, None, stride, 0, 0, g.groups, dilation)
        full = F.pad(full, (-left, -right, -top, -bottom))  # may add rows that only the bias reaches
        return full if bias is None else full + bias.view(-1, 1, 1)
    if 0 <= left - right < g.stride_w and 0 <= top - bottom < g.stride_h:  # equal paddings give this size
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, g.groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, g.groups)


def dense_conv_grads(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, wanted: list[bool]):
    """(dx, dW) of :func:`dense_conv`. Not by autograd, which is off where a dispatch mode calls an op."""
    stride, dilation = [g.stride_h, g.stride_w], [g.dil_h, g.dil_w]
    left, right, top, bottom = g.margins
    if g.transposed:
        grad = F.pad(grad, (left, right, top, bottom))
    else:
        x = F.pad(x, (left, right, top, bottom))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, [0, 0], dilation, bool(g.transposed), [0, 0], g.groups, [*wanted, False]
    )  # fmt: skip
    if wanted[0] and not g.transposed:
        dx = F.pad(dx, (-left, -right, -top, -bottom))
    return dx, dw


def dense_weight_grad(grad: Tensor, x: Tensor, weight_shape: list[int], g: ConvGeometry) -> Tensor:
    """dW of :func:`dense_conv`, summed in the next wider dtype.

    A map of another shape than the layer's has another order of sums: torch's own was up to 2.3 times as far from
    the exact one as the layer's.
    """
    wide = _wider(grad.dtype)
    weight = grad.new_empty(weight_shape, dtype=wide)  # its values are not read
    _, dw = dense_conv_grads(grad.to(wide), x.to(wide), weight, g, [False, True])
    return dw.to(grad.dtype).contiguous()


def dense_bias_grad(grad: Tensor) -> Tensor:
    """db ``[O]`` of :func:`dense_conv`, summed in the next wider dtype too."""
    return grad.sum((0, 2, 3), dtype=_wider(grad.dtype)).to(grad.dtype)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def dense_layer(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, activation: str) -> Tensor:
    """The dense layer itself, in the memory format of ``x``."""
    out = dense_conv(x, weight.to(x.dtype), g, None if bias is None else bias.to(x.dtype))
    # a channels_last weight turns an NCHW input's output into channels_last
    return in_format_of(ACTIVATIONS[activation](out), x)
