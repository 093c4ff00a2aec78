"""Budget losses against their formulas, and cap against its promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynops.budget import (
    LayerMacs,
    MacCounter,
    batch_shaping_loss,
    block_bounds_loss,
    blocks_of,
    cap,
    cost_loss,
    mask_l1_loss,
    network_ratio_loss,
    target_rate_loss,
    threshold_target_loss,
)
from dynops.budget.beta import beta_cdf
from dynops.nn import ChannelGatedConv2d, Skip


class Decision:
    def __init__(self, mask):
        self.mask = mask


def test_target_rate():
    gates = (torch.rand(6, 3) < 0.5).double().requires_grad_()
    rates = gates.detach().numpy().mean(0)
    for target in (0.4, [1.0, 0.5, 0.2]):
        assert target_rate_loss(gates, target).item() == pytest.approx(
            np.mean((rates - target) ** 2), rel=1e-12
        )
    as_list = [Decision(gates[:, 0]), gates[:, 1, None, None], gates[:, 2]]
    torch.testing.assert_close(target_rate_loss(as_list, 0.4), target_rate_loss(gates, 0.4))
    assert torch.autograd.gradcheck(lambda g: target_rate_loss(g, 0.4), (gates,))


def test_layers_of_different_sizes_count_alike():
    masks = [torch.ones(2, 1, 8, 8), -torch.ones(2, 4), torch.zeros(2, 100)]
    assert mask_l1_loss(masks).item() == pytest.approx(2 / 3)
    assert mask_l1_loss(torch.tensor([[True, False], [True, False]])).item() == 0.5
    assert mask_l1_loss(Decision(torch.ones(0, 3))).item() == 0  # an empty batch
    half = torch.ones(1, 70000, dtype=torch.float16)  # the sum has no place in float16
    assert mask_l1_loss([half]).item() == 1


def test_cost_table():
    gates = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    assert cost_loss(gates, [3.0, 1.0]).item() == pytest.approx(3.5 / 4)
    assert cost_loss(gates, torch.tensor([3, 1]), 0.5).item() == pytest.approx((3.5 / 4 - 0.5) ** 2)
    cost_loss(gates, [3.0, 1.0]).backward()
    assert gates.grad.tolist() == [[0.375, 0.125]] * 2


def layers(*pairs):
    return {str(i): LayerMacs(torch.tensor(c, dtype=torch.float64), d) for i, (c, d) in enumerate(pairs)}


def test_network_ratio():
    macs = layers((3.0, 4.0), (1.0, 12.0))
    assert network_ratio_loss(macs, 0.5).item() == 0.0625
    assert network_ratio_loss(list(macs.values()), 0.25).item() == 0


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.33, 1.0])
def test_block_bounds(progress):
    macs, target = layers((3.0, 4.0), (1.0, 12.0), (5.0, 10.0), (0.0, 0.0)), 0.5
    q = math.cos(min(progress / 0.33, 1) * math.pi / 2) ** 2
    shares = np.array([0.75, 1 / 12, 0.5])
    lower, upper = q * target, 1 - q * (1 - target)
    expected = np.mean(np.maximum(0, lower - shares) ** 2 + np.maximum(0, shares - upper) ** 2)
    assert block_bounds_loss(macs, target, progress).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_losses_of_a_model():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Skip(nn.Linear(4, 4)) for _ in range(11))

        def forward(self, x, gates):
            for i, block in enumerate(self.blocks):
                x = block(x, gates[:, i])
            return x

    gates = torch.zeros(4, 11)
    gates[:, 1] = gates[:2, 10] = 1
    gates.requires_grad_()
    model = Gated()
    with MacCounter(model) as macs:
        model(torch.randn(4, 4), gates)
    assert network_ratio_loss(macs, 0.0).item() == pytest.approx((1.5 / 11) ** 2)
    blocks = blocks_of(macs.layers, ["blocks.1", "blocks.10"])
    assert [float(b.computed.detach()) for b in blocks.values()] == [64, 32]
    assert network_ratio_loss(blocks, 0.5).item() == pytest.approx(0.0625)
    assert block_bounds_loss(macs, 0.5, 0.0).item() == pytest.approx(10 / 11 * 0.25)
    network_ratio_loss(macs, 0.0).backward()
    assert (gates.grad > 0).all()
    with pytest.raises(ValueError, match=r"names: expected modules with counted layers, got 'blocks\.11'"):
        blocks_of(macs.layers, ["blocks.11"])


def test_threshold_target():
    model = nn.Sequential(ChannelGatedConv2d(4, 3, 1, th=1.0), ChannelGatedConv2d(4, 2, 1, th=0.5))
    assert threshold_target_loss(model, 2.0).item() == pytest.approx(3 * 1 + 2 * 2.25)
    threshold_target_loss([model[0].threshold], 2.0).backward()
    assert model[0].threshold.grad.flatten().tolist() == [-2.0] * 3
    with pytest.raises(ValueError, match="got none"):
        threshold_target_loss(nn.Linear(2, 2), 1.0)


def test_beta_distribution():
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    for a, b, exact in (
        (1, 1, x),
        (2, 2, 3 * x**2 - 2 * x**3),
        (0.5, 0.5, 2 / math.pi * x.sqrt().asin()),
        (3, 1, x**3),
    ):
        torch.testing.assert_close(beta_cdf(x, a, b), exact, rtol=0, atol=1e-12)
    inner = (torch.rand(7, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: beta_cdf(t, 0.6, 0.4), (inner,))
    edges = torch.tensor([0.0, 1.0, -0.5, 1.5], requires_grad=True)
    assert beta_cdf(edges, 0.6, 0.4).tolist() == [0, 1, 0, 1]
    beta_cdf(edges, 0.6, 0.4).sum().backward()
    assert edges.grad.isfinite().all() and edges.grad[2:].tolist() == [0, 0]
    assert beta_cdf(torch.tensor([float("nan")]), 0.6, 0.4).isnan().all()


def test_batch_shaping():
    scores = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    ordered = np.sort(scores.detach().numpy(), 0)
    cdf = beta_cdf(torch.from_numpy(ordered), 0.6, 0.4).numpy()
    expected = np.mean((np.arange(1, 10)[:, None] / 10 - cdf) ** 2)
    assert batch_shaping_loss(scores).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(batch_shaping_loss, (scores,))
    constant, spread = torch.full((99, 1), 0.6), torch.distributions.Beta(0.6, 0.4).sample((99, 20))
    assert (
        batch_shaping_loss(spread) < batch_shaping_loss(constant) / 5
    )  # gates that say the same to everyone
    assert batch_shaping_loss(torch.ones(0, 3)).item() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: target_rate_loss(torch.ones(4), 0.5), ValueError, r"gates: expected \[N, L\]"),
        (lambda: target_rate_loss([], 0.5), ValueError, "gates: expected at least one"),
        (lambda: target_rate_loss([1], 0.5), TypeError, "gates: expected tensors or Decisions, got int"),
        (lambda: target_rate_loss(torch.ones(4, 2), [0.5]), ValueError, "target: expected a number, or one for each"),
        (lambda: target_rate_loss(torch.ones(4, 2), 1.5), ValueError, r"target: expected rates in \[0, 1\]"),
        (lambda: cost_loss(torch.ones(4, 2), [1.0]), ValueError, r"costs: expected \[2\]"),
        (lambda: network_ratio_loss(layers((1.0, 2.0)), 2), ValueError, r"target: expected a share in \[0, 1\]"),
        (lambda: network_ratio_loss([1.0], 0.5), TypeError, "macs: expected a MacCounter or LayerMacs"),
        (lambda: block_bounds_loss(layers((1.0, 2.0)), 0.5, -1), ValueError, "progress"),
        (lambda: block_bounds_loss(layers((0.0, 0.0)), 0.5, 0), ValueError, "at least one block"),
        (lambda: batch_shaping_loss(torch.ones(3, dtype=torch.int64)), TypeError, "scores: expected a floating"),
        (lambda: batch_shaping_loss(torch.ones(3), alpha=0), ValueError, "alpha, beta: expected positive"),
        (lambda: cap([1], 0.5), TypeError, "gate: expected a real tensor, got list"),
        (lambda: cap(torch.ones(()), 0.5), ValueError, r"gate: expected \[N, ...\], got a number"),
        (lambda: cap(torch.ones(3), 1.5), ValueError, r"max_fraction: expected a number in \[0, 1\]"),
        (lambda: cap(torch.ones(3), float("nan")), ValueError, "max_fraction"),
        (lambda: cap(torch.ones(3), 0.5, torch.ones(2)), ValueError, r"score: expected the gate's shape \(3,\)"),
        (lambda: cap(torch.ones(3), 0.5, 1.0), TypeError, "score: expected a real tensor, got float"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9, 1.0]),
    st.sampled_from([torch.bool, torch.int64, torch.float16, torch.float32, torch.float64]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_cap_keeps_the_highest_open_ones(shape, fraction, dtype, per_sample, own_score, seed):
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randint(0, 3, shape, generator=generator).to(dtype)
    score = torch.randint(0, 3, shape, generator=generator).float()  # with ties
    out = cap(gate, fraction, None if own_score else score, per_sample=per_sample)
    assert out.shape == gate.shape and out.dtype == gate.dtype
    rows = shape[0] if per_sample else 1
    each = gate.numel() // max(rows, 1)
    flat, kept = gate.reshape(rows, each), out.reshape(rows, each)
    ranks = flat.float() if own_score else score.reshape(flat.shape)
    for values, after, rank in zip(flat, kept, ranks, strict=True):
        most = math.floor(round(fraction * len(values), 6))
        open_ = [i for i in range(len(values)) if values[i] != 0]
        best = sorted(open_, key=lambda i: (-float(rank[i]), i))[:most]
        expected = torch.zeros_like(values)
        expected[best] = values[best]
        assert torch.equal(after, expected)


def test_cap_has_a_gradient_through_what_it_keeps():
    gate = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], requires_grad=True)
    score = torch.tensor([0.1, 0.9, 1.0, float("nan"), 0.5])
    out = cap(gate, 0.4, score)
    assert out.tolist() == [0, 1, 0, 0, 1]
    (out * torch.arange(1.0, 6)).sum().backward()
    assert gate.grad.tolist() == [0, 2, 0, 0, 5]
    assert cap(gate, 1.0, score).tolist() == gate.tolist()  # NaN ranks last, but stays where there is room
    assert cap(gate, 0.6, score).tolist() == [1, 1, 0, 0, 1]


def test_cap_of_pixels_of_each_sample():
    mask = torch.ones(3, 1, 4, 4)
    score = torch.randn(3, 1, 4, 4)
    score[0] += 100
    assert cap(mask, 0.5, score, per_sample=True).flatten(1).sum(1).tolist() == [8, 8, 8]
    assert cap(mask, 0.5, score).flatten(1).sum(1)[0] == 16


def test_cap_compiles_without_breaks():
    compiled = torch.compile(lambda g, s: cap(g, 0.5, s), fullgraph=True, backend="eager")
    gate, score = (torch.rand(10) < 0.8).float(), torch.rand(10)
    assert torch.equal(compiled(gate, score), cap(gate, 0.5, score))
