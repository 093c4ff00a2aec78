"""MacCounter: who ran what. Skip, branches, exits, halting, steps; gradients; hooks, threads, exceptions."""

import pytest
import torch
from counting import BLOCK, block, count, images
from torch import nn

import dynops
from dynops import SamplePlan
from dynops.budget import MacCounter
from dynops.nn import ConvExperts, Skip, SparseConv2d
from dynops.ops import gather_samples, scatter_samples


def gate(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("open_", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_skip_and_the_gradient_of_its_gate(dense, mode, open_):
    layer, g = Skip(block(), mode=mode, dense=dense), gate(*open_)
    macs = count(layer, images(4), g)
    assert macs.per_sample.tolist() == [BLOCK * value for value in open_]
    assert macs.dense == 4 * BLOCK
    macs.per_sample[1:].sum().backward()
    assert g.grad.tolist() == [0, BLOCK, BLOCK, BLOCK]  # those that were skipped have their price too


@pytest.mark.parametrize("kind", ["bool", "plan", "capacity"])
def test_skip_without_a_gradient(kind):
    keep = torch.tensor([False, True, True, False, True])
    plan = SamplePlan.from_mask(keep, 4 if kind == "capacity" else None)
    macs = count(Skip(block()), images(5), keep if kind == "bool" else plan)
    assert macs.per_sample.tolist() == (keep * BLOCK).tolist()


def test_a_soft_gate_counts_as_open():
    g = gate(0.25, 0, 1.5)
    macs = count(Skip(block()), images(3), g)
    assert macs.per_sample.tolist() == [BLOCK, 0, BLOCK]


@pytest.mark.parametrize("open_", [[True, False, True], [True] * 3, [False] * 3])
def test_shortcuts_count_where_they_run(open_):
    layer = Skip(block(), nn.Conv2d(4, 4, 1), mode="replace")
    keep = torch.tensor(open_)
    macs = count(layer, images(3), keep)  # without a gradient the shortcut runs on the others
    dropped = ~keep if not keep.all() and keep.any() else torch.zeros(3) if keep.all() else torch.ones(3)
    assert macs.per_sample.tolist() == (keep * BLOCK + dropped * 256).tolist()
    macs = count(Skip(block(), nn.Conv2d(4, 4, 1)), images(3), keep)
    assert macs.per_sample.tolist() == (keep * BLOCK + 256).tolist()


class Nested(nn.Module):
    """A Skip of a 1x1 convolution and, where the second gate is open, a block."""

    def __init__(self, dense: bool = False):
        super().__init__()
        self.outer = Skip(self.Inner(dense), dense=dense)

    class Inner(nn.Module):
        def __init__(self, dense: bool):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(4, 4, 1), Skip(block(), dense=dense)

        def forward(self, state):
            x, g = state
            return self.inner(self.conv(x), g), g

    def forward(self, x, outer, inner):
        return self.outer((x, inner), outer)[0]


@pytest.mark.parametrize("dense", [False, True])
def test_nested_skips(dense):
    outer, inner = gate(1, 1, 0, 1, 0), gate(0, 1, 1, 1, 0)
    macs = count(Nested(dense), images(5), outer, inner)
    assert macs.per_sample.tolist() == [256, 256 + BLOCK, 0, 256 + BLOCK, 0]
    assert macs.dense == 5 * (256 + BLOCK)
    macs.total.backward()
    mean = 256 + 2 / 3 * BLOCK  # of those that ran, where nothing else is known
    priced = [256 + BLOCK, 256] if dense else [mean, mean]
    expected = [256, 256 + BLOCK, priced[0], 256 + BLOCK, priced[1]]
    torch.testing.assert_close(outer.grad, torch.tensor(expected, dtype=torch.float32))
    assert inner.grad.tolist() == [BLOCK, BLOCK, 0, BLOCK, 0]


def test_nested_skips_where_the_outer_one_is_closed():
    outer, inner = gate(0, 0), gate(0, 1)
    macs = count(Nested(), images(2), outer, inner)
    assert macs.total == 0 and macs.dense == 2 * (256 + BLOCK)
    macs.total.backward()
    assert outer.grad.tolist() == [256 + BLOCK] * 2
    assert macs.layers["outer.module.inner.module.0"].dense == 2 * BLOCK


def test_a_price_leaves_no_trace():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    layer = Skip(inner).train()
    before, state = {k: v.clone() for k, v in layer.state_dict().items()}, torch.random.get_rng_state()
    x = images(3)
    state = torch.random.get_rng_state()
    macs = count(layer, x, gate(0, 0, 0))
    assert macs.dense == 3 * 256
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_masks_inside_of_a_skip():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = SparseConv2d(4, 4, 1)

        def forward(self, state):
            x, mask = state
            return self.conv(x, mask), mask

    mask = (torch.rand(4, 1, 4, 4) < 0.5).float().requires_grad_()
    g = gate(1, 0, 1, 0)
    macs = count(Skip(Masked()), (images(4), mask), g)
    pixels = mask.detach().flatten(1).sum(1)
    assert macs.per_sample.tolist() == (pixels * 16 * g).tolist()
    macs.total.backward()
    mean = float(pixels[0] + pixels[2]) / 2
    assert g.grad.tolist() == [16 * float(pixels[0]), 16 * mean, 16 * float(pixels[2]), 16 * mean]
    assert torch.equal(mask.grad, (g.detach() * 16).view(4, 1, 1, 1).expand_as(mask))


def test_functions_that_gather():
    class Gathers(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.conv, self.fc = block(), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x, keep):
            plan = SamplePlan.from_mask(keep)
            rows = self.block(gather_samples(x, plan))
            rows = self.conv(rows * 2)  # a tensor that nobody knows: as many rows as were gathered last
            few = SamplePlan.from_mask(torch.arange(plan.num_rows) > 0)
            last = self.fc(gather_samples(rows, few).mean((2, 3)))  # those without the first
            return scatter_samples(last, few)

    keep = torch.tensor([True, False, True, True, False])
    macs = count(Gathers(), images(5), keep)
    first = torch.tensor([1, 0, 0, 0, 0])
    assert macs.per_sample.tolist() == (keep * (BLOCK + 256 + 12) - first * 12).tolist()
    assert macs.dense == 5 * (BLOCK + 256 + 12)


def test_branches():
    branches = [nn.Conv2d(4, 4, 1), block(), nn.Conv2d(4, 4, 3, padding=1, groups=4)]
    costs = torch.tensor([256.0, BLOCK, BLOCK / 4, 0])  # 3: dropped
    index = torch.tensor([[0, 1], [1, 3], [1, 0], [3, 3]])
    weight = torch.rand(4, 2, requires_grad=True)
    layer = ConvExperts(branches)
    macs = count(layer, images(4), index, weight)
    assert macs.per_sample.tolist() == costs[index].sum(1).tolist()
    assert macs.dense == 4 * float(costs.sum())  # the third one did not run
    macs.total.backward()
    assert torch.equal(weight.grad, costs[index])
    plan = dynops.ExpertPlan.from_topk(index, 3)
    assert count(layer, images(4), plan).per_sample.tolist() == costs[index].sum(1).tolist()


def test_branches_with_a_gate_of_their_own_and_those_that_nobody_chose():
    class Gate(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.fc, self.index = nn.Linear(4, 2), index

        def forward(self, x):
            self.fc(x.mean((2, 3)))
            return self.index, None

    layer = ConvExperts([nn.Conv2d(4, 4, 1), block()], Gate(torch.tensor([1, 0, 1])))
    assert count(layer, images(3)).per_sample.tolist() == [BLOCK + 8, 256 + 8, BLOCK + 8]
    layer.gate.index = torch.tensor([2, 2, 2])
    macs = count(layer, images(3))
    assert macs.per_sample.tolist() == [8, 8, 8]
    assert macs.dense == 3 * (8 + 256 + BLOCK)


def exits_where(*leave):
    """A criterion: sample n, which carries its number in x[n, 0, 0, 0], leaves at exit leave[n]."""
    leave = torch.tensor(leave)

    def criterion(logits, exit, state):
        return leave[state[:, 0, 0, 0].round().long()] <= exit

    return criterion


class Keeps(nn.Module):
    """A convolution whose output has its input's first channel: the number of a sample."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([x[:, :1], self.conv(x)[:, 1:]], 1)


class Head(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def numbered(n: int) -> torch.Tensor:
    x = images(n)
    x[:, 0] = torch.arange(n).view(-1, 1, 1)
    return x


@pytest.mark.parametrize("leave", [(0, 2, 1, 0), (0, 0, 0, 0), (2, 2, 2, 2), (1, 0, 1, 0)])
def test_early_exit(leave):
    exits = dynops.nn
    layer = exits.EarlyExit(
        [Keeps() for _ in range(3)], [Head() for _ in range(3)], exits_where(*leave)
    ).eval()
    macs = count(layer, numbered(4))
    assert macs.per_sample.tolist() == [(BLOCK + 12) * (1 + e) for e in leave]
    assert macs.dense == 4 * 3 * (BLOCK + 12)
    assert count(layer.train(), numbered(4)).total == macs.dense


@pytest.mark.parametrize("leave", [(0, 1, 0, 1), (0, 0, 0, 0)])
def test_cascade(leave):
    exits = dynops.nn
    models = [Head(), nn.Sequential(Keeps(), Head())]
    macs = count(exits.Cascade(models, exits_where(*leave)).eval(), numbered(4))
    assert macs.per_sample.tolist() == [12 + e * (BLOCK + 12) for e in leave]
    assert macs.dense == 4 * (BLOCK + 24)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, n):
        return self.fc(x)


class Score(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return torch.sigmoid(self.fc(x))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("level", ["sample", "position"])
def test_halting(dense, level):
    halting = dynops.nn
    layer = halting.Halting(Step(), Score(), max_steps=5, level=level, dense=dense)
    x = torch.randn(6, 4) * 3 if level == "sample" else torch.randn(2, 3, 4) * 3
    with MacCounter(layer) as macs:
        out = layer(x)
    steps = out.steps.double()
    each = steps * 16 + steps.clamp(max=4) * 4
    assert len(out.steps.unique()) > 1
    assert macs.per_sample.tolist() == (each if level == "sample" else each.sum(1)).tolist()
    assert macs.dense == x[..., 0].numel() * (5 * 16 + 4 * 4)
    grads = torch.autograd.grad(macs.total, list(layer.halt.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in grads)


def test_spatial_halting():
    halting, n = dynops.nn, 2
    units = [dynops.nn.SparseSequential(nn.Conv2d(4, 4, 1)) for _ in range(3)]
    heads = [nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid()) for _ in range(2)]
    layer = halting.SpatialHalting(units, heads)
    with MacCounter(layer) as macs:
        out = layer(torch.randn(n, 4, 4, 4) * 4)
    steps = out.steps.flatten(1)
    ran = sum((steps >= i).any() * 64 for i in (1, 2))
    assert len(steps.unique()) > 1
    assert macs.per_sample.tolist() == (steps.sum(1) * 16 + ran).tolist()
    assert macs.dense == n * (3 * 16 * 16 + 2 * 64)
    assert torch.autograd.grad(macs.total, heads[0][0].weight)[0].abs().sum() > 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("given_", [False, True])
def test_skip_rnn(grad, given_):
    layer = dynops.nn.SkipRNN(5, 7, num_layers=2, batch_first=True)
    nn.init.constant_(layer.gate.bias, -0.5)
    updates = (torch.rand(3, 6) < 0.5).float() if given_ else None
    with torch.set_grad_enabled(grad), MacCounter(layer) as macs:
        out = layer(torch.randn(3, 6, 5), updates=updates)
    step, done = 4 * 7 * (5 + 7) + 4 * 7 * 14, out.updates.detach().sum(1).double()
    gates = 0 if given_ else 7 * (1 + done)
    assert macs.per_sample.tolist() == pytest.approx((done * step + gates).tolist(), rel=1e-12)
    assert macs.dense == 3 * (6 * step + (0 if given_ else 7 * 7))
    if grad and not given_:
        assert torch.autograd.grad(macs.total, layer.gate.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("encoded", [False, True])
def test_jump_reader(encoded):
    reading = dynops.nn
    layer = reading.JumpReader(
        nn.LSTM(5, 7),
        reading.JumpPolicy(7, 3),
        read=2,
        max_jumps=3,
        encoder=nn.Linear(4, 5) if encoded else None,
    )
    with MacCounter(layer) as macs:
        out = layer(torch.randn(6, 12, 4 if encoded else 5), lengths=torch.tensor([12, 1, 0, 7, 12, 3]))
    step, policy = 4 * 7 * 12 + (20 if encoded else 0), 7 * 4
    expected = out.read * step + (out.actions >= 0).sum(1) * policy
    assert len(out.read.unique()) > 2
    assert macs.per_sample.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert macs.dense == 6 * (12 * step + 3 * policy)


@pytest.mark.parametrize("lengths", [None, [6, 2, 0]])
def test_skim_rnn(lengths):
    layer = dynops.nn.SkimRNN(5, 7, 3, batch_first=True)
    skim = (torch.rand(3, 6) < 0.5).float().requires_grad_()
    macs = count(layer, torch.randn(3, 6, 5), skim=skim, lengths=lengths)
    alive = torch.arange(6) < torch.tensor(lengths or [6, 6, 6])[:, None]
    big, small, gate_ = 4 * 7 * 12, 4 * 3 * 8, 2 * 12
    each = torch.where(skim > 0, small, big) * alive
    assert macs.per_sample.tolist() == (each + gate_ * alive).sum(1).tolist()
    macs.total.backward()
    assert torch.equal(skim.grad, (small - big) * alive.float())


def test_token_exits():
    exits = dynops.nn
    layer = exits.TokenExit(
        [exits.TokenEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)],
        [nn.Linear(8, 3) for _ in range(2)],
    ).eval()
    leave = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        macs = count(layer, torch.randn(3, 4, 8), exits=leave)
    token, keys = 64 + 2 * 4 * 8 + 64 + 2 * 8 * 16 + 3 * 8, 4 * 2 * 64
    later = leave.sum(1)
    expected = 4 * token + keys + later * token + (later > 0) * keys
    assert macs.per_sample.tolist() == expected.tolist()
    assert macs.dense == 3 * 2 * (4 * token + keys)


def test_halting_of_positions_that_read_others():
    halting = dynops.nn

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.query = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden, plan, n):
            keys = self.keys(hidden).mean(1)
            return (
                self.query(gather_samples(hidden.flatten(0, 1), plan))
                + keys[plan.index.long() // hidden.shape[1]]
            )

    layer = halting.Halting(Mixes(), Score(), 3, level="position", mixes=True)
    with MacCounter(layer) as macs:
        steps = layer(torch.randn(2, 5, 4) * 3).steps.double()
    each = (steps * 16 + steps.clamp(max=2) * 4).sum(1)
    assert macs.per_sample.tolist() == (each + steps.max() * 5 * 16).tolist()
