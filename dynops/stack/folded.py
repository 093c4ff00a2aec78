"""A traced stack on whole maps, for inference: each norm is part of the weights of the convolution before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..kept import kept
from .layers import Conv, finish
from .norm import fold


def folds(stack) -> bool:
    """Whether every layer of a :class:`~dynops.stack.graph.Stack` can run so."""
    return all(layer.rows and not getattr(layer, "transposed", False) for layer in stack.layers)


def run_folded(stack, x: Tensor) -> Tensor:
    """The stack's output for ``x`` [N, C, H, W]; no gradients. A norm of its own costs a pass over the map: two of
    52 us where the convolution between takes 380 (16 x 16 channels of 32 x 32)."""
    values = {0: x}
    for layer in stack.layers:
        inputs = [values[value] for value in layer.inputs]
        if isinstance(layer, Conv):
            weight, bias = _folded(layer)
            conv = layer.conv
            y = F.conv2d(inputs[0], weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            if (
                bias is not None
            ):  # oneDNN's AVX2 kernels begin their sums with it: 1.4 times as far from the exact one
                y += bias.view(-1, 1, 1)
            values[layer.out] = finish(y, inputs[1] if layer.residual else None, layer.activation)
        else:
            values[layer.out] = layer.tiles(inputs, None, None)
    return values[stack.output]


def _folded(layer: Conv) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight and bias with its norm, kept until one of them changes."""
    weight, bias = layer.conv.weight, layer.conv.bias
    if layer.norm is None:
        return weight, bias
    scale, shift = fold(layer.norm)

    def make() -> tuple[Tensor, Tensor]:
        moved = shift if bias is None else shift + bias * scale
        return weight * scale.to(weight.dtype).view(-1, 1, 1, 1), moved.to(weight.dtype)

    return kept.get("folded", make, weight, bias, scale, shift)
