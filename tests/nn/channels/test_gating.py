"""Layers that choose channels or weights themselves, against reconstructions of the published ones, and on kernels."""

import copy

import pytest
import torch
from channel_layers import OUT, N, PublishedCGConv, PublishedDGC, PublishedDynamicConv, double, grouped_trick
from comparison import close, randomised
from torch import nn

from dynops.budget import threshold_target_loss
from dynops.nn import (
    ChannelGatedConv2d,
    CondConv2d,
    DynamicConv2d,
    GroupedDynamicConv2d,
)
from dynops.testing import assert_within_budget, random_tensor


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
    for arguments, message in (
        ({"heads": 3}, "heads: expected a divisor"),
        ({"gate_factor": 0}, "gate_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupedDynamicConv2d(16, 16, 1, **arguments)
    with pytest.raises(ValueError, match="inactive_channels: expected 0 to 16"):
        layer.inactive_channels = 17


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
