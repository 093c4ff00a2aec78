"""SkipRNN and compacted_cell, against loops over single sequences with PyTorch's cells in float64."""

import pytest
import torch
from comparison import same_up_to_rounding as assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dynops
from dynops.nn.steps.cells import compacted_cell
from dynops.nn.steps.rnn import SkipRNN, SkipState
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

IN, HIDDEN = 5, 7
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


def skip_rnn(mode="LSTM", layers=1, *, seed=0, dtype=torch.float64, bias=True, **options) -> SkipRNN:
    """A layer whose gates are open at some steps and closed at others."""
    torch.manual_seed(seed)
    layer = SkipRNN(IN, HIDDEN, layers, bias, True, mode=mode, dtype=dtype, **options)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(0.7 * torch.randn(tensor.shape))
        layer.gate.weight.mul_(2)
        layer.gate.bias.fill_(-0.5)
    return layer


def cells_of(layer: SkipRNN) -> list[nn.Module]:
    made = []
    for index in range(layer.num_layers):
        size = IN if index == 0 else HIDDEN
        kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}.get(layer.mode)
        if kind is None:
            cell = nn.RNNCell(size, HIDDEN, layer.bias, layer.mode[4:].lower(), dtype=torch.float64)
        else:
            cell = kind(size, HIDDEN, layer.bias, dtype=torch.float64)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if layer.bias else 2]:
            setattr(cell, name, getattr(layer, f"{name}_l{index}"))
        made.append(cell)
    return made


def read_alone(
    layer, x: Tensor, decisions: Tensor | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """One sequence ``[T, I]`` by the paper's equations: outputs ``[T, H]`` and updates ``[T]``.

    ``exact=False`` drops the gradient of a closed gate through the state.
    """
    cells = cells_of(layer)
    lstm = layer.mode == "LSTM"
    zeros = x.new_zeros(1, HIDDEN)
    states = [((zeros, zeros) if lstm else (zeros,)) for _ in cells]
    p, outputs, updates = x.new_ones(()), [], []
    for t, x_t in enumerate(x):
        if decisions is None:
            u = torch.round(p.detach()) + (p - p.detach())
        else:
            u = decisions[t]
        mixing = u if exact or u.item() != 0 else u.detach()
        below, after = x_t[None], []
        for cell, state in zip(cells, states, strict=True):
            new = cell(below, state if lstm else state[0])
            new = new if lstm else (new,)
            below = new[0]
            after.append(tuple(mixing * a + (1 - mixing) * b for a, b in zip(new, state, strict=True)))
        states = after
        rate = torch.sigmoid(layer.gate(states[-1][-1]))[0, 0]
        p = u * rate + (1 - u) * (p + torch.minimum(rate, 1 - p))
        outputs.append(states[-1][0][0])
        updates.append(u)
    return torch.stack(outputs), torch.stack(updates)


def reference(layer, x: Tensor, lengths: list[int], updates=None, exact=True) -> tuple[Tensor, Tensor]:
    output, gates = x.new_zeros(*x.shape[:2], HIDDEN), x.new_zeros(x.shape[:2])
    for b, length in enumerate(lengths):
        if length:
            given = None if updates is None else updates[b, :length]
            out, u = read_alone(layer, x[b, :length], given, exact)
            output = torch.cat(
                [output[:b], nn.functional.pad(out, (0, 0, 0, x.shape[1] - length))[None], output[b + 1 :]]
            )
            gates = torch.cat(
                [gates[:b], nn.functional.pad(u, (0, x.shape[1] - length))[None], gates[b + 1 :]]
            )
    return output, gates


def gradients(values: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    total = sum((value * torch.randn_like(value)).sum() for value in values)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


LENGTHS = [9, 0, 4, 7]


def mixed_case(mode: str, layers: int) -> tuple[SkipRNN, Tensor]:
    """The first random layer and input with both kinds of steps, and with more than one update of a sequence."""
    for seed in range(50):
        layer = skip_rnn(mode, layers, seed=seed)
        x = torch.randn(4, 9, IN, dtype=torch.float64)
        with torch.no_grad():
            updates = layer(x, lengths=LENGTHS).updates.sum(1)
        if 6 <= updates.sum() <= 15 and updates.max() > 3:
            return layer, x
    raise AssertionError("no case with both kinds of steps")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["update by update", "step by step", "dense"])
def test_own_gate_follows_the_paper(mode, layers, form):
    layer, x = mixed_case(mode, layers)
    layer.dense = form == "dense"
    x.requires_grad_(form != "update by update")
    with torch.set_grad_enabled(form != "update by update"):
        out = layer(x, lengths=LENGTHS)
    output, updates = reference(layer, x, LENGTHS, exact=form == "dense")
    assert torch.equal(out.updates, updates)
    assert_close(out.output, output)
    if form != "update by update":
        inputs = [x, *layer.parameters()]
        found = gradients((out.output, out.updates), inputs)
        for actual, expected in zip(found, gradients((output, updates), inputs), strict=True):
            assert_close(actual, expected)
            assert expected.norm() > 0


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["bool", "float", "soft", "dense"])
def test_given_decisions(mode, layers, form):
    layer = skip_rnn(mode, layers, dense=form == "dense")
    x = random_tensor(4, 9, IN, dtype=torch.float64).requires_grad_()
    keep = torch.rand(4, 9) < 0.5
    keep[2] = False
    values = keep.double() * (torch.rand(4, 9).double() if form == "soft" else 1)
    values.requires_grad_(form != "bool")
    out = layer(x, updates=keep if form == "bool" else values, lengths=LENGTHS)
    output, gates = reference(layer, x, LENGTHS, values, exact=form == "dense")
    assert_close(out.output, output)
    assert_close(out.updates, gates)
    names = [n for n, _ in layer.named_parameters() if not n.startswith("gate")]
    inputs = [x, *(layer.get_parameter(name) for name in names)]
    inputs += [] if form == "bool" else [values]
    for actual, expected in zip(gradients((out.output,), inputs), gradients((output,), inputs), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_open_gates_are_pytorchs_layer(mode, batch_first, bias):
    options = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
    dense = LAYERS[mode](IN, HIDDEN, 2, bias=bias, batch_first=batch_first, dtype=torch.float64, **options)
    layer = SkipRNN.from_dense(dense)
    x = random_tensor(6, 3, IN, dtype=torch.float64)
    expected, state = dense(x)
    for u in (torch.ones(6, 3), torch.ones(6, 3, requires_grad=True)):
        out = layer(x, updates=u)
        assert_close(out.output, expected)
        assert_close(out.state.hidden, state)
    nn.init.constant_(layer.gate.bias, 30.0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = layer(x)
        assert_close(out.output, expected)
        assert_close(out.state.hidden, state)
        assert out.updates.all()


def test_from_dense_shares_parameters_and_keys():
    dense = nn.LSTM(IN, HIDDEN, 2).eval()
    layer = SkipRNN.from_dense(dense)
    assert layer.weight_hh_l1 is dense.weight_hh_l1
    assert not layer.training
    assert set(layer.state_dict()) == {*dense.state_dict(), "gate.weight", "gate.bias"}
    missing = SkipRNN(IN, HIDDEN, 2).load_state_dict(dense.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert layer.gate.bias.item() == SkipRNN(IN, HIDDEN).gate.bias.item() == 1
    for cell in (
        nn.LSTMCell(IN, HIDDEN),
        nn.GRUCell(IN, HIDDEN, bias=False),
        nn.RNNCell(IN, HIDDEN, nonlinearity="relu"),
    ):
        layer = SkipRNN.from_dense(cell, batch_first=True)
        x, h = random_tensor(3, 1, IN), random_tensor(1, 3, HIDDEN)
        lstm = isinstance(cell, nn.LSTMCell)
        expected = cell(x[:, 0], (h[0], h[0]) if lstm else h[0])
        out = layer(x, (h, h) if lstm else h, torch.ones(3, 1))
        torch.testing.assert_close(out.output[:, 0], expected[0] if lstm else expected)
    layer.reset_parameters()
    assert layer.gate.bias.item() == 1


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(0, 5),
    steps=st.integers(0, 8),
    mode=st.sampled_from(MODES),
    layers=st.integers(1, 2),
    batch_first=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_all_forms_agree(batch, steps, mode, layers, batch_first, density, seed):
    layer = skip_rnn(mode, layers, seed=seed)
    layer.batch_first = batch_first
    shape = (batch, steps) if batch_first else (steps, batch)
    x = random_tensor(*shape, IN, dtype=torch.float64)
    lengths = torch.randint(0, steps + 1, (batch,))
    u = (torch.rand(shape) < density).double()

    def everything(out):
        hidden = out.state.hidden if mode == "LSTM" else (out.state.hidden,)
        return out.output, out.updates, out.state.probability, *hidden

    with torch.no_grad():
        own, given = everything(layer(x, lengths=lengths)), everything(layer(x, updates=u, lengths=lengths))
    scaled = everything(layer(x, updates=u.clone().requires_grad_(), lengths=lengths))
    stepped = everything(layer(x.clone().requires_grad_(), lengths=lengths))
    layer.dense = True
    own_dense, given_dense = everything(layer(x, lengths=lengths)), everything(layer(x, None, u, lengths))
    for a, b in [(own, stepped), (own, own_dense), (given, scaled), (given, given_dense)]:
        assert_close(a, tuple(tensor.detach() for tensor in b))
    assert own[0].shape == (*shape, HIDDEN)
    assert own[1].shape == shape


@pytest.mark.parametrize("form", ["update by update", "step by step", "dense"])
def test_a_stream_in_pieces(form):
    layer = skip_rnn("LSTM", 2, dense=form == "dense")
    x = random_tensor(3, 12, IN, dtype=torch.float64)
    with torch.set_grad_enabled(form != "update by update"):
        whole = layer(x)
        state, outputs, updates = None, [], []
        for piece in (x[:, :1], x[:, 1:6], x[:, 6:6], x[:, 6:]):
            out = layer(piece, state)
            state = out.state
            outputs.append(out.output)
            updates.append(out.updates)
    assert torch.equal(torch.cat(updates, 1), whole.updates)
    assert_close(torch.cat(outputs, 1), whole.output)
    assert_close(state, whole.state)


def test_only_updates_are_computed(monkeypatch):
    """Rows that the cells see are the updates, no more."""
    layer, rows = skip_rnn(), []
    import dynops.nn.steps.rnn as steps_module

    def counted(mode, weights, x, state):
        rows.append(len(x))
        return dynops.nn.steps.cells.run_cells(mode, weights, x, state)

    monkeypatch.setattr(steps_module, "run_cells", counted)
    x = torch.randn(4, 9, IN, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x, lengths=LENGTHS)
    assert sum(rows) == int(out.updates.sum())
    assert len(rows) == int(out.updates.sum(1).max())  # sequences go at their own pace
    rows.clear()
    out = layer(x, lengths=LENGTHS)
    assert sum(rows) == int(out.updates.sum()) < sum(LENGTHS)


def test_decisions_from_a_callable():
    layer = skip_rnn("GRU")
    agent = nn.Linear(IN + HIDDEN, 1).double()
    seen = []

    def decide(x_t, h):
        logit = agent(torch.cat([x_t, h], 1)).squeeze(1)
        seen.append((logit > 0).detach())
        hard = (logit > 0).double()
        return hard + (torch.sigmoid(logit) - torch.sigmoid(logit).detach())

    x = random_tensor(4, 9, IN, dtype=torch.float64)
    out = layer(x, updates=decide)
    keep = torch.stack(seen, 1)
    assert 0 < int(keep.sum()) < keep.numel()
    assert torch.equal(out.updates.detach() != 0, keep)
    assert_close(out.output, layer(x, updates=keep).output)
    out.output.sum().backward()
    assert agent.weight.grad.norm() > 0


def test_nan_gates_and_inputs():
    layer = skip_rnn("GRU")
    x = random_tensor(2, 6, IN, dtype=torch.float64)
    x[0, 0] = torch.nan  # its state is NaN from here on, so that its gate is too
    clean = layer(x[1:]).output
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = layer(x)
        assert out.updates[0].tolist() == [1, 0, 0, 0, 0, 0]
        assert_close(out.output[1:], clean)
    keep = torch.tensor([[False] + [True] * 5] * 2)
    assert layer(x, updates=keep).output.isfinite().all()  # what is skipped is not read
    u = torch.ones(2, 6)
    u[1, 3] = torch.nan
    with pytest.raises(ValueError, match="updates: expected numbers, got NaN"):
        layer(x, updates=u)


def test_padding_is_not_read():
    for dense in (False, True):
        layer = skip_rnn(dense=dense)
        x = random_tensor(2, 6, IN, dtype=torch.float64)
        x[1, 3:] = torch.nan
        x.requires_grad_()
        out = layer(x, lengths=[6, 3])
        grads = gradients((out.output, *out.state.hidden), [x, layer.weight_hh_l0])
        assert all(value.isfinite().all() for value in (out.output, *out.state.hidden, *grads))
        assert (out.output[1, 3:] == 0).all()


@pytest.mark.parametrize("dense", [False, True])
def test_compacted_cell(dense):
    cell = nn.LSTMCell(IN, HIDDEN, dtype=torch.float64)
    x = random_tensor(5, IN, dtype=torch.float64)
    state = tuple(random_tensor(5, HIDDEN, dtype=torch.float64) for _ in range(2))
    for keep in ([1, 0, 0, 1, 1], [0] * 5, [1] * 5):
        keep = torch.tensor(keep)
        new = cell(x, state)
        expected = tuple(torch.where(keep[:, None] != 0, a, b) for a, b in zip(new, state, strict=True))
        for update in (keep, keep.bool(), keep.double(), dynops.SamplePlan.from_mask(keep)):
            assert_close(compacted_cell(cell, x, state, update, dense=dense), expected)


def test_compacted_cell_gradients():
    cell = nn.GRUCell(3, 4, dtype=torch.float64)
    x, h = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 4).double().requires_grad_()
    u = torch.tensor([0.3, 0.9, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h, u: compacted_cell(cell, x, h, u), (x, h, u))


WRONG = {
    "x: expected a floating": (TypeError, lambda m, x: m(x.long())),
    "PackedSequence": (TypeError, lambda m, x: m(nn.utils.rnn.pack_padded_sequence(x, [4, 4, 4], True))),
    "x: expected .B, T, 5": (ValueError, lambda m, x: m(x[0])),
    "state: expected .h, c": (TypeError, lambda m, x: m(x, torch.zeros(1, 3, HIDDEN))),
    "state: expected .1, 3, 7": (ValueError, lambda m, x: m(x, (torch.zeros(1, 2, HIDDEN),) * 2)),
    "state: expected a probability": (ValueError, lambda m, x: m(x, SkipState((torch.zeros(1, 3, HIDDEN),) * 2, x[0]))),
    "updates: expected a real tensor": (TypeError, lambda m, x: m(x, updates=[1])),
    "updates: expected .3, 4": (ValueError, lambda m, x: m(x, updates=torch.ones(4, 3))),
    "lengths: expected integers": (TypeError, lambda m, x: m(x, lengths=torch.ones(3))),
    "lengths: expected .3": (ValueError, lambda m, x: m(x, lengths=[1, 2])),
    "lengths: expected values in .0, 4": (ValueError, lambda m, x: m(x, lengths=[1, 2, 5])),
    "mode: expected one of": (ValueError, lambda m, x: SkipRNN(IN, HIDDEN, mode="lstm")),
    "expected bidirectional=False": (ValueError, lambda m, x: SkipRNN.from_dense(nn.LSTM(2, 3, bidirectional=True))),
    "expected dropout=0": (ValueError, lambda m, x: SkipRNN.from_dense(nn.LSTM(2, 3, 2, dropout=0.5))),
    "layer: expected nn.LSTM": (TypeError, lambda m, x: SkipRNN.from_dense(nn.Linear(2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    kind, call = WRONG[message]
    with pytest.raises(kind, match=message):
        call(SkipRNN(IN, HIDDEN, batch_first=True), random_tensor(3, 4, IN))
