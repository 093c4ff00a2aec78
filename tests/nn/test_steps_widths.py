"""partial_update, prefix_mask and SkimRNN, against loops over single samples in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparison import same_up_to_rounding as assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn.steps.widths import SkimRNN, partial_update, prefix_mask

pytestmark = pytest.mark.usefixtures("poisoned")

IN, HIDDEN, SMALL = 5, 8, 3
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


def cell_of(mode: str, bias: bool = True) -> nn.Module:
    if mode.startswith("RNN"):
        return nn.RNNCell(IN, HIDDEN, bias, mode[4:].lower(), dtype=torch.float64)
    return {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[mode](IN, HIDDEN, bias, dtype=torch.float64)


def states(mode: str, *shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64) for _ in range(2 if mode == "LSTM" else 1))


def small_cell(cell: nn.Module, width: int, features: int) -> nn.Module:
    """A cell of PyTorch's made of the upper left parts of the weights."""
    options = (cell.nonlinearity,) if isinstance(cell, nn.RNNCell) else ()
    small = type(cell)(features, width, cell.bias, *options, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh"):
            whole = getattr(cell, name)
            part = whole.view(-1, HIDDEN, whole.shape[1])[:, :width, : getattr(small, name).shape[1]]
            getattr(small, name).copy_(part.flatten(0, 1))
        for name in ("bias_ih", "bias_hh") if cell.bias else ():
            getattr(small, name).copy_(getattr(cell, name).view(-1, HIDDEN)[:, :width].flatten())
    return small


@settings(max_examples=20, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    bias=st.booleans(),
    widths=st.lists(st.tuples(st.integers(0, HIDDEN), st.integers(1, IN)), max_size=6),
    seed=st.integers(0, 2**16),
)
def test_partial_update_is_a_smaller_cell(mode, bias, widths, seed):
    torch.manual_seed(seed)
    cell, n = cell_of(mode, bias), len(widths)
    x, state = torch.randn(n, IN, dtype=torch.float64), states(mode, n, HIDDEN)
    width = torch.tensor([w for w, _ in widths], dtype=torch.int64)
    features = torch.tensor([f for _, f in widths], dtype=torch.int64)
    argument = state if mode == "LSTM" else state[0]
    for dense in (False, True):
        new = partial_update(cell, x, argument, width, input_width=features, dense=dense)
        new = new if mode == "LSTM" else (new,)
        for sample, (w, f) in enumerate(widths):
            expected = [s[sample].clone() for s in state]
            if w:
                small = small_cell(cell, w, f)
                read = tuple(s[sample : sample + 1, :w] for s in state)
                out = small(x[sample : sample + 1, :f], read if mode == "LSTM" else read[0])
                for whole, part in zip(expected, out if mode == "LSTM" else (out,), strict=True):
                    whole[:w] = part[0].detach()
            assert_close([s[sample].detach() for s in new], expected)


@pytest.mark.parametrize("mode", MODES)
def test_partial_update_gradients(mode):
    cell = cell_of(mode)
    x, state = torch.randn(5, IN).double().requires_grad_(), states(mode, 5, HIDDEN)
    state = tuple(s.requires_grad_() for s in state)
    fraction = torch.tensor([0.0, 0.3, 0.55, 0.55, 1.0]).double().requires_grad_()
    inputs, found = [x, *state, fraction, *cell.parameters()], []
    for dense in (False, True):
        mask, width = prefix_mask(fraction, HIDDEN, 4.0)
        out = partial_update(cell, x, state if mode == "LSTM" else state[0], width, mask=mask, dense=dense)
        out = out if mode == "LSTM" else (out,)
        torch.manual_seed(3)
        total = sum((o * torch.randn_like(o)).sum() for o in out)
        found.append((out, torch.autograd.grad(total, inputs)))
    assert_close(found[0], found[1])
    assert fraction.grad is None
    assert found[0][1][1 + len(state)].norm() > 0


def test_one_width_for_all_and_none():
    cell = cell_of("GRU")
    x, h = torch.randn(3, IN).double(), torch.randn(3, HIDDEN).double()
    assert_close(partial_update(cell, x, h, HIDDEN), cell(x, h))
    assert torch.equal(partial_update(cell, x, h, 0), h)
    assert partial_update(cell, x[:0], h[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, HIDDEN)


def test_prefix_mask():
    fraction = torch.tensor([0.0, 0.5, 1.0, torch.nan])
    mask, width = prefix_mask(fraction, 40, 2.0, 0.01)
    i = torch.arange(1, 41)
    soft = torch.sigmoid(2.0 * (0.5 * 40 - i))
    expected = torch.where(soft > 0.99, 1.0, torch.where(soft < 0.01, 0.0, soft))
    torch.testing.assert_close(mask[1], expected)
    assert width.tolist() == [2, int((expected != 0).sum()), 40, 0]  # sigmoid(-2), sigmoid(-4) > 0.01
    assert ((mask != 0) == (i - 1 < width[:, None])).all()


def skim_rnn(mode="LSTM", **options) -> SkimRNN:
    layer = SkimRNN(IN, HIDDEN, SMALL, mode=mode, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(0.6 * torch.randn(tensor.shape))
    return layer


def skim_alone(layer, x: Tensor, skim: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence in eval mode: outputs, skimmed, log-probabilities."""
    lstm = layer.mode == "LSTM"
    state = (x.new_zeros(1, HIDDEN),) * (2 if lstm else 1)
    outputs, chosen, logs = [], [], []
    for t, x_t in enumerate(x[:, None]):
        logits = layer.gate(torch.cat([x_t, state[0]], 1))[0]
        small = logits[1] > logits[0] if skim is None else skim[t] != 0
        if small:
            read = tuple(s[:, :SMALL] for s in state)
            new = layer.small(x_t, read if lstm else read[0])
            state = tuple(
                torch.cat([a, s[:, SMALL:]], 1) for a, s in zip(new if lstm else (new,), state, strict=True)
            )
        else:
            state = layer.big(x_t, state if lstm else state[0])
            state = state if lstm else (state,)
        outputs.append(state[0][0])
        chosen.append(x.new_ones(()) if small else x.new_zeros(()))
        logs.append(F.log_softmax(logits, 0)[1])
    return torch.stack(outputs), torch.stack(chosen), torch.stack(logs)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_skims_as_the_paper(mode, dense):
    layer = skim_rnn(mode, dense=dense).eval()
    x = torch.randn(3, 9, IN, dtype=torch.float64)
    x[1, 5:] = torch.nan
    out = layer(x, lengths=[9, 5, 0])
    for b, length in enumerate([9, 5]):
        output, chosen, logs = skim_alone(layer, x[b, :length])
        for actual, expected in ((out.output, output), (out.skim, chosen), (out.log_skim, logs)):
            assert_close(actual[b, :length], expected)
            assert (actual[b, length:] == 0).all()
    assert 0 < out.skim.sum() < 14
    given = layer(x, skim=out.skim.bool(), lengths=[9, 5, 0])
    assert_close(given.output, out.output)
    assert given.log_skim is None


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(0, 4),
    steps=st.integers(0, 6),
    mode=st.sampled_from(MODES),
    batch_first=st.booleans(),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_given_choices_and_their_gradients(batch, steps, mode, batch_first, density, seed):
    torch.manual_seed(seed)
    layer = skim_rnn(mode)
    layer.batch_first = batch_first
    x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), IN).double().requires_grad_()
    skim, lengths = (torch.rand(x.shape[:2]) < density), torch.randint(0, steps + 1, (batch,))
    inputs = [x, *layer.big.parameters(), *layer.small.parameters()]
    found = []
    for layer.dense in (False, True):
        out = layer(x, skim=skim, lengths=lengths)
        total = (out.output**2).sum() + (out.state[0] if mode == "LSTM" else out.state).sum()
        grads = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else []
        found.append(
            (out.output, out.state, [torch.zeros(1) if g is None or not g.any() else g for g in grads])
        )
    assert_close(found[0][:2], found[1][:2])
    assert found[0][0].shape == (*x.shape[:2], HIDDEN)
    if found[0][2] and found[1][2]:
        assert_close(found[0][2], found[1][2])


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_training_samples_and_trains_the_gate(mode):
    layer = skim_rnn(mode)
    x = torch.randn(4, 8, IN, dtype=torch.float64)
    outputs = []
    for layer.dense in (False, True):
        torch.manual_seed(5)
        out = layer(x)
        outputs.append(out.output)
        assert set(out.skim.unique().tolist()) == {0.0, 1.0}
        (grad,) = torch.autograd.grad(out.output.square().mean() + out.skim.mean(), layer.gate.weight)
        assert grad.norm() > 0
    assert_close(outputs[0], outputs[1])
    layer.dense, layer.soft = False, True
    soft = layer(x).skim
    assert ((soft > 0) & (soft < 1)).all()
    assert set(layer.eval()(x).skim.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_of_a_choice():
    """Hard choices that are multipliers: finite differences of the mixture of the chosen update and the old state."""
    layer = skim_rnn("GRU")
    x, skim = torch.randn(2, 1, IN).double(), torch.tensor([[1.0], [0.0]]).double().requires_grad_()
    h = torch.randn(1, 2, HIDDEN).double()
    out = layer(x, h, skim=skim)
    (grad,) = torch.autograd.grad(out.output.sum(), skim)
    assert_close(grad[:, 0], (out.output[:, 0] - h[0]).sum(1).detach() * torch.tensor([1.0, -1.0]))
    layer.dense = True
    (grad,) = torch.autograd.grad(layer(x, h, skim=skim).output.sum(), skim)
    other = layer(x, h, skim=1 - skim.detach()).output
    assert_close(grad[:, 0], (out.output - other)[:, 0].sum(1).detach() * torch.tensor([1.0, -1.0]))


def test_nan_gates():
    layer = skim_rnn("GRU")
    x = torch.full((2, 2, IN), torch.nan).double()
    with pytest.raises(ValueError, match="NaN"):
        layer(x)
    assert (layer.eval()(x).skim == 0).all()


WRONG = {
    "small_size: expected": (ValueError, lambda: SkimRNN(IN, HIDDEN, HIDDEN + 1)),
    "mode: expected": (ValueError, lambda: SkimRNN(IN, HIDDEN, 2, mode="lstm")),
    "skim: expected .2, 3": (ValueError, lambda: skim_rnn()(torch.zeros(2, 3, IN), skim=torch.ones(3, 2))),
    "cell: expected": (TypeError, lambda: partial_update(nn.Linear(2, 3), *[torch.zeros(2, 2)] * 2, 1)),
    "x: expected .N, 5": (ValueError, lambda: partial_update(cell_of("GRU"), *[torch.zeros(2, HIDDEN)] * 2, 1)),
    "state: expected .h, c": (TypeError, lambda: partial_update(cell_of("LSTM"), torch.zeros(2, IN), torch.zeros(2, HIDDEN), 1)),
    "width: expected values": (ValueError, lambda: partial_update(cell_of("GRU"), torch.zeros(2, IN), torch.zeros(2, HIDDEN), torch.tensor([1, 9]))),
    "width: expected integers": (TypeError, lambda: partial_update(cell_of("GRU"), torch.zeros(2, IN), torch.zeros(2, HIDDEN), torch.ones(2))),
    "fraction: expected": (TypeError, lambda: prefix_mask(torch.ones(2, 2), 3)),
    "epsilon: expected": (ValueError, lambda: prefix_mask(torch.ones(2), 3, epsilon=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    kind, call = WRONG[message]
    with pytest.raises(kind, match=message):
        call()
