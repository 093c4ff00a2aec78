"""Convolutions with a weight for each sample, mixed from several kernels: CondConv and dynamic convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import pair
from ...ops import mixed_conv2d
from ..from_dense import conv_options


class CondConv2d(nn.Module):
    """Convolution whose weight is, for each sample, a sum of E kernels with routing weights.

    The constructor, parameters and ``state_dict`` are those of timm's ``CondConv2d``: ``weight``
    ``[E, O * C/groups * kh * kw]`` and ``bias`` ``[E, O]``.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in ``nn.Conv2d``.
        padding: int or pair; "" for the symmetric padding that keeps the size at stride 1, "same" for TensorFlow's, which
            follows the input's size, "valid" for none.
        num_experts: E.
        routing: whether the layer has a router of its own, ``routing_fn``: a linear layer on the mean of each input
            channel, then a sigmoid.

    Shape:
        - x: ``[N, C, H, W]``, either memory format, which the output has too.
        - routing_weights: ``[N, E]``; None with ``routing=True``.
        - output: ``[N, O, out_H, out_W]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Yang et al., CondConv (NeurIPS 2019).
    """

    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = "",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        *,
        routing: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
        self.dilation, self.num_experts = pair(dilation, "dilation", 1), num_experts
        self.padding, self.dynamic_padding = self._padding(padding)
        _divides(groups, in_channels, out_channels)
        factory = {"device": device, "dtype": dtype}
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(num_experts, math.prod(self.weight_shape), **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels, **factory)) if bias else None
        if routing:
            self.routing_fn = nn.Linear(in_channels, num_experts, **factory)
        else:
            self.routing_fn = None
        self.reset_parameters()

    def _padding(self, padding) -> tuple[tuple[int, int], bool]:
        """The symmetric padding, and whether TensorFlow's, which depends on the input's size, comes before it."""
        if padding is not None and not isinstance(padding, str):
            return pair(padding, "padding", 0), False
        kind = "" if padding is None else padding.lower()
        if kind not in ("", "same", "valid"):
            raise ValueError(f"padding: expected ints, '', 'same' or 'valid', got {padding!r}")
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if kind == "valid":
            return (0, 0), False
        if kind == "same" and (self.stride != (1, 1) or any(r % 2 for r in reach)):
            return (0, 0), True
        return tuple((s - 1 + r) // 2 for s, r in zip(self.stride, reach, strict=True)), False

    def reset_parameters(self) -> None:
        """Each kernel as ``nn.Conv2d`` has its weight and bias."""
        bound = 1 / math.sqrt(max(math.prod(self.weight_shape[1:]), 1))
        for i in range(self.num_experts):
            nn.init.kaiming_uniform_(self.weight[i].view(self.weight_shape), a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        if (routing_weights is None) == (self.routing_fn is None):
            expected = "[N, E]" if self.routing_fn is None else "None, as the layer has a router of its own"
            raise ValueError(f"routing_weights: expected {expected}, got {type(routing_weights).__name__}")
        if self.routing_fn is not None:
            routing_weights = torch.sigmoid(self.routing_fn(x.mean((2, 3))))
        if self.dynamic_padding:
            x = self._pad_same(x)
        return mixed_conv2d(
            x,
            self.weight.view(-1, *self.weight_shape),
            routing_weights,
            self.bias,
            **conv_options(self),
        )

    def _pad_same(self, x: Tensor) -> Tensor:
        pads = []
        for i in (1, 0):  # F.pad takes the last dimension first
            size, stride = x.shape[2 + i], self.stride[i]
            reach = self.dilation[i] * (self.kernel_size[i] - 1)
            total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={'same' if self.dynamic_padding else self.padding}, num_experts={self.num_experts}"
        )


class KernelAttention(nn.Module):
    """The softmax attention ``[N, K]`` of :class:`DynamicConv2d`: mean of each channel, fc1, relu, fc2, temperature."""

    def __init__(self, in_planes: int, ratio: float, K: int, temperature: float, device=None, dtype=None):
        super().__init__()
        hidden = K if in_planes == 3 else int(in_planes * ratio) + 1
        self.fc1 = nn.Conv2d(in_planes, hidden, 1, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, K, 1, device=device, dtype=dtype)
        self.temperature = temperature

    def reset_parameters(self) -> None:
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return F.softmax(self.fc2(hidden).flatten(1) / self.temperature, 1)


class DynamicConv2d(nn.Module):
    """Convolution whose weight is, for each sample, a mean of K kernels with softmax attention.

    The constructor, parameters and ``state_dict`` are those of the published ``Dynamic_conv2d``: ``weight``
    ``[K, O, C/groups, kh, kw]``, ``bias`` ``[K, O]``, ``attention.fc1``, ``attention.fc2``.

    Args:
        in_planes, out_planes: C and O.
        ratio: hidden channels of the attention, ``int(C * ratio) + 1`` (K where C is 3).
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in ``nn.Conv2d``.
        K: kernels.
        temperature: of the softmax, at least 1; :meth:`update_temperature` takes 3 from it, once an epoch, down to 1.
        init_weight: Kaiming's initialisation (else that of PyTorch's layers and a normal distribution).

    Shape:
        - x: ``[N, C, H, W]``, either memory format, which the output has too.
        - output: ``[N, O, out_H, out_W]``.

    Paper: Chen et al., Dynamic Convolution: Attention over Convolution Kernels (CVPR 2020).
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_size: int | tuple[int, int],
        ratio: float = 0.25,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        K: int = 4,
        temperature: float = 34,
        init_weight: bool = True,
        *,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not temperature >= 1:
            raise ValueError(f"temperature: expected at least 1, got {temperature!r}")
        _divides(groups, in_planes, out_planes)
        self.in_planes, self.out_planes, self.groups, self.K = in_planes, out_planes, groups, K
        self.kernel_size, self.stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
        self.padding, self.dilation, self.padding_mode = padding, pair(dilation, "dilation", 1), padding_mode
        factory = {"device": device, "dtype": dtype}
        self.attention = KernelAttention(in_planes, ratio, K, temperature, **factory)
        shape = (K, out_planes, in_planes // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.randn(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(K, out_planes, **factory)) if bias else None
        if init_weight:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's initialisation of each kernel and of the attention."""
        self.attention.reset_parameters()
        for i in range(self.K):
            nn.init.kaiming_uniform_(self.weight[i])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def update_temperature(self) -> None:
        """The next, lower temperature."""
        self.attention.temperature = max(self.attention.temperature - 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return mixed_conv2d(
            x,
            self.weight,
            self.attention(x),
            self.bias,
            **conv_options(self),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_planes}, {self.out_planes}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, K={self.K}, temperature={self.attention.temperature}"
        )


def _divides(groups: int, inputs: int, outputs: int) -> None:
    if groups < 1 or inputs % groups or outputs % groups:
        raise ValueError(
            f"groups: expected a divisor of the {inputs} input and {outputs} output channels, got {groups}"
        )
