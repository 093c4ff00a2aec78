"""Slimmable layers and their norms against dense layers of each width."""

import copy

import pytest
import torch
import torch.nn.functional as F
from channel_layers import double
from comparison import close, close_gradients, randomised
from torch import nn

from dynops.nn import (
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    UniversalBatchNorm2d,
    set_width,
)
from dynops.testing import random_tensor

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
    dense = sum(layer(x[n : n + 1, : INS[i]], i).square().sum() for n, i in enumerate(width))
    out = layer(x, torch.tensor(width)).square().sum()
    close_gradients(out, dense, (x, layer.weight, layer.bias))


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


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_third_in_float32_is_that_of_the_float(momentum):
    """132 / 3 = 44 is rounded up to 48, 43.99996 down to 40. A norm has the statistics of the width in either form."""
    conv = SlimmableConv2d(3, 132, 1, us=(False, True)).double()
    norm, x = UniversalBatchNorm2d(132, [1 / 3, 1.0], momentum=momentum).double(), double(2, 3, 3, 3)
    dense, width = nn.BatchNorm2d(48, momentum=momentum).double(), torch.tensor([1 / 3, 1 / 3])
    for training in (True, True, False):
        expected = dense.train(training)(conv(x, 1 / 3))
        close(norm.train(training)(conv(x, width), width)[:, :48], expected)
        x = x * 2 + 1
    close(norm.bn[0].running_var, dense.running_var)
    close(norm(conv(x, 1 / 3), 1 / 3), dense(conv(x, 1 / 3)))


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
