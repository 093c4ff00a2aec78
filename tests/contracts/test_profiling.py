"""FlopCounterMode and the profiler see the ops, with what they compute."""

import timeit

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import dynops
from dynops import modes
from dynops import nn as layers
from dynops.budget import MacCounter
from dynops.ops.pixels.conv import _convolution

X = torch.randn(2, 8, 12, 10)
MASK = torch.rand(2, 12, 10, generator=torch.Generator().manual_seed(0)) < 0.3
FULL = torch.ones(2, 12, 10)


def flops(run, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def macs(module, *arguments) -> float:
    with MacCounter(module) as counter:
        module(*arguments)
    return float(counter.total)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 8, 1),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
    ).eval()


class Masked(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        with dynops.active(mask):
            return self.model(x)


TOPK = torch.randint(0, 4, (30, 2), generator=torch.Generator().manual_seed(0))
CHANNELS = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
CASES = {
    "conv": (lambda: layers.SparseConv2d(8, 16, 3, padding=1), X, MASK),
    "grouped conv": (lambda: layers.SparseConv2d(8, 16, 3, padding=1, groups=4), X, MASK),
    "pointwise conv": (lambda: layers.SparseConv2d(8, 16, 1), X, MASK),
    "transposed": (lambda: layers.SparseConvTranspose2d(8, 6, 2, stride=2), X, MASK.repeat_interleave(2, 1).repeat_interleave(2, 2)),
    "capacity": (lambda: layers.SparseConv2d(8, 16, 3, padding=1), X, dynops.PixelPlan.from_mask(MASK, 200)),
    "chain": (lambda: layers.SparseSequential(*net()[:5]), X, MASK),
    "channels": (lambda: layers.ChannelConv2d(8, 12, 3, padding=1), X, CHANNELS),
    "channels out": (lambda: layers.ChannelConv2d(8, 8, 3, groups=2), X, CHANNELS, CHANNELS.flip(1)),
    "linear": (lambda: layers.ChannelLinear(8, 6), torch.randn(2, 8), CHANNELS),
    "kernels": (lambda: layers.CondConv2d(8, 6, 3, num_experts=3), X, torch.rand(2, 3)),
    "experts": (lambda: layers.Experts(4, 16, 8), torch.randn(30, 16), TOPK, torch.rand(30, 2)),
    "experts, capacity": (lambda: layers.Experts(4, 16, 8), torch.randn(30, 16), dynops.ExpertPlan.from_topk(TOPK, 4, 9), torch.rand(30, 2)),
    "skip": (lambda: layers.Skip(net()[:5]), X, torch.tensor([0.0, 1.0])),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops_are_twice_the_macs(case, grad):
    make, *arguments = case
    module = make().eval()
    with torch.set_grad_enabled(grad):
        assert flops(module, *arguments) == 2 * macs(module, *arguments) > 0


def test_converted_models():
    model = net()
    x, dense = X, flops(model, X)
    dynops.convert_(model)
    masked = Masked(model)
    with torch.no_grad():
        assert flops(model, x) == dense
        assert flops(masked, x, FULL) == dense
        for mask in (MASK, MASK[:, :1] & False):
            assert flops(masked, x, mask) == pytest.approx(2 * macs(masked, x, mask))
    assert flops(masked, x, MASK) == pytest.approx(2 * macs(masked, x, MASK))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_pass(frozen):
    """Of a full plan as many as of the dense layer, of a third of the pixels a third."""
    conv = layers.SparseConv2d(8, 16, 3, padding=1)
    conv.weight.requires_grad_(not frozen)

    def step(*arguments):
        conv(*arguments).sum().backward()

    leaf = X.clone().requires_grad_()
    dense = flops(step, leaf)
    assert flops(step, leaf, FULL) == dense == (2 if frozen else 3) * flops(conv, X)
    third = torch.zeros(2, 12, 10)
    third[:, ::3] = 1
    assert 3 * flops(step, leaf, third) == dense
    experts, rows = layers.Experts(4, 16, 8), torch.randn(30, 16, requires_grad=True)
    total = flops(lambda: experts(rows, TOPK, torch.rand(30, 2)).sum().backward())
    assert total >= 3 * flops(experts, rows.detach(), TOPK, torch.rand(30, 2))


def test_small_full_plans_count_as_the_dense_layer():
    conv, x = layers.SparseConv2d(4, 4, 3, padding=1), torch.randn(1, 4, 5, 5)
    assert flops(conv, x, torch.ones(1, 5, 5)) == flops(conv, x)
    up = layers.SparseConvTranspose2d(4, 4, 3, stride=2, padding=1)
    assert flops(up, x, torch.ones(1, 9, 9)) == flops(up, x)


def test_counters_made_before_and_their_own_formulas():
    conv = layers.SparseConv2d(8, 16, 3, padding=1)
    packet = _convolution.overload.overloadpacket  # torch.ops makes another one where its cache was emptied
    mine = {packet: lambda *args, out_shape=None, **kwargs: 7}
    early, own = FlopCounterMode(display=False), FlopCounterMode(display=False, custom_mapping=mine)
    with torch.no_grad():
        conv(X, MASK)
        for counter, expected in ((early, 2 * macs(conv, X, MASK)), (own, 7)):
            with counter:
                conv(X, MASK)
            assert counter.get_total_flops() == expected
    with pytest.raises(RuntimeError, match="duplicate"):
        register_flop_formula(torch.ops.dynops.pixel_conv)(lambda *args: 0)


def test_values_do_not_change():
    conv = layers.SparseConv2d(8, 16, 3, padding=1)
    with torch.no_grad():
        want = conv(X, MASK)
        with FlopCounterMode(display=False):
            assert torch.equal(conv(X, MASK), want)
        with torch.profiler.profile():
            assert torch.equal(conv(X, MASK), want)


@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_names_the_ops(grad):
    conv, plan = layers.SparseConv2d(8, 16, 3, padding=1), dynops.PixelPlan.from_mask(MASK)
    samples = dynops.SamplePlan.from_mask(torch.tensor([False, True]))
    with torch.profiler.profile(record_shapes=True) as profile, torch.set_grad_enabled(grad):
        out = conv(X, plan)
        dynops.ops.gather_samples(X, samples)
        if grad:
            out.sum().backward()
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    assert [2, 8, 12, 10] in shapes["dynops::pixel_conv"] and [len(plan)] in shapes["dynops::pixel_conv"]
    assert "dynops::gather_rows" in shapes
    assert not grad or [len(plan)] in shapes["dynops::pixel_conv_weight_grad"]


def test_nothing_looks_on_by_default():
    assert not modes.observed()
    with torch.profiler.profile():
        assert modes.observed()
    with FlopCounterMode(display=False):
        assert modes.observed()
    assert (
        min(timeit.repeat(modes.observed, number=1000, repeat=5)) < 1e-3
    )  # 0.1 us a call; here 10 times that
