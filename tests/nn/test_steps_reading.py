"""JumpReader, its policies, StepSelection and its neighbours, against loops over single sequences."""

import math

import pytest
import torch
from comparison import same_up_to_rounding as assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn.steps.frames import StepSelection, encode_steps, gather_steps
from dynops.nn.steps.reading import Jump, JumpPolicy, JumpReader, LocationPolicy

pytestmark = pytest.mark.usefixtures("poisoned")

IN, HIDDEN = 4, 6
LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def reader_of(kind="LSTM", layers=1, *, policy=None, jumps=(4, 0), **options) -> JumpReader:
    rnn = LAYERS[kind](IN, HIDDEN, layers, dtype=torch.float64)
    reader = JumpReader(rnn, policy or JumpPolicy(HIDDEN, *jumps, dtype=torch.float64), **options)
    with torch.no_grad():
        for tensor in reader.parameters():
            if tensor.is_floating_point():
                tensor.copy_(0.8 * torch.randn(tensor.shape))
    return reader


def read_alone(reader: JumpReader, x: Tensor, actions: list[int] | None) -> dict:
    """One sequence, step by step: its own jumps (eval), or those given."""
    policy, rnn, state, start, length = reader.policy, reader.rnn, None, 0, len(x)
    found = {"actions": [], "starts": [], "read": 0, "log_prob": [], "features": []}
    for jump in range(reader.max_jumps + 1):
        found["starts"].append(start)
        for position in range(start, min(start + reader.read, length)):
            out, state = rnn(x[position][None, None], state)  # [1, 1, H]
            found["read"] += 1
            last = position
        if jump == reader.max_jumps:
            break
        log_probs = torch.log_softmax(policy.linear(out[0, 0]), 0)
        action = int(log_probs.argmax()) if actions is None else actions[jump]
        found["actions"].append(action)
        found["log_prob"].append(log_probs[action])
        found["features"].append(out[0, 0])
        if action == 0:
            break
        start = last + action if action <= policy.max_jump else max(last + 1 - (action - policy.max_jump), 0)
        if start >= length:
            break
    return found | {"state": state}


def padded(values: list, size: int, fill: int) -> list:
    return values + [fill] * (size - len(values))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind, layers, read, jumps, max_jumps",
    [
        ("LSTM", 1, 2, (4, 0), 5),
        ("LSTM", 2, 1, (3, 2), 6),
        ("GRU", 1, 3, (2, 0), 0),
        ("RNN", 1, 1, (1, 0), 9),
    ],
)
def test_reads_like_the_paper(kind, layers, read, jumps, max_jumps, training):
    reader = reader_of(kind, layers, jumps=jumps, read=read, max_jumps=max_jumps).train(training)
    x = torch.randn(6, 11, IN, dtype=torch.float64, requires_grad=True)
    lengths = [11, 0, 1, 8, 10, 5]
    out = reader(x, lengths=torch.tensor(lengths))
    expected_logs, total = [], 0.0
    for b, length in enumerate(lengths):
        if length == 0:
            assert (out.output[b] == 0).all()
            assert (out.starts[b] == -1).all() and (out.actions[b] == -1).all()
            assert out.read[b] == 0
            continue
        actions = [int(a) for a in out.actions[b] if a >= 0] if training else None
        alone = read_alone(reader, x[b, :length], actions)
        assert out.actions[b].tolist() == padded(alone["actions"], max_jumps, -1)
        assert out.starts[b].tolist() == padded(alone["starts"], max_jumps + 1, -1)
        assert int(out.read[b]) == alone["read"]
        hidden, last = (s if kind == "LSTM" else (s,) for s in (out.state, alone["state"]))
        for actual, expected in zip(hidden, last, strict=True):
            assert_close(actual[:, b], expected[:, 0])
        assert_close(out.output[b], hidden[0][-1, b])
        taken = len(alone["actions"])
        for j in range(taken):
            assert_close(out.log_prob[b, j], alone["log_prob"][j])
            assert_close(out.features[b, j], alone["features"][j])
        assert not out.log_prob[b, taken:].any()
        assert not out.entropy[b, taken:].any()
        expected_logs += alone["log_prob"]
        total = total + last[0][-1].sum()
    inputs = [x, *reader.parameters()]
    expected = torch.autograd.grad(total + sum(expected_logs), inputs, allow_unused=True)
    actual = torch.autograd.grad(out.output.sum() + out.log_prob.sum(), inputs, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(
            torch.zeros(1) if a is None or not a.any() else a,
            torch.zeros(1) if e is None or not e.any() else e,
        )


class Script(nn.Module):
    """A policy that reads its decisions off a table of next steps; -1 stops."""

    def __init__(self, table: list[list[int]]):
        super().__init__()
        self.table, self.calls = torch.tensor(table), 0

    def forward(self, h, position, length):
        start = self.table[self.calls][: len(h)]
        self.calls += 1
        return Jump(start.abs(), start, start < 0, h[:, 0], h[:, 0])


def test_own_policy_and_what_is_encoded():
    """The encoder sees the steps that are read, once each time, and no other."""
    seen = []

    class Encoder(nn.Module):
        def forward(self, rows):
            seen.append(rows[:, 0, 0, 0].tolist())
            return rows.mean((2, 3))

    x = torch.arange(20.0, dtype=torch.float64).view(1, 20, 1, 1, 1).expand(1, 20, IN, 2, 2)
    reader = reader_of(policy=Script([[7], [3], [19], [-1]]), read=2, max_jumps=5, encoder=Encoder())
    out = reader(x)
    assert seen == [[0, 1], [7, 8], [3, 4], [19]]
    assert out.starts.tolist() == [[0, 7, 3, 19, -1, -1]]
    assert out.read.tolist() == [7]
    steps = x[0, [0, 1, 7, 8, 3, 4, 19]].mean((2, 3))
    assert_close(out.output[0], reader.rnn(steps[:, None])[0][-1, 0])


def test_tokens_state_and_embedding():
    reader = reader_of("GRU", encoder=nn.Embedding(30, IN, dtype=torch.float64), read=3, max_jumps=0)
    tokens, state = torch.randint(0, 30, (2, 9)), torch.randn(1, 2, HIDDEN, dtype=torch.float64)
    out = reader(tokens, state)
    expected, _ = reader.rnn(reader.encoder(tokens[:, :3]).transpose(0, 1), state)
    assert_close(out.output, expected[-1])
    assert out.log_prob.shape == out.actions.shape == (2, 0)
    assert out.features.shape == (2, 0, HIDDEN)


@pytest.mark.parametrize("batch, steps", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_read(batch, steps):
    out = reader_of(read=2, max_jumps=3)(torch.zeros(batch, steps, IN, dtype=torch.float64))
    assert out.output.shape == (batch, HIDDEN)
    assert (out.output == 0).all() and (out.read == 0).all() and (out.actions == -1).all()
    assert out.log_prob.shape == (batch, 3) and out.features.shape == (batch, 3, HIDDEN)


def test_nan_stops():
    reader = reader_of(read=1, max_jumps=4)
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    x[0, 0] = torch.nan
    for training in (True, False):
        out = reader.train(training)(x)
        assert out.actions[0].tolist() == [0, -1, -1, -1]
        assert out.log_prob.isfinite().all() and out.entropy.isfinite().all()
    located = reader_of(policy=LocationPolicy(HIDDEN, dtype=torch.float64), max_jumps=4)
    assert located(x).read[0] == 1


def test_sampling_follows_the_softmax_and_reinforce_has_its_gradient():
    policy = JumpPolicy(2, 2, 1)
    h = torch.randn(1, 2).expand(20000, 2)
    where = torch.full((20000,), 5)
    jump = policy(h, where, where)
    probability = torch.softmax(policy.linear(h[0]), 0)
    counts = torch.bincount(jump.action, minlength=4) / 20000
    assert (counts - probability).abs().max() < 0.02  # 5.6 standard deviations of the largest
    assert torch.equal(jump.start, torch.tensor([4, 5, 6, 4])[jump.action])
    assert torch.equal(jump.stop, jump.action == 0)
    torch.testing.assert_close(jump.entropy[0], -(probability * probability.log()).sum())
    torch.testing.assert_close(jump.log_prob.exp(), probability[jump.action])


def test_location_policy():
    policy = LocationPolicy(HIDDEN, std=0.2)
    h = torch.randn(20000, HIDDEN)
    position, length = torch.zeros(20000, dtype=torch.int64), torch.full((20000,), 1001)
    mean = torch.sigmoid(policy.linear(h)).squeeze(1)
    jump = policy.eval()(h, position, length)
    assert torch.equal(jump.start, torch.round(mean * 1000).long())
    assert not jump.stop.any()
    jump = policy.train()(h, position, length)
    inside = (jump.start > 0) & (jump.start < 1000)
    place = jump.start[inside] / 1000
    expected = torch.distributions.Normal(mean[inside], 0.2)
    assert (jump.log_prob[inside] - expected.log_prob(place)).abs().max() < 0.06  # a step of 0.001
    torch.testing.assert_close(jump.entropy[0], expected.entropy()[0])
    noise = ((place - mean[inside]) / 0.2)[(mean[inside] - 0.5).abs() < 0.05]
    assert abs(noise.std().item() - 1) < 0.1
    stopping = LocationPolicy(HIDDEN, stop=lambda h: h[:, 0] > 0)
    assert torch.equal(stopping(h, position, length).stop, h[:, 0] > 0)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 4),
    steps=st.integers(0, 7),
    k=st.integers(0, 8),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_selection(batch, steps, k, density, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, steps, 2, 3, dtype=torch.float64, requires_grad=True)
    mask, scores = torch.rand(batch, steps) < density, torch.randn(batch, steps)
    scores[torch.rand(batch, steps) < 0.2] = torch.nan
    lengths = torch.randint(0, steps + 1, (batch,))
    by_mask = [[t for t in range(steps) if mask[b, t]] for b in range(batch)]
    by_score = []
    for b in range(batch):
        ranked = [t for t in range(int(lengths[b])) if not scores[b, t].isnan()]
        by_score.append(sorted(sorted(ranked, key=lambda t, b=b: -float(scores[b, t]))[:k]))
    cases = [
        (StepSelection.from_mask(mask.float()), by_mask, max(map(len, by_mask), default=0)),
        (StepSelection.from_topk(scores, k, lengths), by_score, min(k, steps)),
    ]
    for selection, wanted, slots in cases:
        assert selection.index.tolist() == [padded(w, slots, -1) for w in wanted]
        assert selection.counts.tolist() == [len(w) for w in wanted]
        rows = selection.gather(x)
        flat = [x[b, t] for b in range(batch) for t in wanted[b]]
        assert torch.equal(rows, torch.stack(flat) if flat else x.new_zeros(0, 2, 3))
        out = selection.pad(rows)
        assert out.shape == (batch, slots, 2, 3)
        expected = torch.zeros_like(out)
        for b, w in enumerate(wanted):
            for s, t in enumerate(w):
                expected[b, s] = x[b, t]
        assert torch.equal(out, expected)
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad((out * weight).sum(), x)
        chosen = torch.zeros_like(x)
        for b, w in enumerate(wanted):
            for s, t in enumerate(w):
                chosen[b, t] = weight[b, s]
        assert torch.equal(grad, chosen)
        assert torch.equal(gather_steps(x, selection.index), expected)


def test_gather_steps_repeats_and_any_order():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, 0, 0, -1], [2, 2, -1, 1]])
    out = gather_steps(x, index)
    for b in range(2):
        for s, t in enumerate(index[b].tolist()):
            assert torch.equal(out[b, s], x[b, t] if t >= 0 else torch.zeros(3).double())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[..., 0].tolist() == [[2, 0, 0, 0, 1], [0, 1, 2, 0, 0]]
    assert gather_steps(torch.arange(6).view(2, 3), torch.tensor([[2], [-1]])).tolist() == [[2], [0]]


def test_infinite_scores_are_scores():
    scores = torch.tensor([[torch.nan, -math.inf, 1.0, torch.nan], [math.inf, -math.inf, torch.nan, -1.0]])
    assert StepSelection.from_topk(scores, 2).index.tolist() == [[1, 2], [0, 3]]
    assert StepSelection.from_topk(scores, 4).index.tolist() == [[1, 2, -1, -1], [0, 1, 3, -1]]


def test_encoder_runs_once_on_selected_frames():
    seen = []
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    frames, scores = torch.randn(2, 6, 3, 8, 8), torch.rand(2, 6)
    selection = StepSelection.from_topk(scores, 2, [6, 1])
    out = encode_steps(encoder.eval(), frames, selection)
    assert seen == [3]
    assert out.shape == (2, 2, 4)
    assert (out[1, 1] == 0).all()
    torch.testing.assert_close(out[0], encoder(frames[0, selection.index[0]]))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    none = encode_steps(encoder.train(), frames, StepSelection.from_index(torch.full((2, 3), -1), 6))
    assert none.shape == (2, 3, 4) and (none == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


WRONG = {
    "rnn: expected nn.LSTM": (TypeError, lambda: JumpReader(nn.GRUCell(2, 3), JumpPolicy(3, 2), max_jumps=1)),
    "rnn: expected one": (ValueError, lambda: JumpReader(nn.GRU(2, 3, bidirectional=True), JumpPolicy(3, 2), max_jumps=1)),
    "read: expected": (ValueError, lambda: reader_of(read=0, max_jumps=1)),
    "max_jumps: expected": (ValueError, lambda: reader_of(max_jumps=-1)),
    "max_jump: expected": (ValueError, lambda: JumpPolicy(3, 0)),
    "std: expected": (ValueError, lambda: LocationPolicy(3, 0.0)),
    "x: expected a tensor": (TypeError, lambda: reader_of(max_jumps=1)(torch.zeros(3))),
    "x: expected .B, T, 4": (ValueError, lambda: reader_of(max_jumps=1)(torch.zeros(3, 2, 5))),
    "state: expected shapes": (ValueError, lambda: reader_of(max_jumps=1)(torch.zeros(3, 2, IN), torch.zeros(1, 3, HIDDEN))),
    "lengths: expected values": (ValueError, lambda: reader_of(max_jumps=1)(torch.zeros(2, 2, IN), lengths=[1, 3])),
    "index: expected integers": (TypeError, lambda: StepSelection.from_index(torch.zeros(2, 2), 3)),
    "index: expected values in": (ValueError, lambda: StepSelection.from_index(torch.full((2, 2), 3), 3)),
    "index: expected .2, S": (ValueError, lambda: gather_steps(torch.zeros(2, 3), torch.zeros(3, 1, dtype=torch.int64))),
    "mask: expected numbers": (ValueError, lambda: StepSelection.from_mask(torch.full((2, 2), torch.nan))),
    "mask: expected .B, T": (ValueError, lambda: StepSelection.from_mask(torch.ones(2))),
    "scores: expected a floating": (TypeError, lambda: StepSelection.from_topk(torch.ones(2, 2).long(), 1)),
    "k: expected": (ValueError, lambda: StepSelection.from_topk(torch.ones(2, 2), -1)),
    "rows: expected .4": (ValueError, lambda: StepSelection.from_topk(torch.ones(2, 2), 2).pad(torch.ones(3, 1))),
    "x: expected .2, 2, ...": (ValueError, lambda: StepSelection.from_topk(torch.ones(2, 2), 2).gather(torch.ones(2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    kind, call = WRONG[message]
    with pytest.raises(kind, match=message):
        call()
