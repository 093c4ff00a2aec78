"""Token-level exits, against the dense layers with the states of tokens that have left held fixed."""

import copy
import math

import pytest
import torch
from exit_cases import Calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops import SamplePlan
from dynops.nn.samples.criteria import Entropy, MaxSoftmax, Patience
from dynops.nn.tokens.exits import TokenEncoderLayer, TokenExit, TokenSequential
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH, CLASSES = 8, 5


def encoder(norm_first: bool = False, bias: bool = True, activation="relu", dropout=0.1) -> TokenEncoderLayer:
    torch.manual_seed(4)
    layer = TokenEncoderLayer(
        WIDTH,
        2,
        16,
        dropout,
        activation,
        batch_first=True,
        norm_first=norm_first,
        bias=bias,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases and norms too
    return layer.eval()


def plain(layer: TokenEncoderLayer) -> nn.TransformerEncoderLayer:
    """torch's own layer with these parameters."""
    dense = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, 0.1, layer.activation, batch_first=True, norm_first=layer.norm_first,
        bias=layer.linear1.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    dense.load_state_dict(layer.state_dict())
    return dense.eval()


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return actual.shape == expected.shape and bool(
        (actual - expected).norm() <= tolerance * (1 + expected.norm())
    )


def padding_of(lengths: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens) >= torch.tensor(lengths)[:, None]


CAUSAL = {
    "none": lambda t: None,
    "bool": lambda t: torch.ones(t, t, dtype=torch.bool).triu(1),
    "float": lambda t: nn.Transformer.generate_square_subsequent_mask(t, dtype=torch.float64),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("grad", [False, True])
def test_active_tokens_are_the_dense_layers(norm_first, padded, causal, grad):
    """With gradients on torch's layer takes another path than without."""
    layer = encoder(norm_first)
    b, t = 4, 6
    x = torch.randn(b, t, WIDTH, dtype=torch.float64)
    padding = padding_of([6, 2, 5, 1], t) if padded else None
    mask = CAUSAL[causal](t)
    with torch.set_grad_enabled(grad):
        blocked = mask.isinf() if causal == "float" else mask  # torch warns of a float mask beside a bool one
        dense = plain(layer)(x, blocked, padding)
        for active in (torch.rand(b, t) < 0.5, torch.ones(b, t).bool(), torch.eye(b, t).bool()):
            active = active if padding is None else active & ~padding
            plan = SamplePlan.from_mask(active.flatten())
            rows = layer(x, plan, padding_mask=padding, src_mask=mask)
            assert near(rows, dense[active])


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": "gelu"}], ids=str)
def test_other_encoder_layers(options):
    layer = encoder(**options)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    active = torch.rand(3, 4) < 0.5
    assert near(layer(x, SamplePlan.from_mask(active.flatten())), plain(layer)(x)[active])


def test_gradients_of_an_encoder_layer():
    for norm_first in (False, True):
        layer = encoder(norm_first)
        dense = plain(layer)
        x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        padding = padding_of([5, 3, 4], 5)
        active = (torch.rand(3, 5) < 0.5) & ~padding
        weight = torch.randn(int(active.sum()), WIDTH, dtype=torch.float64)
        plan = SamplePlan.from_mask(active.flatten())
        (layer(x, plan, padding_mask=padding) * weight).sum().backward()
        (dense(y, None, padding)[active] * weight).sum().backward()
        assert near(x.grad, y.grad, 1e-10)
        for a, b in zip(layer.parameters(), dense.parameters(), strict=True):
            assert near(a.grad, b.grad, 1e-10)


def test_without_a_plan_it_is_torchs_layer():
    layer = encoder()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(layer(x), plain(layer)(x))
    dense = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).eval()
    made = TokenEncoderLayer.from_dense(dense)
    assert made.linear1.weight is dense.linear1.weight and set(made.state_dict()) == set(dense.state_dict())
    y = torch.randn(2, 3, WIDTH)
    rows = made(y, SamplePlan.from_mask(torch.tensor([0, 1, 0, 1, 1, 0])))
    assert torch.allclose(rows, dense(y).flatten(0, 1)[[1, 3, 4]], rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training():
    layer = encoder().train()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    plan = SamplePlan.from_mask(torch.tensor([0, 1, 0, 1, 1, 0]))
    assert not torch.equal(layer(x, plan), layer(x, plan))
    assert torch.equal(layer.eval()(x, plan), layer(x, plan))


def attention_model(criterion=None, exits: int = 3, norm_first: bool = False, **options) -> TokenExit:
    stages = [copy.deepcopy(encoder(norm_first, dropout=0.0)) for _ in range(exits)]
    torch.manual_seed(6)
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    heads = [nn.Linear(WIDTH, CLASSES, dtype=torch.float64) for _ in range(exits)]
    return TokenExit(stages, heads, criterion, **options).eval()


def by_hand(model: TokenExit, hidden: Tensor, leaves, padding=None, mask=None):
    """Dense layers on all tokens; those that have left keep their states. ``leaves(logits, e)``: bool."""
    active = torch.ones(hidden.shape[:2], dtype=torch.bool) if padding is None else ~padding
    exits = torch.full(hidden.shape[:2], -1)
    out = torch.zeros(*hidden.shape[:2], CLASSES, dtype=hidden.dtype)
    for e, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        dense = plain(stage)(hidden, mask, padding) if isinstance(stage, TokenEncoderLayer) else stage(hidden)
        hidden = torch.where(active[..., None], dense, hidden)
        logits = head(hidden)
        last = e == len(model.stages) - 1
        gone = active & (torch.ones_like(active) if last else leaves(logits, e))
        out[gone], exits[gone] = logits[gone], e
        active = active & ~gone
    return out, hidden, exits


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", CAUSAL)
def test_state_copy_with_attention(norm_first, padded, causal):
    x = torch.randn(4, 7, WIDTH, dtype=torch.float64)
    padding = padding_of([7, 3, 6, 1], 7) if padded else None
    mask = CAUSAL[causal](7)
    model = attention_model(lambda z, e, rows: z[:, 0] > z[:, 1] - 0.4, norm_first=norm_first)
    context = {} if mask is None else {"src_mask": mask}
    out = model(x, padding, **context)
    blocked = mask.isinf() if causal == "float" else mask  # torch warns of a float mask beside a bool one
    logits, hidden, exits = by_hand(model, x, lambda z, e: z[..., 0] > z[..., 1] - 0.4, padding, blocked)
    kept = exits >= 0
    assert set(exits[kept].tolist()) == {0, 1, 2} and out.exits.dtype == torch.int64
    assert torch.equal(out.exits, exits)
    assert near(out.logits, logits) and near(out.hidden, hidden)
    assert torch.equal(out.hidden[~kept], x[~kept])


class Affine(nn.Module):
    """A product and a sum for each value: the same bits in any batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(random_tensor(WIDTH)), nn.Parameter(random_tensor(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Head(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[..., :CLASSES] * 4


def affine_model(criterion=None, exits: int = 3, **options) -> TokenExit:
    torch.manual_seed(8)
    stages = [TokenSequential(Affine(), Affine()) for _ in range(exits)]
    return TokenExit(stages, [Head() for _ in range(exits)], criterion, **options).eval()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), b=st.integers(0, 3), t=st.integers(0, 4))
def test_any_pattern_of_given_exits_bit_for_bit(data, b, t):
    at = (
        torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=b * t, max_size=b * t)))
        .long()
        .view(b, t)
    )
    padding = (
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))).bool().view(b, t)
    )
    padding = data.draw(st.sampled_from([None, padding]))
    model = affine_model()
    x = random_tensor(b, t, WIDTH)
    out = model(x, padding, at)
    logits, hidden, exits = by_hand(model, x, lambda z, e: at <= e, padding)
    assert torch.equal(out.exits, exits) and torch.equal(out.logits, logits.float())
    assert torch.equal(out.hidden, hidden)


@torch.no_grad()
@pytest.mark.parametrize("criterion", [Entropy(0.5), Patience(1)], ids=repr)
def test_criteria_and_their_memory_over_tokens(criterion):
    heads = [Calls(lambda rows, e=e: rows[:, 2 * e : 2 * e + 2]) for e in range(4)]  # two classes each
    model = TokenExit([TokenSequential()] * 4, heads, criterion).eval()
    x = random_tensor(5, 6, WIDTH) * 2
    every = torch.stack(model(x, all_exits=True)).flatten(1, 2)  # [E, B T, K]
    if isinstance(criterion, Entropy):
        leaves = torch.distributions.Categorical(logits=every[:-1]).entropy() <= 0.5
    else:
        classes = every.argmax(2)
        leaves = torch.cat([torch.zeros(1, 30).bool(), classes[1:-1] == classes[:-2]])
    expected = torch.cat([leaves, torch.ones(1, 30).bool()]).int().argmax(0)
    out = model(x)
    assert len(set(expected.tolist())) >= 2
    assert torch.equal(out.exits.flatten(), expected)
    assert torch.equal(out.logits.flatten(0, 1), every[expected, torch.arange(30)])


@torch.no_grad()
def test_only_active_tokens_are_computed():
    seen = []

    class Counts(nn.Module):
        def forward(self, hidden, plan):
            seen.append(plan.num_rows)
            return hidden.flatten(0, 1)[plan.index.long()] + 1

    model = TokenExit([Counts() for _ in range(4)], [Head() for _ in range(4)]).eval()
    at = torch.tensor([[0, 2, 0, 1], [2, 2, 0, 1]])
    out = model(torch.zeros(2, 4, WIDTH), exits=at)
    assert seen == [8, 5, 3] and torch.equal(out.exits, at)
    assert torch.equal(out.hidden[..., 0], at.float() + 1)


@torch.no_grad()
def test_all_leave_none_leave_nan_and_cap():
    x = random_tensor(2, 5, WIDTH)
    assert affine_model(MaxSoftmax(0.0))(x).exits.eq(0).all()
    assert affine_model(MaxSoftmax(2.0))(x).exits.eq(2).all()
    x[0, 3] = math.nan
    out = affine_model(MaxSoftmax(0.0))(x)
    assert out.exits[0, 3] == 2 and out.exits.eq(0).sum() == 9 and out.logits[0, 3].isnan().all()
    padding = padding_of([5, 3], 5)  # 8 tokens
    capped = affine_model(MaxSoftmax(2.0), max_fraction=[0.5, 0.25])
    out = capped(x, padding)
    assert (out.exits >= 1).sum() == 4 and (out.exits == 2).sum() == 2 and out.exits[0, 3] == 2
    assert (out.exits == -1).sum() == 2 and not out.logits[padding].any()


@torch.no_grad()
def test_a_sequence_of_padding_alone():
    model = attention_model(MaxSoftmax(0.45))
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    padding = padding_of([4, 0, 2], 4)
    out = model(x, padding)
    pair = model(x[[0, 2]], padding[[0, 2]])
    assert out.exits[1].eq(-1).all() and torch.equal(out.hidden[1], x[1])
    assert torch.equal(out.exits[[0, 2]], pair.exits) and near(out.logits[[0, 2]], pair.logits)
    nothing = model(x, torch.ones(3, 4, dtype=torch.bool))
    assert nothing.exits.eq(-1).all() and not nothing.logits.any() and torch.equal(nothing.hidden, x)
    for z in model(x, padding, all_exits=True):
        assert z.isfinite().all() and not z[padding].any()


def test_training_computes_all_exits_with_gradients():
    model = attention_model(MaxSoftmax(0.45)).train()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    padding = padding_of([4, 2], 4)
    logits = model(x, padding)
    dense, hidden = [], x
    for stage, head in zip(model.stages, model.heads, strict=True):
        hidden = plain(stage)(hidden, None, padding)
        dense.append(head(hidden).masked_fill(padding[..., None], 0))
    assert len(logits) == 3 and all(near(a, b) for a, b in zip(logits, dense, strict=True))
    sum(z.square().sum() for z in logits).backward()
    assert x.grad.isfinite().all() and not x.grad[padding].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_of_a_sequence_of_padding_alone_are_finite():
    model = attention_model().train()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    padding = padding_of([0, 2], 3)
    sum(z.sum() for z in model(x, padding)).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_of_mixed_training_are_the_masked_dense_forms(norm_first):
    """Exits drawn at random: gradients also flow through the copied states, as keys and values."""
    model = attention_model(norm_first=norm_first)
    twin = attention_model(norm_first=norm_first)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    at, padding = torch.randint(0, 3, (3, 4)), padding_of([4, 2, 3], 4)
    weight = torch.randn(3, 4, CLASSES, dtype=torch.float64)
    out = model.train()(x, padding, at, all_exits=False)
    (out.logits * weight).sum().backward()
    logits, hidden, active = 0, y, ~padding
    for e in range(3):
        stage, head = twin.stages[e], twin.heads[e]
        hidden = torch.where(active[..., None], stage(hidden, padding_mask=padding), hidden)
        gone = active & ((at <= e) | torch.tensor(e == 2))
        logits = logits + gone[..., None] * head(hidden)
        active = active & ~gone
    (logits * weight).sum().backward()
    assert near(out.logits, logits) and near(x.grad, y.grad, 1e-10)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert near(a.grad, b.grad, 1e-10)


def test_bad_arguments_are_named():
    model, x = affine_model(), random_tensor(2, 3, WIDTH)
    with pytest.raises(ValueError, match=r"^hidden: expected \[B, T, C\], got \(3, 8\)"):
        model(x[0])
    with pytest.raises(ValueError, match=r"^padding_mask: expected \[B, T\] \(2, 3\), got \(3, 2\)"):
        model(x, torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^padding_mask: expected bool, got torch.float32"):
        model(x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"^exits: expected an int dtype, got torch.bool"):
        model(x, None, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"^exits: expected \[B, T\], as the layer has no criterion, got None"
    ):
        model(x)
    with pytest.raises(ValueError, match=r"^heads: expected one for each of 1 stages, got 2"):
        TokenExit([TokenSequential()], [Head(), Head()])
    with pytest.raises(TypeError, match=r"^criterion: expected a Criterion or a callable, got int"):
        TokenExit([TokenSequential()], [Head()], 3)
    with pytest.raises(ValueError, match=r"^max_fraction: expected a number in"):
        affine_model(max_fraction=2)
    with pytest.raises(ValueError, match=r"^stages\[0\]: expected rows \[6, 8\], got \(2, 3, 8\)"):
        TokenExit([Calls(lambda hidden, plan: hidden)], [Head()], MaxSoftmax(0.5)).eval()(x)
    layer, plan = encoder(), SamplePlan.full(6)
    with pytest.raises(ValueError, match=r"^src_mask: expected \[T, T\] with T 3, got \(2, 2\)"):
        layer(x.double(), plan, src_mask=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^batch_first: expected True"):
        TokenEncoderLayer(WIDTH, 2)(x, plan)
    with pytest.raises(TypeError, match=r"^layer: expected nn.TransformerEncoderLayer, got Linear"):
        TokenEncoderLayer.from_dense(nn.Linear(2, 2))
