"""The channel layers against dense layers, masks, and reconstructions of the published layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from channel_layers import OUT, C, N, at, double, masks
from comparison import close, close_gradients, randomised
from layer_cases import CONV_ARGUMENTS
from torch import nn

import dynops
from dynops import ChannelPlan
from dynops.kernels.layout import memory_format_of
from dynops.nn import (
    ChannelBatchNorm2d,
    ChannelConv2d,
    ChannelLinear,
)
from dynops.testing import assert_within_budget, random_tensor

CONVS = [*CONV_ARGUMENTS, {"kernel_size": 3, "padding": 1, "groups": 8}]


@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_conv_equals_masked_dense(arguments):
    dense = nn.Conv2d(C, OUT, **arguments).double()
    layer = ChannelConv2d.from_dense(dense)
    x = double(N, C, 9, 11)
    inputs, outputs = masks()
    assert torch.equal(layer(x), dense(x))
    expected = dense(x * at(inputs))
    close(layer(x, inputs), expected)
    close(layer(x, None, outputs), dense(x) * at(outputs))
    close(layer(x, ChannelPlan.from_mask(inputs), ChannelPlan.from_mask(outputs)), expected * at(outputs))
    scale, base = double(N, OUT), torch.randn_like(expected)
    out = layer(x, inputs, outputs, scale=scale, base=base, activation="relu")
    close(out, torch.where(at(outputs), F.relu(expected * at(scale)), base))
    close(layer(x, activation="silu"), F.silu(dense(x)))
    close(layer(x, scale=scale), dense(x) * at(scale))


def test_conv_gradients_reach_the_gate():
    layer, (inputs, outputs) = ChannelConv2d(C, OUT, 3, padding=1).double(), masks()
    x, scale = double(N, C, 5, 6).requires_grad_(), double(N, OUT).requires_grad_()
    out = layer(x, inputs, outputs, scale=scale, activation="relu")
    dense = F.relu(F.conv2d(x * at(inputs), layer.weight, layer.bias, padding=1) * at(scale)) * at(outputs)
    close_gradients(out, dense, (x, scale, layer.weight, layer.bias))


def test_conv_unbatched():
    layer, (inputs, outputs) = ChannelConv2d(C, OUT, 3, padding=1).double(), masks()
    x, scale, base = double(C, 6, 7), double(OUT), double(OUT, 6, 7)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    out = layer(x, inputs[0], outputs[0], scale=scale, base=base)
    conv = F.conv2d(x * inputs[0][:, None, None], layer.weight, layer.bias, padding=1)
    close(out, torch.where(outputs[0][:, None, None], conv * scale[:, None, None], base))


def test_conv_with_heads():
    layer = ChannelConv2d(C, OUT, 3, padding=1).double()
    x, mask = double(N, C, 6, 7), torch.rand(N, 4, C) < 0.5
    parts = layer.weight.chunk(4), layer.bias.chunk(4)
    expected = [F.conv2d(x * at(mask[:, h]), parts[0][h], parts[1][h], padding=1) for h in range(4)]
    close(layer(x, mask), torch.cat(expected, 1))


@pytest.mark.parametrize(
    "cls, dense", [(ChannelConv2d, nn.Conv2d(3, 4, 3)), (ChannelLinear, nn.Linear(3, 4))]
)
def test_from_dense_shares_everything(cls, dense):
    dense.eval()
    layer = cls.from_dense(dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias and not layer.training
    assert list(layer.state_dict()) == list(dense.state_dict()) and isinstance(layer, type(dense))
    cls(3, 4, **({"kernel_size": 3} if cls is ChannelConv2d else {})).load_state_dict(dense.state_dict())
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(made) is cls and torch.equal(made.weight, dense.weight)
    with pytest.raises(TypeError, match=r"layer: expected nn\.\w+, got ReLU"):
        cls.from_dense(nn.ReLU())


@pytest.mark.parametrize("shape", [(N, C), (N, 5, C), (N, 2, 3, C)], ids=str)
def test_linear_equals_masked_dense(shape):
    dense = nn.Linear(C, OUT).double()
    layer, (inputs, outputs) = ChannelLinear.from_dense(dense), masks()
    x, scale = double(*shape), double(N, OUT)
    rows = (slice(None), *[None] * (len(shape) - 2))
    expected = dense(x * inputs[rows])
    assert torch.equal(layer(x), dense(x))
    close(layer(x, inputs, outputs), expected * outputs[rows])
    base = torch.randn_like(expected)
    out = layer(x, inputs, outputs, scale=scale, base=base, activation="gelu")
    close(out, torch.where(outputs[rows], F.gelu(expected * scale[rows]), base))
    plan = ChannelPlan.from_mask(inputs)
    packed = torch.stack([dynops.ops.gather_channels(row, plan) for row in x.flatten(1, -2).unbind(1)], 1) if len(shape) > 2 else dynops.ops.gather_channels(x, plan)  # fmt: skip
    close(layer(packed.view(*shape[:-1], -1), plan, packed=True), expected)


def test_linear_unbatched():
    layer, (inputs, outputs) = ChannelLinear(C, OUT).double(), masks()
    x, scale = double(C), double(OUT)
    expected = F.linear(x * inputs[0], layer.weight, layer.bias)
    close(layer(x, inputs[0]), expected)
    close(layer(x, inputs[0], outputs[0], scale=scale), expected * scale * outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_formats(dtype):
    layer = ChannelConv2d(32, 48, 3, padding=1).to(dtype)
    norm = randomised(nn.BatchNorm2d(48)).eval().to(dtype)
    (inputs, outputs), scale = masks(2, 32, 48), random_tensor(2, 48, dtype=dtype)
    x = random_tensor(2, 32, 9, 9, dtype=dtype).to(memory_format=torch.channels_last)

    def dense(kind):
        y = copy.deepcopy(norm).to(kind)(
            copy.deepcopy(nn.Module.to(layer, dtype)).to(kind)((x * at(inputs)).to(kind))
        )
        return F.relu(y * at(scale).to(kind)) * at(outputs)

    with torch.no_grad():
        for source in (x, x.contiguous()):
            out = layer(source, inputs, outputs, norm=norm, scale=scale, activation="relu")
            assert_within_budget(out, dense(torch.float64), dense(dtype))
            assert out.stride() == torch.empty_like(out, memory_format=memory_format_of(source)).stride()


def test_conv_refuses():
    layer, (inputs, outputs) = ChannelConv2d(C, OUT, 3), masks()
    x = random_tensor(N, C, 6, 6)
    with pytest.raises(TypeError, match="in_plan: expected a ChannelPlan or a mask"):
        layer(x, [1, 2])
    with pytest.raises(ValueError, match="out_plan: expected one of 16 channels"):
        layer(x, inputs, inputs)
    with pytest.raises(ValueError, match="base: expected None with packed=True"):
        layer(x, inputs, base=x, packed=True)
    with pytest.raises(ValueError, match="norm: expected 16 features, got 8"):
        layer(x, inputs, norm=nn.BatchNorm2d(C))
    with pytest.raises(ValueError, match=r"scale: expected shape \(3, 16\)"):
        layer(x, inputs, outputs, scale=random_tensor(N, C))
    with pytest.raises(ValueError, match="activation: expected None or one of"):
        layer(x, activation="tanh")
    with pytest.raises(ValueError, match=r"input: expected a tensor \[N, ..., I\]"):
        ChannelLinear(C, OUT)(3, inputs)


def statistics_of_live(x, mask):
    """Mean and variances ``[C]`` of each channel over the samples where it is live."""
    values = [x[mask[:, c], c] for c in range(x.shape[1])]
    mean, var, unbiased = (
        [f(v) for v in values] for f in (torch.mean, lambda v: v.var(correction=0), torch.var)
    )
    return torch.stack(mean), torch.stack(var), torch.stack(unbiased)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_norm_of_live_channels(options, training):
    norm = randomised(ChannelBatchNorm2d(OUT, **options)).double().train(training)
    x, scale = double(N, OUT, 5, 4).requires_grad_(), double(N, OUT)
    mask = masks()[1]
    mask[1] = True  # every channel is live somewhere
    plan, before = ChannelPlan.from_mask(mask), copy.deepcopy(norm)
    out = norm(x, mask, scale=scale, activation="relu")
    mean, var, unbiased = statistics_of_live(x, mask)
    if not training and norm.running_mean is not None:
        mean, var = norm.running_mean, norm.running_var
    expected = F.batch_norm(x, mean.detach(), var.detach(), norm.weight, norm.bias, False, 0, norm.eps)
    close(out, F.relu(expected * at(scale)) * at(mask))
    packed = copy.deepcopy(before)(
        dynops.ops.gather_channels(x, plan), plan, scale=scale, activation="relu", packed=True
    )
    close(dynops.ops.scatter_channels(packed, plan), out)
    if training and norm.running_mean is not None:
        momentum = 1.0 if norm.momentum is None else norm.momentum
        close(norm.running_mean, before.running_mean.lerp(statistics_of_live(x, mask)[0], momentum).detach())
        close(norm.running_var, before.running_var.lerp(unbiased, momentum).detach())
        assert norm.num_batches_tracked == 1


def test_norm_gradient_through_the_statistics():
    norm, x, mask = (
        randomised(nn.BatchNorm2d(OUT)).double(),
        double(N, OUT, 3, 3).requires_grad_(),
        masks()[1],
    )
    mask[1] = True
    layer = ChannelBatchNorm2d.from_dense(norm)
    mean, var, _ = statistics_of_live(x, mask)
    z = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    dense = (z * norm.weight[:, None, None] + norm.bias[:, None, None]) * at(mask)
    close_gradients(layer(x, mask), dense, (x, norm.weight, norm.bias), 1e-10)


def test_norm_without_values_keeps_its_statistics():
    norm = randomised(ChannelBatchNorm2d(4)).double()
    before, x = copy.deepcopy(norm), double(2, 4, 1, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]])  # one value, two, none, none
    out = norm(x, mask)
    changed = norm.running_mean != before.running_mean
    assert changed.tolist() == [False, True, False, False]
    close(out[0, 0], before.eval()(x)[0, 0])
    assert out[:, 2:].count_nonzero() == 0 and out.isfinite().all()


def test_norm_refuses():
    norm, x = ChannelBatchNorm2d(4), random_tensor(2, 4, 3, 3)
    plan = ChannelPlan.from_mask(torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]))
    assert torch.equal(norm(x), nn.BatchNorm2d(4)(x))
    with pytest.raises(ValueError, match="input: expected 2 channels"):
        norm(x, plan, packed=True)
    with pytest.raises(ValueError, match="plan: expected one with packed=True"):
        norm(x, scale=torch.ones(2, 4), packed=True)
    with pytest.raises(ValueError, match=r"scale: expected shape \(2, 4\)"):
        norm(x, plan, scale=torch.ones(4))
    with pytest.raises(ValueError, match="plan: expected a list for each of 1 samples"):
        norm(x[:1], plan)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_packed_chain_equals_masked_dense_chain(grad, training):
    first, second = (
        nn.Conv2d(3, C, 3, padding=1, bias=False).double(),
        nn.Conv2d(C, OUT, 3, stride=2).double(),
    )
    norms = [randomised(nn.BatchNorm2d(c)).double().train(training) for c in (C, OUT)]
    norms[0].weight.data[::3] = 0  # cannot be divided by
    layers = [ChannelConv2d.from_dense(conv) for conv in (first, second)]
    ours = [copy.deepcopy(norm) for norm in norms]
    x, (inner, outer) = double(N, 3, 8, 8), masks()
    inner[-1, :] = False
    inner[1, :] = outer[1, :] = True
    scales = double(N, C), double(N, OUT)
    plans = ChannelPlan.from_mask(inner), ChannelPlan.from_mask(outer, capacity=OUT)
    with torch.set_grad_enabled(grad):
        y = layers[0](x, None, plans[0], norm=ours[0], scale=scales[0], activation="relu", packed=True)
        assert y.shape[1] == plans[0].width
        y = layers[1](y, *plans, norm=ours[1], scale=scales[1], activation="relu", packed=True)
        out = dynops.ops.scatter_channels(y, plans[1])
        h = x
        for conv, norm, scale, mask in zip((first, second), norms, scales, (inner, outer), strict=True):
            h = conv(h)
            h = ChannelBatchNorm2d.from_dense(norm)(h, mask) if training else norm(h)
            h = F.relu(h * at(scale)) * at(mask)
    close(out, h)
    for a, b in zip(ours, norms, strict=True):
        close(a.running_var, b.running_var)


@pytest.mark.parametrize("grad", [False, True])
def test_conv_with_norm_and_base(grad):
    layer, norm = ChannelConv2d(C, OUT, 3).double(), randomised(nn.BatchNorm2d(OUT)).double().eval()
    x, (inputs, outputs), base = double(N, C, 6, 6), masks(), double(N, OUT, 4, 4)
    with torch.set_grad_enabled(grad):
        expected = norm(F.conv2d(x * at(inputs), layer.weight, layer.bias))
        close(layer(x, inputs, outputs, norm=norm, base=base), torch.where(at(outputs), expected, base))
        close(layer(x, inputs, norm=norm), expected)
