"""CondConv2d against the grouped convolution of the published code."""

import math

import pytest
import torch
import torch.nn.functional as F
from channel_layers import OUT, C, N, double, grouped_trick
from comparison import close, close_gradients

from dynops.nn import (
    CondConv2d,
)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kernel_size": 5, "stride": 2, "bias": True, "num_experts": 8},
        {"kernel_size": (3, 1), "padding": (1, 0), "groups": 2},
        {"kernel_size": 3, "padding": "valid", "dilation": 2, "bias": True},
    ],
    ids=str,
)
def test_condconv(arguments):
    layer = CondConv2d(C, OUT, **arguments).double()
    experts, groups = layer.num_experts, layer.groups
    shape = (OUT, C // groups, *layer.kernel_size)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": (experts, math.prod(shape)),
        **({"bias": (experts, OUT)} if arguments.get("bias") else {}),
    }
    x, routing = double(N, C, 11, 10).requires_grad_(), torch.rand(N, experts).double().requires_grad_()
    padding = arguments.get("padding", tuple((s - 1 + k - 1) // 2 for s, k in zip(layer.stride, layer.kernel_size, strict=True)))  # fmt: skip
    weight, bias = (
        (routing @ layer.weight).view(N, *shape),
        None if layer.bias is None else routing @ layer.bias,
    )
    options = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": groups}
    expected = grouped_trick(x, weight, bias, **options)
    out = layer(x, routing)
    close(out, expected)
    close_gradients(out, expected, [x, routing, *layer.parameters()], 1e-10)


@pytest.mark.parametrize(
    "kernel, stride, dilation", [(3, 1, 1), (3, 2, 1), (2, 1, 1), (5, (3, 2), 1), (4, 1, 3)]
)
def test_condconv_same_padding(kernel, stride, dilation):
    layer = CondConv2d(C, OUT, kernel, stride, "same", dilation, num_experts=1).double()
    x, routing = double(2, C, 10, 13), torch.ones(2, 1, dtype=torch.float64)
    steps = layer.stride
    size = [
        -(-s // step) for s, step in zip(x.shape[2:], steps, strict=True)
    ]  # TensorFlow's: ceil(in / stride)
    total = [max((o - 1) * s + dilation * (kernel - 1) + 1 - i, 0) for o, s, i in zip(size, steps, x.shape[2:], strict=True)]  # fmt: skip
    padded = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    out = layer(x, routing)
    assert list(out.shape[2:]) == size
    close(out, F.conv2d(padded, layer.weight.view(layer.weight_shape), None, steps, 0, dilation))


def test_condconv_routes_itself():
    layer = CondConv2d(C, OUT, 3, num_experts=5, routing=True).double()
    x = double(N, C, 6, 6)
    routing = torch.sigmoid(F.linear(x.mean((2, 3)), layer.routing_fn.weight, layer.routing_fn.bias))
    other = CondConv2d(C, OUT, 3, num_experts=5).double()
    other.load_state_dict({"weight": layer.weight})
    close(layer(x), other(x, routing))
    with pytest.raises(ValueError, match="routing_weights: expected None"):
        layer(x, routing)
    with pytest.raises(ValueError, match=r"routing_weights: expected \[N, E\]"):
        other(x)
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        CondConv2d(C, OUT, groups=3)
    with pytest.raises(ValueError, match="padding: expected ints"):
        CondConv2d(C, OUT, padding="full")
