"""Gates as functions and modules: values and gradients against formulas, rates under noise, modes."""

import math

import pytest
import torch
from comparison import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops import gates
from dynops.gates import Decision
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

# functions of scores alone, without noise, and whether their mask is 0 or 1
QUIET = {
    "straight_through": (gates.straight_through, True),
    "identity": (lambda x: gates.straight_through(x, surrogate="identity"), True),
    "clipped": (lambda x: gates.straight_through(x, surrogate="clipped"), True),
    "gumbel_sigmoid": (lambda x: gates.gumbel_sigmoid(x, 0.7, training=False), True),
    "gumbel_sigmoid, soft": (lambda x: gates.gumbel_sigmoid(x, 0.7, False, training=False), False),
    "gumbel_softmax": (lambda x: gates.gumbel_softmax(x, 0.7, training=False), True),
    "gumbel_softmax, soft": (lambda x: gates.gumbel_softmax(x, 0.7, False, training=False), False),
    "improved_semhash": (lambda x: gates.improved_semhash(x, training=False), True),
    "relu_tanh": (gates.relu_tanh, False),
    "top_k": (lambda x: gates.top_k(x, 2), True),
    "noisy_top_k": (lambda x: gates.noisy_top_k(x, 1.0, 2, training=False), False),
    "threshold": (lambda x: gates.threshold(x, 0.3, 2.0), True),
}
# with noise
NOISY = {
    "gumbel_sigmoid": gates.gumbel_sigmoid,
    "gumbel_sigmoid, soft": lambda x: gates.gumbel_sigmoid(x, 0.5, hard=False),
    "gumbel_softmax": gates.gumbel_softmax,
    "gumbel_softmax, soft": lambda x: gates.gumbel_softmax(x, 0.5, hard=False),
    "improved_semhash": gates.improved_semhash,
    "noisy_top_k": lambda x: gates.noisy_top_k(x, 1.0, 2),
}
FUNCTIONS = {name: function for name, (function, _) in QUIET.items()} | {
    f"{name}, noisy": function for name, function in NOISY.items()
}


def scores(*shape: int) -> Tensor:
    return (2 * random_tensor(*shape, dtype=torch.float64)).requires_grad_()


def gradient(mask: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad((mask * weight).sum(), x, retain_graph=True)[0]


def assert_gradient_of(decision: Decision, x: Tensor, soft: Tensor) -> None:
    """The mask has exactly the gradient of ``soft``, a function of x written from the paper."""
    weight = random_tensor(*x.shape, dtype=x.dtype)
    close(gradient(decision.mask, x, weight), gradient(soft, x, weight))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_straight_through_sigmoid():
    x = scores(5, 7)
    decision = gates.straight_through(x, 0.4)
    expected = [[float(z > 0.4) for z in row] for row in x.tolist()]
    assert decision.mask.tolist() == expected
    close(
        decision.score, torch.tensor([[sigmoid(z - 0.4) for z in row] for row in x.tolist()]).double(), 1e-6
    )
    assert_gradient_of(decision, x, 1 / (1 + torch.exp(0.4 - x)))


def test_straight_through_identity():
    x = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    decision = gates.straight_through(x, 0.5, "identity")
    assert torch.equal(decision.mask, x.round()) and torch.equal(decision.score, x)
    weight = random_tensor(5, 7, dtype=torch.float64)
    assert torch.equal(gradient(decision.mask, x, weight), weight)


def test_straight_through_clipped():
    x = scores(20, 7)
    decision = gates.straight_through(x, -0.2, "clipped")
    assert torch.equal(decision.mask, (x > -0.2).double())
    weight = random_tensor(20, 7, dtype=torch.float64)
    near = (x + 0.2).abs() < 1
    assert 0 < near.sum() < near.numel()
    assert torch.equal(gradient(decision.mask, x, weight), weight * near / 2)
    close(decision.score, ((x + 1.2) / 2).clamp(0, 1))


def test_threshold_has_gradients_for_both():
    x, limit = scores(6, 3, 4), scores(3, 1)
    decision = gates.threshold(x, limit, slope=2.5)
    soft = 1 / (1 + torch.exp(-2.5 * (x - limit)))
    assert torch.equal(decision.mask, (x > limit).double())
    close(decision.score, soft)
    assert_gradient_of(decision, x, soft)
    weight = random_tensor(6, 3, 4, dtype=torch.float64)
    close(gradient(gates.threshold(x, limit, 2.5).mask, limit, weight), gradient(soft, limit, weight))


def test_relu_tanh_is_zero_exactly():
    x = scores(50)
    mask, score = gates.relu_tanh(x)
    assert torch.equal(mask == 0, x <= 0) and mask is score
    close(mask, torch.tensor([max(0.0, math.tanh(z)) for z in x.tolist()], dtype=torch.float64))
    weight = random_tensor(50, dtype=torch.float64)
    close(gradient(mask, x, weight), weight * (1 - x.tanh() ** 2) * (x > 0))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_top_k(dim):
    x = scores(6, 5, 7)
    mask, score = gates.top_k(x, 3, dim)
    best = x.sort(dim, descending=True).values.narrow(dim, 2, 1)
    assert torch.equal(mask, (x >= best).double()) and score is x
    weight = random_tensor(6, 5, 7, dtype=torch.float64)
    assert torch.equal(gradient(mask, x, weight), weight)  # the dropped ones' too


@given(st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_top_k_keeps_k_of_equal_scores(size, k):
    x = torch.ones(3, size)
    if k > size:
        with pytest.raises(
            ValueError, match=f"^k: expected at most the {size} of dimension -1 of score, got {k}"
        ):
            gates.top_k(x, k)
    else:
        assert gates.top_k(x, k).mask.sum(1).tolist() == [k] * 3


def test_infinite_scores_close_and_open():
    x = torch.tensor([math.inf, -math.inf, 1.0, -1.0], requires_grad=True)
    for function in (
        QUIET["straight_through"][0],
        QUIET["identity"][0],
        QUIET["gumbel_sigmoid"][0],
        QUIET["threshold"][0],
    ):
        mask = function(x).mask
        assert mask.tolist() == [1, 0, 1, 0]
        assert gradient(mask, x, torch.ones(4))[:2].tolist() == [0, 0]
    assert gates.top_k(x, 3).mask.tolist() == [1, 0, 1, 1]
    for _ in range(5):
        assert gates.gumbel_sigmoid(x).mask[:2].tolist() == [1, 0]


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_sigmoid_formula(hard):
    x = scores(40, 3)
    torch.manual_seed(4)
    decision = gates.gumbel_sigmoid(x, 0.6, hard)
    torch.manual_seed(4)
    u = torch.rand_like(x)
    noisy = x + u.log() - (1 - u).log()
    soft = 1 / (1 + torch.exp(-noisy / 0.6))
    close(decision.score, torch.sigmoid(x))
    if hard:
        assert torch.equal(decision.mask, (noisy > 0).double())
    else:
        close(decision.mask, soft)
    assert_gradient_of(decision, x, soft)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_softmax_formula(hard, dim):
    x = scores(10, 3, 4)
    torch.manual_seed(4)
    decision = gates.gumbel_softmax(x, 0.6, hard, dim=dim)
    torch.manual_seed(4)
    gumbel = -torch.empty_like(x).exponential_().log()
    power = torch.exp((x + gumbel) / 0.6)
    soft = power / power.sum(dim, keepdim=True)
    close(decision.score, x.exp() / x.exp().sum(dim, keepdim=True))
    if hard:
        assert torch.equal(decision.mask, (soft == soft.amax(dim, keepdim=True)).double())
        assert (decision.mask.sum(dim) == 1).all()
    else:
        close(decision.mask, soft)
    assert_gradient_of(decision, x, soft)


def test_noise_that_is_asked_for():
    x = scores(200)
    quiet = gates.gumbel_sigmoid(x, training=False)
    assert torch.equal(gates.gumbel_sigmoid(x, training=True, noise=False).mask, quiet.mask)
    assert not torch.equal(gates.gumbel_sigmoid(x, training=False, noise=True).mask, quiet.mask)
    pair = scores(200, 3)
    quiet = gates.gumbel_softmax(pair, training=False)
    assert torch.equal(quiet.mask, nn.functional.one_hot(pair.argmax(1), 3).double())
    assert torch.equal(gates.gumbel_softmax(pair, noise=False).mask, quiet.mask)
    assert not torch.equal(gates.gumbel_softmax(pair, training=False, noise=True).mask, quiet.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_noise_is_not_drawn_in_half_precision(dtype):
    """Rare events keep their rate: in bfloat16, noise of 8 bits would be infinite in one of 256 draws."""
    draws = 100000
    rate = gates.gumbel_sigmoid(torch.full((draws,), -8.0, dtype=dtype)).mask.float().mean()
    expected = sigmoid(-8.0)
    assert abs(rate - expected) < 5 * math.sqrt(expected / draws)
    assert gates.gumbel_sigmoid(torch.zeros(draws, dtype=dtype), 0.1, hard=False).mask.isfinite().all()


def test_saturating_sigmoid():
    x = torch.tensor([-3.0, -math.log(11) - 1e-9, 0.0, 1.0, math.log(11) + 1e-9, 4.0], dtype=torch.float64)
    y = gates.saturating_sigmoid(x)
    assert y[[0, 1]].tolist() == [0, 0] and y[[4, 5]].tolist() == [1, 1]
    close(y[2:4], torch.tensor([0.5, 1.2 * sigmoid(1.0) - 0.1], dtype=torch.float64))


def test_semhash_halves_the_samples():
    x = scores(2000, 6)
    torch.manual_seed(3)
    decision = gates.improved_semhash(x, noise_std=0.8)
    torch.manual_seed(3)
    noisy = x + 0.8 * torch.randn_like(x)
    soft = (1.2 / (1 + torch.exp(-noisy)) - 0.1).clamp(0, 1)
    hard = (noisy > 0).double()
    is_hard = (decision.mask == hard).all(1)
    close(decision.mask[~is_hard], soft[~is_hard])
    assert abs(is_hard.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)
    assert_gradient_of(decision, x, soft)  # of all samples, the discrete ones too
    close(decision.score, (1.2 / (1 + torch.exp(-x)) - 0.1).clamp(0, 1))
    quiet = gates.improved_semhash(x, training=False)
    assert torch.equal(quiet.mask, (x > 0).double())


def test_noisy_top_k_formula():
    x, deviation = scores(30, 6), scores(6)
    torch.manual_seed(2)
    mask, score = gates.noisy_top_k(x, deviation, 2)
    torch.manual_seed(2)
    noisy = x + torch.randn_like(x) * deviation
    best = noisy.sort(1, descending=True).values[:, 1:2]
    power = noisy.exp() * (noisy >= best)
    expected = power / power.sum(1, keepdim=True)
    close(mask, expected)
    assert ((mask > 0).sum(1) == 2).all()
    close(score, torch.softmax(x, 1))
    weight = random_tensor(30, 6, dtype=torch.float64)
    for leaf in (x, deviation):
        actual = torch.autograd.grad((mask * weight).sum(), leaf, retain_graph=True)[0]
        close(actual, torch.autograd.grad((expected * weight).sum(), leaf, retain_graph=True)[0], 1e-11)
    assert torch.equal(gates.noisy_top_k(x, 0.0, 2).mask, gates.noisy_top_k(x, 1.0, 2, training=False).mask)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_shape_and_hardness(name, dtype):
    x = random_tensor(9, 5, dtype=dtype)
    mask, score = FUNCTIONS[name](x)
    assert mask.dtype == score.dtype == dtype and mask.shape == score.shape == x.shape
    if name in QUIET and QUIET[name][1]:
        assert ((mask == 0) | (mask == 1)).all()
    assert mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(name):
    """A plan then refuses the mask, with and without gradients."""
    x = random_tensor(4, 6)
    x[1, 2] = math.nan
    for grad in (False, True):
        mask = FUNCTIONS[name](x.clone().requires_grad_(grad)).mask
        assert mask[1, 2].isnan() and not mask[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_sample(name):
    x = torch.zeros(0, 4, requires_grad=True)
    mask = FUNCTIONS[name](x).mask
    assert mask.shape == (0, 4)
    assert gradient(mask, x, torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("name", QUIET)
def test_without_noise_nothing_is_random(name):
    x = random_tensor(50, 6)
    before = torch.random.get_rng_state()
    first, again = QUIET[name][0](x), QUIET[name][0](x)
    assert torch.equal(first.mask, again.mask) and torch.equal(first.score, again.score)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["threshold", "gumbel_softmax, noisy", "improved_semhash, noisy", "top_k"])
def test_compiles_without_graph_breaks(name):
    x = random_tensor(5, 4)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    actual_x, expected_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(0)
    actual = compiled(actual_x)
    torch.manual_seed(0)
    expected = FUNCTIONS[name](expected_x)
    assert torch.equal(actual.mask, expected.mask)
    weight = random_tensor(5, 4)
    close(gradient(actual.mask, actual_x, weight), gradient(expected.mask, expected_x, weight), 1e-6)


MODULES = {
    "GumbelSigmoid": (lambda: gates.GumbelSigmoid(0.5), gates.gumbel_sigmoid, {"temperature": 0.5}),
    "GumbelSoftmax": (lambda: gates.GumbelSoftmax(0.5, hard=False), gates.gumbel_softmax, {"temperature": 0.5, "hard": False}),
    "ImprovedSemHash": (lambda: gates.ImprovedSemHash(0.5), gates.improved_semhash, {"noise_std": 0.5}),
    "NoisyTopK": (lambda: gates.NoisyTopK(2), gates.noisy_top_k, {"k": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_follow_their_mode(name):
    make, function, options = MODULES[name]
    module, x = make(), random_tensor(60, 5)
    extra = {"noise_std": 0.7} if name == "NoisyTopK" else {}
    for training in (True, False, True):
        module.train(training)
        torch.manual_seed(1)
        actual = module(x, *extra.values())
        torch.manual_seed(1)
        expected = function(x, training=training, **options, **extra)
        assert torch.equal(actual.mask, expected.mask) and torch.equal(actual.score, expected.score)
        torch.manual_seed(2)
        assert torch.equal(module(x, *extra.values()).mask, actual.mask) != training
    assert not module.state_dict() and str(next(iter(options.values()))) in repr(module)


def test_threshold_module_learns_its_threshold():
    module = gates.Threshold(0.3, (4, 1, 1), slope=3.0)
    x = random_tensor(2, 4, 5, 5)
    decision = module(x)
    assert torch.equal(decision.mask, (x > 0.3).float())
    decision.mask.sum().backward()
    slope = 3 * decision.score * (1 - decision.score)
    close(module.threshold.grad, -slope.sum((0, 2, 3)).view(4, 1, 1), 1e-5)
    fixed = gates.Threshold(0.3, learned=False)
    assert not list(fixed.parameters()) and fixed.state_dict()["threshold"] == torch.tensor(0.3)
    assert torch.equal(fixed(x).mask, decision.mask)


def test_temperature_and_noise_of_a_whole_model():
    model = nn.Sequential(nn.Linear(4, 4), gates.GumbelSigmoid(), nn.ModuleList([gates.GumbelSoftmax()]))
    gates.set_temperature(model, 0.25)
    gates.set_noise(model, False)
    assert model[1].temperature == model[2][0].temperature == 0.25
    assert model[1].noise is model[2][0].noise is False
    x = random_tensor(300, 4)
    gate = model[1].train()
    assert torch.equal(gate(x).mask, (x > 0).float())
    gates.set_noise(model, None)
    assert not torch.equal(gate(x).mask, (x > 0).float())
    gates.set_noise(model.eval(), True)
    assert not torch.equal(gate(x).mask, (x > 0).float())
    for set_it in (gates.set_temperature, gates.set_noise):
        with pytest.raises(ValueError, match=r"^module: expected one with a Gumbel gate"):
            set_it(nn.Linear(1, 1), True if set_it is gates.set_noise else 1.0)


def test_annealed_temperature():
    assert gates.annealed_temperature(5.0, 0.5, 0.0) == 5.0
    assert math.isclose(gates.annealed_temperature(5.0, 0.5, 1.0), 0.5)
    assert math.isclose(gates.annealed_temperature(4.0, 1.0, 0.5), 2.0)
    assert gates.annealed_temperature(5.0, 0.5, -1) == 5.0 and math.isclose(
        gates.annealed_temperature(5, 0.5, 7), 0.5
    )


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: gates.straight_through(X.int()), TypeError, r"logits: expected a floating tensor, got torch\.int32"),
        (lambda: gates.straight_through([1.0]), TypeError, "logits: expected a floating tensor, got list"),
        (lambda: gates.straight_through(X, math.nan), ValueError, "threshold: expected it finite, got nan"),
        (lambda: gates.straight_through(X, surrogate="tanh"), ValueError, "surrogate: expected one of sigmoid, identity, clipped, got 'tanh'"),
        (lambda: gates.gumbel_sigmoid(X, 0.0), ValueError, r"temperature: expected it finite and above 0, got 0\.0"),
        (lambda: gates.gumbel_sigmoid(X, "hot"), TypeError, "temperature: expected a number, got str"),
        (lambda: gates.gumbel_softmax(X, math.inf), ValueError, "temperature: expected it finite and above 0, got inf"),
        (lambda: gates.gumbel_sigmoid(X, noise=0.1), TypeError, "noise: expected a bool or None, got float"),
        (lambda: gates.gumbel_softmax(X, dim=2), IndexError, "Dimension out of range"),
        (lambda: gates.improved_semhash(torch.tensor(1.0)), ValueError, r"logits: expected \[N, \.\.\.\], got a tensor without"),
        (lambda: gates.improved_semhash(X, noise_std=-1.0), ValueError, r"noise_std: expected it at least 0, got -1\.0"),
        (lambda: gates.relu_tanh(X.long()), TypeError, r"logits: expected a floating tensor, got torch\.int64"),
        (lambda: gates.top_k(X, 0), ValueError, "k: expected an int >= 1, got 0"),
        (lambda: gates.top_k(X, 2.0), ValueError, r"k: expected an int >= 1, got 2\.0"),
        (lambda: gates.noisy_top_k(X, 1.0, 5), ValueError, "k: expected at most the 4 of dimension -1 of logits, got 5"),
        (lambda: gates.noisy_top_k(X, torch.ones(3), 1), ValueError, r"noise_std: expected a shape that broadcasts to \(3, 4\), got \(3,\)"),
        (lambda: gates.threshold(X, torch.ones(2, 3, 4)), ValueError, r"threshold: expected a shape that broadcasts to \(3, 4\), got \(2, 3, 4\)"),
        (lambda: gates.threshold(X, slope=0), ValueError, "slope: expected it finite and above 0, got 0"),
        (lambda: gates.GumbelSigmoid(-1.0), ValueError, r"temperature: expected it finite and above 0, got -1\.0"),
        (lambda: gates.GumbelSoftmax(noise=1), TypeError, "noise: expected a bool or None, got int"),
        (lambda: gates.ImprovedSemHash(-0.5), ValueError, r"noise_std: expected it at least 0, got -0\.5"),
        (lambda: gates.NoisyTopK(0), ValueError, "k: expected an int >= 1, got 0"),
        (lambda: gates.Threshold(slope=-1), ValueError, "slope: expected it finite and above 0, got -1"),
        (lambda: gates.set_temperature(gates.GumbelSigmoid(), 0), ValueError, "temperature: expected it finite and above 0, got 0"),
        (lambda: gates.set_noise(gates.GumbelSigmoid(), 1), TypeError, "noise: expected a bool or None, got int"),
        (lambda: gates.annealed_temperature(1.0, 0.0, 0.5), ValueError, r"end: expected it finite and above 0, got 0\.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
