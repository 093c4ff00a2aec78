"""ConvExperts against every branch on every sample."""

import copy
import math

import pytest
import torch
from mixture_cases import E, K, randomised, routed
from torch import Tensor, nn

from dynops import ExpertPlan
from dynops.nn import (
    ConvExperts,
    TopKRouter,
)
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

N = 6


def branch(norm: bool = True) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)))


def conv_experts(**options) -> ConvExperts:
    return randomised(ConvExperts([branch() for _ in range(E)], **options)).eval()


def masked_branches(layer: ConvExperts, x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """Every branch on every sample, times its weight or zero."""
    slots = []
    for e, module in enumerate(layer.branches):
        chosen = (index == e).to(x.dtype) if weight is None else weight.to(x.dtype) * (index == e)
        slots.append(module(x) * chosen.sum(1)[:, None, None, None])
    return torch.cat(slots, 1) if layer.combine == "concat" else torch.stack(slots).sum(0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_conv_experts_equal_masked_branches(combine, memory_format):
    layer = conv_experts(combine=combine)
    x = random_tensor(N, 3, 8, 8).to(memory_format=memory_format).requires_grad_()
    index, weight = routed(N)
    index[0] = 2  # twice the same
    weight.requires_grad_()
    wide = copy.deepcopy(layer).double()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    actual, dense = layer(x, index, weight), masked_branches(layer, x, index, weight)
    exact = masked_branches(wide, x64, index, w64)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_within_budget(actual, exact.detach(), dense)
    grad = random_tensor(*actual.shape)
    mine = torch.autograd.grad(actual, (x, weight, *layer.parameters()), grad, allow_unused=True)
    theirs = torch.autograd.grad(dense, (x, weight, *layer.parameters()), grad)
    exact = torch.autograd.grad(exact, (x64, w64, *wide.parameters()), grad.double())
    for a, e in zip(mine, exact, strict=True):
        assert a is not None or e.count_nonzero() == 0  # of a branch that nobody chose
    mine = [torch.zeros_like(d) if a is None else a for a, d in zip(mine, theirs, strict=True)]
    # in one vector: a bias has four values, too few for a norm to be a yardstick
    mine, exact, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (mine, exact, theirs))
    assert_within_budget(mine, exact, theirs, "gradient")
    assert_within_budget(
        layer(x, index), masked_branches(wide, x64, index, None), masked_branches(layer, x, index, None)
    )


def test_only_chosen_branches_run_and_once():
    layer, sizes = conv_experts(), {}
    for e, module in enumerate(layer.branches):
        module.register_forward_hook(
            lambda _, inputs, __, e=e: sizes.setdefault(e, []).append(len(inputs[0]))
        )
    index = torch.tensor([[0, 3], [3, 0], [3, E], [E, E], [3, 3], [0, E]])
    out = layer(random_tensor(N, 3, 8, 8), index, torch.ones(N, 2))
    assert sizes == {0: [3], 3: [5]}
    assert out[3].count_nonzero() == 0


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_chosen_is_zero_of_the_right_shape(combine, training):
    layer = conv_experts(combine=combine).train(training)
    x, weight = random_tensor(N, 3, 8, 8), torch.rand(N, K, requires_grad=True)
    channels = 4 * (E if combine == "concat" else 1)
    before = copy.deepcopy(layer.state_dict())
    out = layer(x, torch.full((N, K), E), weight)
    assert out.shape == (N, channels, 4, 4) and out.count_nonzero() == 0
    out.sum().backward()
    assert weight.grad.count_nonzero() == 0
    assert layer(x[:0], torch.zeros(0, K, dtype=torch.int64)).shape == (0, channels, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_nothing_chosen_of_a_norm_that_needs_two_samples():
    layer = ConvExperts([nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.BatchNorm1d(7)) for _ in range(E)])
    assert layer(random_tensor(N, 3, 2, 2), torch.full((N,), E)).shape == (N, 7)


def test_values_of_dropped_samples_are_not_read():
    layer, x = conv_experts(), random_tensor(N, 3, 8, 8)
    index = torch.zeros(N, 1, dtype=torch.int64)
    index[2] = E
    x[2] = math.nan
    out = layer(x, index)
    assert out.isfinite().all() and out[2].count_nonzero() == 0


def test_conv_experts_with_a_gate_and_shared_plan():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), TopKRouter(3, E, K))
    layer = ConvExperts([branch(norm=False) for _ in range(E)], gate)
    x = random_tensor(N, 3, 8, 8)
    index, weight, *_ = gate(x)
    other = ConvExperts(layer.branches)
    out = layer(x)
    assert torch.equal(out, other(x, index, weight))
    assert torch.equal(out, other(x, ExpertPlan.from_topk(index, E), weight))
    out.sum().backward()
    assert gate[2].weight.grad.count_nonzero() > 0


def test_conv_experts_name_bad_arguments():
    with pytest.raises(ValueError, match=r"^branches: expected at least one module, got none"):
        ConvExperts([])
    with pytest.raises(ValueError, match=r"^combine: expected 'sum' or 'concat', got 'mean'"):
        ConvExperts([branch()], combine="mean")
    layer, x, index = conv_experts(), random_tensor(N, 3, 8, 8), torch.zeros(N, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"^topk_index: expected \[N, K\], as the layer has no gate, got None"
    ):
        layer(x)
    with pytest.raises(ValueError, match=r"^topk_index: expected 6 samples and 5 experts, got ExpertPlan\(5"):
        layer(x, index[1:])
    for combine in ("sum", "concat"):
        with pytest.raises(ValueError, match=r"^topk_weight: expected \(6, 1\), got \(6, 2\)"):
            conv_experts(combine=combine)(x, index, torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"^topk_index: expected None, as the layer has a gate, got Tensor"):
        ConvExperts([branch()], nn.Identity())(x, index)
    with pytest.raises(
        TypeError, match=r"^x: expected a floating tensor \[N, C, ...\], got torch.int64 \(6, 1\)"
    ):
        layer(index, index)
    uneven = ConvExperts([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)])
    with pytest.raises(
        ValueError, match=r"^branches: expected \(5, 4, 6, 6\) from branch 1, got \(5, 5, 6, 6\)"
    ):
        uneven(x, torch.tensor([0, 1, 1, 1, 1, 1]))
