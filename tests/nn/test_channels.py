"""The channel layers against dense layers, masks, and reconstructions of the published layers."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparison import close, randomised
from torch import nn

import dynops
from dynops import ChannelPlan
from dynops.budget import threshold_target_loss
from dynops.kernels.layout import memory_format_of
from dynops.nn import (
    ChannelBatchNorm2d,
    ChannelConv2d,
    ChannelGatedConv2d,
    ChannelLinear,
    CondConv2d,
    DynamicConv2d,
    GroupedDynamicConv2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    UniversalBatchNorm2d,
    set_width,
)
from dynops.testing import assert_within_budget, random_tensor

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (2, 5), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 0), "groups": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "groups": 8},
]
N, C, OUT = 3, 8, 16


def masks(n=N, c=C, o=OUT):
    """Input and output masks with an empty list, a full one, and others."""
    inputs, outputs = torch.rand(n, c) < 0.5, torch.rand(n, o) < 0.5
    inputs[0, 0] = outputs[0, 0] = True
    inputs[-1], outputs[-1] = True, False
    return inputs, outputs


def at(mask):
    return mask[:, :, None, None]


def double(*shape):
    return random_tensor(*shape, dtype=torch.float64)


# --------------------------------------------------------------------------- ChannelConv2d, ChannelLinear


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
    wanted = (x, scale, layer.weight, layer.bias)
    weights = double(N, OUT, 5, 6)
    ours = torch.autograd.grad(
        (layer(x, inputs, outputs, scale=scale, activation="relu") * weights).sum(), wanted
    )
    dense = F.relu(F.conv2d(x * at(inputs), layer.weight, layer.bias, padding=1) * at(scale)) * at(outputs)
    for a, b in zip(ours, torch.autograd.grad((dense * weights).sum(), wanted), strict=True):
        close(a, b)
    assert ours[1][~outputs].count_nonzero() == 0 and ours[1][outputs].count_nonzero() > 0


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


# ------------------------------------------------------------------------------ norm and packed chains


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
    weights = double(N, OUT, 3, 3)
    ours = torch.autograd.grad((layer(x, mask) * weights).sum(), (x, norm.weight, norm.bias))
    mean, var, _ = statistics_of_live(x, mask)
    z = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    dense = (z * norm.weight[:, None, None] + norm.bias[:, None, None]) * at(mask)
    for a, b in zip(
        ours, torch.autograd.grad((dense * weights).sum(), (x, norm.weight, norm.bias)), strict=True
    ):
        close(a, b, 1e-10)


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


# -------------------------------------------------------------------------------------- slimmable

INS, OUTS = [4, 8, 12], [6, 10, 16]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"stride": 2, "bias": False}, {"dilation": 2, "padding_mode": "circular"}],
    ids=str,
)
def test_slimmable_conv(arguments):
    layer = SlimmableConv2d(INS, OUTS, 3, padding=1, **arguments).double()
    dense = nn.Conv2d(12, 16, 3, padding=1, **arguments).double()
    dense.load_state_dict(layer.state_dict())
    x, width = double(4, 12, 7, 7), torch.tensor([2, 0, 1, 0])
    assert torch.equal(layer(x), dense(x))
    expected = torch.zeros_like(dense(x))
    for i, (c, o) in enumerate(zip(INS, OUTS, strict=True)):
        slim = nn.Conv2d(c, o, 3, padding=1, **arguments).double()
        slim.weight.data = dense.weight[:o, :c].detach()
        if slim.bias is not None:
            slim.bias.data = dense.bias[:o].detach()
        assert torch.equal(layer(x[:, :c], i), slim(x[:, :c]))
        for n in (width == i).nonzero()[:, 0].tolist():
            expected[n, :o] = slim(x[n, :c])
    close(layer(x, width), expected)
    assert torch.equal(set_width(layer, 1)(x[:, :8]), layer(x[:, :8], 1))


def test_slimmable_depthwise_and_groups():
    depthwise = SlimmableConv2d(INS, INS, 3, padding=1, groups_list=INS).double()
    grouped = SlimmableConv2d([4, 8], [6, 12], 1, groups_list=[2, 4]).double()
    for layer, channels, width in ((depthwise, INS, [0, 2, 1]), (grouped, [4, 8], [1, 0, 1])):
        x, out = double(3, channels[-1], 5, 5), layer(double(3, channels[-1], 5, 5))
        per_sample = layer(x, torch.tensor(width))
        assert per_sample.shape == out.shape
        for n, i in enumerate(width):
            slim = layer(x[n : n + 1, : channels[i]], i)
            close(per_sample[n : n + 1, : slim.shape[1]], slim)
            assert per_sample[n, slim.shape[1] :].count_nonzero() == 0
    with pytest.raises(ValueError, match="groups_list: expected groups of the same channels"):
        SlimmableConv2d([4, 8], [6, 12], 1, groups_list=[2, 2])


def test_slimmable_linear():
    layer = SlimmableLinear(INS, OUTS).double()
    x, width = double(4, 12), torch.tensor([2, 0, 1, 0])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    out = layer(x, width)
    for n, i in enumerate(width.tolist()):
        expected = F.linear(x[n, : INS[i]], layer.weight[: OUTS[i], : INS[i]], layer.bias[: OUTS[i]])
        close(out[n, : OUTS[i]], expected)
        assert out[n, OUTS[i] :].count_nonzero() == 0
        assert torch.equal(layer(x[:, : INS[i]], i)[:, :3], F.linear(x[:, : INS[i]], layer.weight[: OUTS[i], : INS[i]], layer.bias[: OUTS[i]])[:, :3])  # fmt: skip


def test_universally_slimmable():
    layer = SlimmableConv2d(40, 48, 3).double()
    x = double(3, 40, 5, 5)
    for width, channels in (
        (1.0, (40, 48)),
        (0.5, (24, 24)),
        (0.25, (16, 16)),
        (0.05, (9, 9)),
    ):  # published rounding
        out = layer(x[:, : channels[0]], width)
        assert torch.equal(out, F.conv2d(x[:, : channels[0]], layer.weight[: channels[1], : channels[0]], layer.bias[: channels[1]]))  # fmt: skip
    width = torch.tensor([0.5, 1.0, 0.25])
    out = layer(x, width)
    for n, w in enumerate(width.tolist()):
        slim = layer(x[n : n + 1, : {0.5: 24, 1.0: 40, 0.25: 16}[w]], w)
        close(out[n : n + 1, : slim.shape[1]], slim)
        assert out[n, slim.shape[1] :].count_nonzero() == 0
    stem = SlimmableConv2d(3, 48, 3, us=(False, True)).double()
    assert stem(x[:, :3], 0.5).shape[1] == 24 and stem(x[:, :3], width).shape[1] == 48
    head = SlimmableLinear(40, 10, us=(True, False)).double()
    assert head(x[:, :24, 0, 0], 0.5).shape == (3, 10)
    depthwise = SlimmableConv2d(40, 40, 3, groups_list=[40]).double()
    assert torch.equal(depthwise(x[:, :24], 0.5), F.conv2d(x[:, :24], depthwise.weight[:24], depthwise.bias[:24], groups=24))  # fmt: skip
    assert SlimmableConv2d(32, 96, 1, ratio=(1, 6)).double()(x[:, :16], 0.5).shape[1] == 8 * 6


def test_slimmable_trains_per_sample():
    layer, x = SlimmableConv2d(INS, OUTS, 3).double(), double(3, 12, 5, 5).requires_grad_()
    width = [2, 0, 1]
    wanted = (x, layer.weight, layer.bias)
    ours = torch.autograd.grad(layer(x, torch.tensor(width)).square().sum(), wanted)
    dense = sum(layer(x[n : n + 1, : INS[i]], i).square().sum() for n, i in enumerate(width))
    for a, b in zip(ours, torch.autograd.grad(dense, wanted), strict=True):
        close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_switchable_norm(training):
    norm = randomised(SwitchableBatchNorm2d(OUTS)).double().train(training)
    assert [k for k in norm.state_dict() if k.endswith("weight")] == [f"bn.{i}.weight" for i in range(3)]
    before, x = copy.deepcopy(norm), double(5, 16, 4, 4)
    width = torch.tensor([2, 0, 1, 0, 2])
    x[1, 6:] = float("nan")  # past a sample's width nothing is read
    out = norm(x, width)
    for i, c in enumerate(OUTS):
        close(out[width == i, :c], before.bn[i](x[width == i, :c]))
        assert out[width == i, c:].count_nonzero() == 0
        close(norm.bn[i].running_mean, before.bn[i].running_mean)
    x = double(2, 16, 4, 4)
    assert torch.equal(copy.deepcopy(norm)(x), copy.deepcopy(norm).bn[2](x))
    assert torch.equal(copy.deepcopy(set_width(norm, 0))(x[:, :6]), copy.deepcopy(norm).bn[0](x[:, :6]))


@pytest.mark.parametrize("training", [True, False])
def test_universal_norm(training):
    widths = [0.25, 0.5, 1.0]
    norm = randomised(UniversalBatchNorm2d(40, widths)).double().train(training)
    statistics = [
        f"bn.{i}.{key}" for i in range(3) for key in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert list(norm.state_dict()) == ["weight", "bias", *statistics]
    before, x = copy.deepcopy(norm), double(6, 40, 4, 4)

    def expected(values, i):
        c = [16, 24, 40][i]
        mean, var = (t.clone() for t in (before.bn[i].running_mean, before.bn[i].running_var))
        return F.batch_norm(values, mean, var, norm.weight[:c], norm.bias[:c], training), mean

    width = torch.tensor([1.0, 0.25, 0.5, 0.5, 0.25, 1.0])
    x[1, 16:] = float("nan")
    out = norm(x, width)
    for i, (w, c) in enumerate(zip(widths, (16, 24, 40), strict=True)):
        normed, mean = expected(x[width == w, :c], i)
        close(out[width == w, :c], normed)
        close(norm.bn[i].running_mean, mean)
        assert out[width == w, c:].count_nonzero() == 0
    x = double(3, 40, 4, 4)
    assert torch.equal(copy.deepcopy(before)(x[:, :24], 0.5), expected(x[:, :24], 1)[0])
    assert torch.equal(copy.deepcopy(before)(x), expected(x, 2)[0])
    if training:
        close(
            before(x[:, :32], 0.75),
            F.batch_norm(x[:, :32], None, None, norm.weight[:32], norm.bias[:32], True),
        )
    else:
        with pytest.raises(
            ValueError, match=r"width: expected one of \[0.25, 0.5, 1.0\] in eval mode, got 0.75"
        ):
            norm(x[:, :32], 0.75)


def test_a_width_in_float32_is_that_of_the_float():
    layer, x = (
        SlimmableConv2d(40, 40, 1, bias=False).double(),
        double(1, 40, 3, 3),
    )  # 0.9 of 40 rounds up to 40
    close(layer(x, torch.tensor([0.9])), layer(x, 0.9))


def test_slimmable_model_of_the_published_layout():
    model = nn.Sequential(
        SlimmableConv2d([3, 3], [8, 16], 3, bias=False),
        SwitchableBatchNorm2d([8, 16]),
        nn.ReLU(),
        SlimmableConv2d([8, 16], [8, 16], 3, groups_list=[8, 16], bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SlimmableLinear([8, 16], [10, 10]),
    ).double().eval()  # fmt: skip
    norm = [f"1.bn.{i}.{key}" for i in (0, 1) for key in nn.BatchNorm2d(1).state_dict()]
    assert list(model.state_dict()) == ["0.weight", *norm, "3.weight", "6.weight", "6.bias"]
    x, width = double(3, 3, 9, 9), torch.tensor([1, 0, 1])
    per_sample = set_width(model, width)(x)
    for i in (0, 1):
        close(per_sample[width == i], set_width(model, i)(x[width == i]))
    assert torch.equal(set_width(model, None)(x), set_width(model, 1)(x))


def test_slimmable_refuses():
    layer, x = SlimmableConv2d(INS, OUTS, 3), random_tensor(2, 12, 5, 5)
    with pytest.raises(ValueError, match="input: expected 8 channels at this width"):
        layer(x, 1)
    with pytest.raises(ValueError, match="width: expected 0 to 2, got 3 to 3"):
        layer(x, 3)
    with pytest.raises(ValueError, match="width: expected 0 to 2, got -1 to 1"):
        layer(x, torch.tensor([-1, 1]))
    with pytest.raises(TypeError, match="width: expected the index of one of 3 switches"):
        layer(x, 0.5)
    with pytest.raises(TypeError, match="width: expected the index of one of 3 switches for each sample"):
        layer(x, torch.tensor([0.5, 1]))
    with pytest.raises(ValueError, match="expected two ints or two lists of the same length"):
        SlimmableConv2d([4, 8], 8, 3)
    with pytest.raises(ValueError, match="in_channels_list: expected an int >= 1 or a list"):
        SlimmableConv2d([], [], 3)
    universal = SlimmableConv2d(12, 16, 3)
    with pytest.raises(ValueError, match=r"width: expected a multiplier in \(0, 1\], got 1.5"):
        universal(x, 1.5)
    with pytest.raises(TypeError, match="width: expected a multiplier"):
        universal(x, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="input: expected 3 samples, one for each width, of 16 channels"):
        SwitchableBatchNorm2d(OUTS)(x, torch.tensor([0, 1, 1]))


# ------------------------------------------------------------------------- CondConv and dynamic convolution


def grouped_trick(x, weight, bias, **options):
    """The convolution with a weight ``[N, OUT, C/groups, kh, kw]`` for each sample, as published code has it."""
    n, groups = len(x), options.pop("groups", 1)
    out = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        groups=groups * n,
        **options,
    )
    return out.unflatten(1, (n, -1))[0]


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
    wanted = [x, routing, *layer.parameters()]
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-10)


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


class PublishedAttention(nn.Module):
    """attention2d of the published dynamic convolution: names, shapes and arithmetic."""

    def __init__(self, planes, ratio, kernels):
        super().__init__()
        hidden = kernels if planes == 3 else int(planes * ratio) + 1
        self.fc1, self.fc2 = nn.Conv2d(planes, hidden, 1, bias=False), nn.Conv2d(hidden, kernels, 1)

    def forward(self, x, temperature):
        x = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).flatten(1)
        return F.softmax(x / temperature, 1)


class PublishedDynamicConv(nn.Module):
    """Dynamic_conv2d, the published dynamic convolution: names, shapes and arithmetic."""

    def __init__(self, planes, out, kernel, ratio=0.25, groups=1, bias=True, kernels=4):
        super().__init__()
        self.attention = PublishedAttention(planes, ratio, kernels)
        self.weight = nn.Parameter(torch.randn(kernels, out, planes // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(kernels, out)) if bias else None

    def forward(self, x, temperature, **options):
        attention = self.attention(x, temperature)
        weight = torch.einsum("nk,koihw->noihw", attention, self.weight)
        return grouped_trick(x, weight, None if self.bias is None else attention @ self.bias, **options)


@pytest.mark.parametrize("planes, bias, kernels, options", [(8, True, 4, {"stride": 2, "padding": 1}), (3, False, 6, {}), (8, True, 2, {"groups": 4, "dilation": 2})])  # fmt: skip
def test_dynamic_conv_of_the_published_layout(planes, bias, kernels, options):
    groups = options.get("groups", 1)
    theirs = PublishedDynamicConv(planes, OUT, 3, groups=groups, bias=bias, kernels=kernels).double()
    ours = DynamicConv2d(planes, OUT, 3, bias=bias, K=kernels, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = double(N, planes, 8, 9).requires_grad_()
    for temperature in (34, 31):
        out, expected = ours(x), theirs(x, temperature, **options)
        close(out, expected)
        weights = torch.randn_like(out)
        gradients = [
            torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
            for y, model in ((out, ours), (expected, theirs))
        ]
        named = [dict(zip(["x", *dict(m.named_parameters())], g, strict=True)) for m, g in zip((ours, theirs), gradients, strict=True)]  # fmt: skip
        for name, gradient in named[0].items():
            close(gradient, named[1][name], 1e-10)
        ours.update_temperature()
    for _ in range(20):
        ours.update_temperature()
    assert ours.attention.temperature == 1
    with pytest.raises(ValueError, match="temperature: expected at least 1"):
        DynamicConv2d(8, 8, 3, temperature=0)


# --------------------------------------------------------------------------------------- DGC


class PublishedDGCHead(nn.Module):
    def __init__(self, channels, out, squeeze, kernel):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, bias=False)
        hidden = channels // (squeeze // 2 if channels < 80 else squeeze)
        self.fc1, self.fc2 = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels)


class PublishedDGC(nn.Module):
    """DynamicMultiHeadConv, the published dynamic group convolution: names, shapes and arithmetic."""

    def __init__(self, channels, out, kernel, heads=4, squeeze=16):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("_inactive_channels", torch.zeros(1))
        for i in range(heads):
            setattr(self, f"headconv_{i}", PublishedDGCHead(channels, out // heads, squeeze, kernel))
        self.heads = [getattr(self, f"headconv_{i}") for i in range(heads)]

    def forward(self, x, **options):
        x, outs, loss = F.relu(self.norm(x)), [], 0
        for head in self.heads:
            saliency = F.relu(head.fc2(F.relu(head.fc1(x.mean((2, 3))))))
            loss = loss + saliency.mean()
            lowest = saliency.detach().topk(int(self._inactive_channels), 1, largest=False).values
            if lowest.shape[1]:
                saliency = saliency.masked_fill(saliency.detach() <= lowest.amax(1, keepdim=True), 0)
            outs.append(F.conv2d(x * at(saliency), head.conv.weight, None, **options))
        return torch.stack(outs, 2).flatten(1, 2), loss


@pytest.mark.parametrize("inactive", [0, 5, 18, 24])
@pytest.mark.parametrize("training", [True, False])
def test_dgc_of_the_published_layout(inactive, training):
    theirs = randomised(PublishedDGC(24, 16, 3)).double().train(training)
    theirs._inactive_channels.fill_(inactive)
    ours = GroupedDynamicConv2d(24, 16, 3, stride=2, padding=1).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    assert ours.inactive_channels == inactive
    x = double(N, 24, 7, 7).requires_grad_()
    results = []
    for model, options in ((ours, {}), (theirs, {"stride": 2, "padding": 1})):
        out, loss = model(x, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad((out * weights).sum() + loss, [x, *parameters.values()])
        results.append((out, loss, dict(zip(["x", *parameters], gradients, strict=True))))
    (out, loss, gradients), expected = results
    close(out, expected[0])
    close(loss, expected[1])
    for name, gradient in gradients.items():
        close(gradient, expected[2][name], 1e-10)
    for format in (torch.contiguous_format, torch.channels_last):
        assert ours(x.contiguous(memory_format=format))[0].is_contiguous(memory_format=format)


def test_dgc_drops_channels_as_training_goes_on(monkeypatch):
    layer = GroupedDynamicConv2d(16, 16, 1, heads=2)
    x = random_tensor(1, 16, 3, 3)
    for progress, inactive in ((0.0, 0), (1 / 12, 0), (0.25, 3), (0.5, 8), (0.75, 12), (1.0, 12)):
        monkeypatch.setattr(GroupedDynamicConv2d, "global_progress", progress)
        layer.train()(torch.cat([x, -x]))
        assert layer.inactive_channels == int(layer.state_dict()["_inactive_channels"]) == inactive
    monkeypatch.setattr(GroupedDynamicConv2d, "global_progress", 0.5)
    layer.eval()(x)
    assert layer.inactive_channels == 12
    layer.inactive_channels = 4
    assert copy.deepcopy(layer).inactive_channels == 4
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x)[0], layer(x)[0], 1e-5)
    for arguments, message in (
        ({"heads": 3}, "heads: expected a divisor"),
        ({"gate_factor": 0}, "gate_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupedDynamicConv2d(16, 16, 1, **arguments)
    with pytest.raises(ValueError, match="inactive_channels: expected 0 to 16"):
        layer.inactive_channels = 17


# --------------------------------------------------------------------------------------- CGNet


class StraightThrough(torch.autograd.Function):
    """One where the input is positive; the gradient passes, in the sparse form only there."""

    @staticmethod
    def forward(ctx, x, sparse):
        ctx.save_for_backward(x)
        ctx.sparse = sparse
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad.masked_fill(x < 0, 0) if ctx.sparse else grad), None


class PublishedCGConv(nn.Conv2d):
    """CGConv2d, the published channel gating: names, shapes and arithmetic."""

    def __init__(
        self, *arguments, p=4, use_group=False, shuffle=False, sparse_bp=False, alpha=2.0, **options
    ):
        super().__init__(*arguments, **options)
        self.p, self.shuffle, self.sparse_bp, self.alpha = p, shuffle, sparse_bp, alpha
        o, c = self.out_channels // p, self.in_channels // p
        mask = torch.zeros_like(self.weight, requires_grad=False)
        if use_group:
            for i in range(p):
                mask[i * o : (i + 1) * o, i * c : (i + 1) * c] = 1
        else:
            mask[:, :c] = 1
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.bn = nn.BatchNorm2d(self.out_channels, affine=False)
        self.threshold = nn.Parameter(torch.zeros(1, self.out_channels, 1, 1))

    def forward(self, x):
        if self.shuffle:
            x = x.unflatten(1, (self.p, -1)).transpose(1, 2).flatten(1, 2)
        options = (self.bias, self.stride, self.padding, self.dilation, self.groups)
        partial = F.conv2d(x, self.weight * self.mask, *options)
        excess = torch.sigmoid(self.alpha * (self.bn(partial) - self.threshold)) - 0.5
        gate = StraightThrough.apply(excess, self.sparse_bp)
        return F.conv2d(x, self.weight, *options) * gate + partial * (1 - gate)


CG = [
    {},
    {"sparse_bp": True, "p": 2},
    {"use_group": True},
    {"use_group": True, "sparse_bp": True, "shuffle": True, "bias": True},
    {"p": 3, "shuffle": False, "stride": 2, "padding": 1, "bias": True},
    {"p": 1},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", CG, ids=str)
def test_channel_gating_of_the_published_layout(arguments, training):
    arguments = {"bias": False, **arguments}
    theirs = randomised(PublishedCGConv(8, 16, 3, **arguments)).double().train(training)
    theirs.threshold.data.uniform_(-1, 1)
    ours = ChannelGatedConv2d(8, 16, 3, **arguments).double().train(training)
    assert list(ours.threshold.shape) == [1, 16, 1, 1] and ours.threshold.unique().item() == -6
    ours.load_state_dict(theirs.state_dict())
    x = double(N, 8, 9, 9).requires_grad_()
    state = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        close(ours(x), copy.deepcopy(theirs)(x), 1e-11)
    ours.load_state_dict(state)
    out, expected = ours(x), theirs(x)
    close(out, expected, 1e-11)
    if training:
        close(ours.bn.running_mean, theirs.bn.running_mean)
    full = (out != 0).sum() if arguments.get("p") == 1 else None
    assert ours.num_out == out.numel() and 0 < ours.num_full < out.numel() and full != 0
    names = ["weight", "threshold", *(["bias"] if arguments["bias"] else [])]
    weights = torch.randn_like(out)
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *(getattr(m, name) for name in names)])
        for m, y in ((ours, out), (theirs, expected))
    ]
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-10)
    close(threshold_target_loss(ours, 1.5), ((theirs.threshold - 1.5) ** 2).sum())


@pytest.mark.parametrize("arguments", [{"groups": 2, "p": 2}, {"padding": 2, "padding_mode": "reflect"}, {"kernel_size": (3, 2), "padding": "same"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("sparse", [True, False])
def test_channel_gating_conv_arguments(arguments, sparse):
    arguments = {"kernel_size": 3, **arguments}
    layer = ChannelGatedConv2d(8, 16, th=0.1, sparse_bp=sparse, **arguments).double().eval()
    arguments.pop("p", None)
    dense = nn.Conv2d(8, 16, bias=False, **arguments).double()
    x = double(N, 8, 9, 9)
    dense.weight.data = layer.weight * layer.mask
    partial = dense(x)
    dense.weight.data = layer.weight.data
    expected = torch.where(layer.bn(partial) > layer.threshold, dense(x), partial)
    close(layer(x), expected, 1e-11)
    with torch.no_grad():
        close(layer(x), expected, 1e-11)
        close(layer(x[0]), expected[0], 1e-11)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        close(compiled(x), expected, 1e-11)
    assert pickle.loads(pickle.dumps(layer)).p == layer.p


def test_channel_gating_refuses():
    for arguments, message in (
        ({"alpha": 0}, "alpha: expected it above 0"),
        ({"p": 0}, "p: expected 1 to 8"),
        ({"p": 9}, "p: expected 1 to 8"),
        ({"p": 3, "use_group": True}, "p: expected a divisor of 8 input and 16 output"),
        ({"p": 3, "shuffle": True}, "p: expected a divisor of 8 input channels with shuffle"),
        ({"groups": 2, "use_group": True}, "use_group: expected it with groups=1"),
    ):
        with pytest.raises(ValueError, match=message):
            ChannelGatedConv2d(8, 16, 3, **arguments)
    with pytest.raises(RuntimeError, match="mask: expected the mask of p=4"):
        ChannelGatedConv2d(8, 16, 3).load_state_dict(ChannelGatedConv2d(8, 16, 3, p=2).state_dict())


# --------------------------------------------------------------------------------- all, on kernels


def on_kernels(name):
    """A layer in float32, its dense form, and what both are called with."""
    x, routing = random_tensor(2, 32, 12, 12), torch.rand(2, 4)
    if name == "gated":
        dense = randomised(PublishedCGConv(32, 48, 3, bias=True)).eval()
        dense.threshold.data += 0.7  # about a quarter of the gates open
        return ChannelGatedConv2d(32, 48, 3, bias=True).eval(), dense, (x,)
    if name == "grouped":
        dense = randomised(PublishedDGC(32, 48, 3)).eval()
        dense._inactive_channels.fill_(16)
        return GroupedDynamicConv2d(32, 48, 3).eval(), dense, (x,)
    if name == "dynamic":
        return DynamicConv2d(32, 48, 3), PublishedDynamicConv(32, 48, 3), (x, 34)
    layer = CondConv2d(32, 48, 3, padding=0, bias=True)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)

        def forward(self, x, routing):
            weight = (routing @ self.weight).view(2, 48, 32, 3, 3)
            return grouped_trick(x, weight, routing @ self.bias)

    return layer, Dense(), (x, routing)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["gated", "grouped", "dynamic", "cond"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_on_kernels(name, format, mode):
    layer, dense, (x, *rest) = on_kernels(name)
    layer.load_state_dict(dense.state_dict())
    x = x.contiguous(memory_format=format)
    with mode():
        outs = [
            layer(x, *([] if name == "dynamic" else rest)) for _ in range(2)
        ]  # the second finds its weights packed
        others = [dense(x, *rest), dense.double()(x.double(), *(r.double() if isinstance(r, torch.Tensor) else r for r in rest))]  # fmt: skip
    actual, again, yardstick, exact = (out[0] if isinstance(out, tuple) else out for out in (*outs, *others))
    assert torch.equal(actual, again) and actual.is_contiguous(memory_format=format)
    assert_within_budget(actual, exact, yardstick)
