"""Gate heads: values against their equations, modes, initial rates, state, dtypes, errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from comparison import close, close_gradients
from torch import Tensor, nn

from dynops import gates
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

C = 6


class Backbone(nn.Sequential):
    """A network to look at images with, ``[N, C, H, W]`` to a map of 5 features."""

    def __init__(self):
        super().__init__(nn.Conv2d(C, 5, 3, 2), nn.ReLU())


HEADS = {
    "PooledGate": lambda **o: gates.PooledGate(C, 8, **o),
    "RecurrentGate": lambda **o: gates.RecurrentGate([C], **o),
    "ConvGate, form 1": lambda **o: gates.ConvGate(C, 1, **o),
    "ConvGate, form 2": lambda **o: gates.ConvGate(C, 2, **o),
    "SpatialGate": lambda **o: gates.SpatialGate(C, **o),
    "GaterNet": lambda **o: gates.GaterNet(Backbone(), 5, [4, 7], 8, **o),
    "PolicyNet": lambda **o: gates.PolicyNet(Backbone(), 5, 9, **o),
}
OTHERS = {
    "ChannelGate": lambda **o: gates.ChannelGate(C, 10, 0.5, **o),
    "SpatialHaltingHead": lambda **o: gates.SpatialHaltingHead(C, **o),
}
ALL = HEADS | OTHERS


def outputs(head: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor that a head returns."""
    return [t for t in torch.utils._pytree.tree_leaves(head(x)) if isinstance(t, Tensor)]


def randomized(head: nn.Module) -> nn.Module:
    """All parameters and statistics random, so that none can be left out unseen."""
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(random_tensor(*tensor.shape))
        for module in head.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_var.abs_().add_(0.2)
    return head


def norm(x: Tensor, bn: nn.Module) -> Tensor:
    """Batch norm in evaluation, along dimension 1."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var, weight, bias = (t.view(shape) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (x - mean) / torch.sqrt(var + bn.eps) * weight + bias


def test_pooled_gate():
    gate = randomized(gates.PooledGate(C, 8)).double().eval()
    x = 4 * random_tensor(40, C, 5, 3, dtype=torch.float64)
    with torch.no_grad():  # half of the samples on either side
        gate.fc2.bias[1] -= gate(x).score.logit().median()
    mask, score = gate(x)
    pooled = x.sum((2, 3)) / 15
    hidden = norm(pooled @ gate.fc1.weight.T + gate.fc1.bias, gate.fc1bn).clamp_min(0)
    logits = hidden @ gate.fc2.weight.T + gate.fc2.bias
    close(score, 1 / (1 + torch.exp(logits[:, 0] - logits[:, 1])))
    assert torch.equal(mask, (logits[:, 1] > logits[:, 0]).double())
    assert 0 < mask.sum() < 40
    close(gate(pooled).score, score)
    close(gate(x.flatten(2)).score, score)


@pytest.mark.parametrize("form", [1, 2])
def test_conv_gate(form):
    gate = randomized(gates.ConvGate(C, form)).double().eval()
    x = random_tensor(10, C, 9, 8, dtype=torch.float64)
    y = x
    if form == 1:
        y = x[:, :, :8].unflatten(2, (4, 2)).unflatten(4, (4, 2)).amax((3, 5))
        y = norm(F.conv2d(y, gate.conv1.weight, padding=1), gate.bn1).clamp_min(0)
        y = norm(F.conv2d(y, gate.conv2.weight, stride=2, padding=1), gate.bn2).clamp_min(0)
        assert y.shape[2:] == (2, 2)
    else:
        y = norm(F.conv2d(y, gate.conv1.weight, stride=2, padding=1), gate.bn1).clamp_min(0)
    logits = y.mean((2, 3)) @ gate.linear.weight.T + gate.linear.bias
    probability = logits.softmax(1)[:, 1]
    mask, score = gate(x)
    close(score, probability)
    assert torch.equal(mask, (probability > 0.5).double())
    close_gradients(mask, probability, list(gate.parameters()), 1e-8)


def test_recurrent_gate_is_an_lstm_over_the_layers():
    """As nn.LSTM over the sequence of projected features (the published code calls it step by step)."""
    widths = (4, 4, 6)
    gate = randomized(gates.RecurrentGate(widths, 10)).double()
    lstm = nn.LSTM(10, 10).double()
    lstm.load_state_dict({f"{name}_l0": value for name, value in gate.rnn.state_dict().items()})
    maps = [random_tensor(5, width, 3, 3, dtype=torch.float64) for width in widths]
    steps = [
        F.conv2d(F.adaptive_avg_pool2d(x, 1), p.weight[:, :, None, None], p.bias)[:, :, 0, 0]
        for x, p in zip(maps, gate.projections, strict=True)
    ]
    hidden, (last_h, last_c) = lstm(torch.stack(steps))
    expected = torch.sigmoid(hidden @ gate.proj.weight[0] + gate.proj.bias)
    state = None
    for layer, x in enumerate(maps):
        decision, state = gate(x, state, layer)
        close(decision.score, expected[layer])
        assert torch.equal(decision.mask, (expected[layer] > 0.5).double())
    close(state[0], last_h[0])
    close(state[1], last_c[0])


def test_recurrent_gate_keeps_nothing_between_calls():
    gate = randomized(gates.RecurrentGate([C, 4]))
    x = random_tensor(3, C, 2, 2)
    first, state = gate(x)
    second, _ = gate(random_tensor(3, 4), state)
    again, _ = gate(x)  # of another batch size in between
    gate(random_tensor(7, C))
    assert torch.equal(again.score, first.score)
    assert not torch.equal(gate(x, state)[0].score, first.score)  # but the state is read
    (second.mask.sum() + 0 * first.mask.sum()).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in gate.parameters() if p.dim() > 1)


def test_recurrent_gate_finds_the_projection_of_a_width():
    gate = randomized(gates.RecurrentGate([4, C, 8]))
    x = random_tensor(3, C)
    assert torch.equal(gate(x)[0].score, gate(x, layer=1)[0].score)
    twice = gates.RecurrentGate([4, C, C])
    with pytest.raises(
        ValueError, match=r"^layer: expected an index, as 6 channels are 2 times in \(4, 6, 6\)"
    ):
        twice(x)
    with pytest.raises(
        ValueError, match=r"^x: expected \[N, C, \.\.\.\], C of \(4, 6, 6\), got shape \(3, 5\)"
    ):
        twice(torch.rand(3, 5))
    with pytest.raises(ValueError, match=r"^x: expected \[N, 4, \.\.\.\], got shape \(3, 6\)"):
        twice(x, layer=0)
    with pytest.raises(ValueError, match=r"^layer: expected an int in \[0, 3\), got 3"):
        twice(x, layer=3)
    with pytest.raises(ValueError, match=r"^state: expected two \[3, 10\], got shape \(2, 10\)"):
        twice(x, (torch.zeros(2, 10), torch.zeros(2, 10)), layer=1)


@pytest.mark.parametrize("stride", [1, 2])
def test_spatial_gate_is_the_squeeze_unit(stride):
    gate = randomized(gates.SpatialGate(C, stride)).double().eval()
    x = random_tensor(4, C, 7, 6, dtype=torch.float64)
    local = F.conv2d(x, gate.conv.weight, gate.conv.bias, stride, 1)
    context = x.mean((2, 3)) @ gate.fc.weight[0] + gate.fc.bias
    logits = local + context.view(4, 1, 1, 1)
    mask, score = gate(x)
    assert mask.shape == (4, 1, -(-7 // stride), -(-6 // stride))
    assert torch.equal(mask, (logits > 0).double())
    close(score, torch.sigmoid(logits))
    gate.train()
    gates.set_temperature(gate, 0.5)
    torch.manual_seed(3)
    mask = gate(x).mask
    torch.manual_seed(3)
    assert torch.equal(mask, gates.gumbel_sigmoid(logits, 0.5).mask)


def test_spatial_halting_head():
    head = randomized(gates.SpatialHaltingHead(C)).double()
    x = random_tensor(4, C, 7, 6, dtype=torch.float64)
    context = x.mean((2, 3)) @ head.fc.weight[0]
    logits = F.conv2d(x, head.conv.weight, head.conv.bias, padding=1) + context.view(4, 1, 1, 1)
    close(head(x), torch.sigmoid(logits))
    score = gates.SpatialHaltingHead(C)(x.float())
    assert (score.logit() + 3).abs().max() < 0.1  # the authors' bias
    assert (gates.SpatialHaltingHead(C, bias=1.0)(x.float()).logit() - 1).abs().max() < 0.1


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.51, 1.0])
def test_channel_gate_is_fbs(keep):
    gate = randomized(gates.ChannelGate(C, 20, keep)).double()
    x = random_tensor(8, C, 3, 5, dtype=torch.float64).requires_grad_()
    saliency = (x.abs().mean((2, 3)) @ gate.fc.weight.T + gate.fc.bias).clamp_min(0)
    k = math.ceil(keep * 20)
    limit = saliency.sort(1, descending=True).values[:, k - 1 : k]
    expected = saliency * (saliency >= limit)
    mask, score = gate(x)
    close(score, saliency)
    close(mask, expected)
    assert torch.equal(mask != 0, (saliency >= limit) & (saliency > 0))
    close_gradients(mask, expected, [x, gate.fc.weight])


def test_channel_gate_starts_near_one_and_its_keep_can_fall():
    gate = gates.ChannelGate(C, 100, 0.07)
    x = random_tensor(3, C, 4, 4)
    assert (gate.fc.bias == 1).all()
    assert (gate(x).mask > 0).sum(1).tolist() == [7, 7, 7]  # 0.07 * 100 is a little over 7
    gate.keep = 0.02
    assert (gate(x).mask > 0).sum(1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"^keep: expected it in \(0, 1\], got 0"):
        gate.keep = 0


def test_gater_net_plans_all_layers():
    net = randomized(gates.GaterNet(Backbone(), 5, [4, 7, 1], 8)).double().eval()
    x = random_tensor(20, C, 9, 9, dtype=torch.float64)
    seen = net.backbone(x).mean((2, 3))
    hidden = norm(seen @ net.fc1.weight.T + net.fc1.bias, net.bn).clamp_min(0)
    logits = hidden @ net.fc2.weight.T + net.fc2.bias
    decisions = net(x)
    assert [d.mask.shape for d in decisions] == [(20, 4), (20, 7), (20, 1)]
    assert torch.equal(torch.cat([d.mask for d in decisions], 1), (logits > 0).double())
    close(torch.cat([d.score for d in decisions], 1), gates.saturating_sigmoid(logits))
    masks = torch.cat([d.mask for d in net.train()(x)], 1)
    soft = ((masks != 0) & (masks != 1)).any(1)
    assert 0 < soft.sum() < 20  # half of the samples, all their layers alike
    masks.sum().backward()
    assert net.backbone[0].weight.grad.norm() > 0


def test_policy_net_plans_all_layers():
    net = randomized(gates.PolicyNet(Backbone(), 5, 9)).double()
    x = random_tensor(20, C, 9, 9, dtype=torch.float64)
    probability = torch.sigmoid(net.backbone(x).mean((2, 3)) @ net.logit.weight.T + net.logit.bias)
    mask, score = net(x)
    close(score, probability)
    assert torch.equal(mask, (probability > 0.5).double())
    flat = gates.PolicyNet(nn.Flatten(), 12, 3)
    assert flat(random_tensor(2, 3, 4)).mask.shape == (2, 3)
    with pytest.raises(ValueError, match=r"^x: expected \[N, 12, \.\.\.\], got shape \(2, 8\)"):
        flat(random_tensor(2, 8))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("open_rate", [0.85, 0.3])
@torch.no_grad()
def test_initial_rate(name, open_rate):
    """Samples of a fresh head are open as often as asked; 0.85 where nothing is."""
    head = HEADS[name](**({} if open_rate == 0.85 else {"open_rate": open_rate}))
    x = random_tensor(120, C, 5, 5)
    decision = head(x)
    decision = decision[0] if name == "RecurrentGate" else decision
    if name == "GaterNet":
        masks = torch.cat([d.mask for d in decision], 1)
        draws, rate = masks.numel(), (masks > 0.5).float().mean()
    else:
        sampled = gates.sample_actions(decision.score)
        draws, rate = sampled.numel(), sampled.mean()
        assert (decision.score - open_rate).abs().max() < 0.02
    assert abs(rate - open_rate) < 5 * 0.5 / math.sqrt(draws)
    if name in ("PooledGate", "SpatialGate"):
        assert abs(decision.mask.mean() - open_rate) < 5 * 0.5 / math.sqrt(draws)


@pytest.mark.parametrize("name", ALL)
def test_eval_is_deterministic(name):
    head = ALL[name]().eval()
    x = random_tensor(6, C, 7, 7)
    state = torch.random.get_rng_state()
    first, again = outputs(head, x), outputs(head, x)
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.random.get_rng_state(), state)
    single = [t[2:3] for t in first]  # and each sample is decided by itself
    for mine, theirs in zip(outputs(head, x[2:3]), single, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(name, dtype):
    head = randomized(ALL[name]()).eval()
    x = random_tensor(5, C, 7, 7)
    reference = outputs(copy.deepcopy(head).double(), x.to(dtype).double())
    narrow = copy.deepcopy(head).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = outputs(narrow, x.to(dtype, memory_format=layout))
        for i, (mine, exact) in enumerate(zip(results, reference, strict=True)):
            assert mine.dtype == dtype and mine.shape == exact.shape
            # scores; masks jump where two roundings disagree
            if i == 1 or name == "SpatialHaltingHead":
                assert (mine.double() - exact).norm() <= 16 * torch.finfo(dtype).eps * max(1, exact.norm())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name, training):
    head = ALL[name]().train(training)
    x = random_tensor(5, C, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        results = outputs(head, x)
        if name == "RecurrentGate":
            (_, score), state = head(x)
            results += [*head(x, state)[0]]
    assert all(t.isfinite().all() for t in results)
    sum(t.float().sum() for t in results).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_no_sample(name, training):
    head = ALL[name]().train(training)
    before = copy.deepcopy(head.state_dict())
    for result in outputs(head, torch.zeros(0, C, 7, 7)):
        assert result.shape[0] == 0
    after = head.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "num_batches" not in key)


@pytest.mark.parametrize("name", ALL)
def test_nan_of_a_sample_is_its_own(name):
    head = ALL[name]().eval()
    x = random_tensor(3, C, 7, 7)
    x[1] = math.nan
    mask = outputs(head, x)[0]
    assert mask[1].isnan().all() and not mask[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", ["PooledGate", "RecurrentGate", "SpatialGate"])
def test_compiles_without_graph_breaks(name):
    head = randomized(ALL[name]()).train()
    gates_of = [m for m in head.modules() if isinstance(m, (gates.GumbelSigmoid, gates.GumbelSoftmax))]
    for gate in gates_of:
        gate.noise = False
    x = random_tensor(6, C, 7, 7)
    expected = outputs(head, x)
    actual = outputs(torch.compile(head, fullgraph=True, backend="aot_eager"), x)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_reset_leaves_the_backbone_alone():
    for make in (HEADS["GaterNet"], HEADS["PolicyNet"]):
        head = make()
        before = head.backbone[0].weight.clone()
        last = [p.clone() for p in head.parameters()][-2]
        head.reset_parameters()
        assert torch.equal(head.backbone[0].weight, before)
        assert not torch.equal(list(head.parameters())[-2], last)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gates.PooledGate(0), "channels: expected an int >= 1, got 0"),
        (lambda: gates.PooledGate(C, 1.5), "hidden: expected an int >= 1, got 1.5"),
        (lambda: gates.PooledGate(C, open_rate=1.0), r"open_rate: expected it in \(0, 1\), got 1.0"),
        (lambda: gates.PooledGate(C, temperature=0.0), "temperature: expected it finite and above 0, got 0.0"),
        (lambda: gates.RecurrentGate([]), "channels: expected at least one width, got none"),
        (lambda: gates.RecurrentGate([4, -1]), "channels: expected an int >= 1, got -1"),
        (lambda: gates.RecurrentGate([4], 0), "hidden: expected an int >= 1, got 0"),
        (lambda: gates.ConvGate(C, 3), r"form: expected 1 \(FFGate-I\) or 2 \(FFGate-II\), got 3"),
        (lambda: gates.ConvGate(C, open_rate=0), r"open_rate: expected it in \(0, 1\), got 0"),
        (lambda: gates.SpatialGate(C, 0), "stride: expected an int >= 1, got 0"),
        (lambda: gates.SpatialGate(True), "channels: expected an int >= 1, got True"),
        (lambda: gates.SpatialHaltingHead(C, bias=math.nan), "bias: expected it finite, got nan"),
        (lambda: gates.ChannelGate(C, 0, 0.5), "out_channels: expected an int >= 1, got 0"),
        (lambda: gates.ChannelGate(C, 4, 1.5), r"keep: expected it in \(0, 1\], got 1.5"),
        (lambda: gates.GaterNet(Backbone(), 5, []), "channels: expected those of at least one layer, got none"),
        (lambda: gates.GaterNet(Backbone(), 5, [4], 0), "bottleneck: expected an int >= 1, got 0"),
        (lambda: gates.PolicyNet(Backbone(), 5, 0), "layers: expected an int >= 1, got 0"),
        (lambda: gates.PooledGate(C)(torch.rand(3, 5)), r"x: expected \[N, 6, ...\], got shape \(3, 5\)"),
        (lambda: gates.PooledGate(C)(torch.rand(6)), r"x: expected \[N, 6, ...\], got shape \(6,\)"),
        (lambda: gates.SpatialGate(C)(torch.rand(3, C)), r"x: expected \[N, 6, H, W\], got shape \(3, 6\)"),
        (lambda: gates.ConvGate(C)(torch.rand(3, C, 1, 4)), r"x: expected H and W of at least 2, got shape \(3, 6, 1, 4\)"),
        (lambda: gates.GaterNet(Backbone(), 4, [3])(torch.rand(3, C, 7, 7)), r"x: expected \[N, 4, ...\], got shape \(3, 5, 3, 3\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("name", ALL)
def test_features_must_be_floating(name):
    if name in ("GaterNet", "PolicyNet"):
        with pytest.raises(TypeError, match=r"^backbone\(x\): expected a floating tensor, got torch\.int64"):
            kind = (
                gates.GaterNet(nn.Identity(), C, [4])
                if name == "GaterNet"
                else gates.PolicyNet(nn.Identity(), C, 4)
            )
            kind(torch.zeros(3, C, 7, 7, dtype=torch.int64))
    else:
        with pytest.raises(TypeError, match=r"^x: expected a floating tensor, got torch\.int64"):
            ALL[name]()(torch.zeros(3, C, 7, 7, dtype=torch.int64))
