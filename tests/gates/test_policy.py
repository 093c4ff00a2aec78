"""Policy gradients: sampled actions, log-probabilities, rewards, and losses whose gradient is the expectation's."""

import itertools
import math

import pytest
import torch
from comparison import close
from torch import Tensor

from dynops import gates
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


def probabilities(*shape: int) -> Tensor:
    return (0.05 + 0.9 * torch.rand(*shape, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_actions_have_the_rates_of_their_probabilities(dtype):
    draws = 10000
    p = torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0], dtype=dtype, requires_grad=True)
    actions = gates.sample_actions(p.expand(draws, 5))
    assert actions.dtype == dtype and not actions.requires_grad
    assert ((actions == 0) | (actions == 1)).all()
    rates = actions.float().mean(0)
    assert rates[0] == 0 and rates[4] == 1
    assert (rates - p.detach().float()).abs().max() < 5 * 0.5 / math.sqrt(draws)


def test_actions_of_nan_are_nan():
    p = torch.tensor([0.3, math.nan, 1.0])
    assert gates.sample_actions(p).isnan().tolist() == [False, True, False]
    assert gates.log_probability(p, torch.ones(3)).isnan().tolist() == [False, True, False]
    assert gates.entropy(p).isnan().tolist() == [False, True, False]


def test_log_probability_and_entropy_are_those_of_distributions():
    p = probabilities(6, 5)
    actions = gates.sample_actions(p)
    bernoulli = torch.distributions.Bernoulli(p)
    close(gates.log_probability(p, actions), bernoulli.log_prob(actions))
    close(gates.entropy(p), bernoulli.entropy())
    choices = gates.sample_actions(p, categorical=True)
    categorical = torch.distributions.Categorical(p)
    close(gates.log_probability(p, choices, categorical=True), categorical.log_prob(choices))
    close(gates.entropy(p, categorical=True), categorical.entropy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certain_actions_are_finite(dtype):
    p = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    for actions in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])):
        log_p = gates.log_probability(p, actions.to(dtype))
        assert log_p.dtype == torch.float32 and log_p.isfinite().all()
        (log_p.sum() + gates.entropy(p).sum() + gates.entropy(p, categorical=True).sum()).backward()
        assert p.grad.isfinite().all()


def test_explore():
    p = probabilities(7)
    close(gates.explore(p, 0.7), 0.7 * p + 0.3 * (1 - p))
    ends = gates.explore(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.2, 0.5, 0.8]))


def test_usage_reward_is_blockdrops():
    actions = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    correct = torch.tensor([True, True, True, False])
    reward = gates.usage_reward(actions, correct, penalty=5.0)
    assert reward.tolist() == [0.0, 1 - 1 / 16, 1.0, -5.0]
    assert gates.usage_reward(actions, correct)[3] == -1
    narrow = gates.usage_reward(actions.bfloat16(), correct)
    assert narrow.dtype == torch.float32 and narrow[1] == 1 - 1 / 16


def test_reward_to_go_is_skipnets():
    """The published loop, from the last gate to the first."""
    actions, loss = (torch.rand(5, 7) < 0.5).double(), torch.rand(5, dtype=torch.float64)
    cost = torch.rand(7, dtype=torch.float64)
    for c in (None, cost):
        total, expected = -loss, []
        for i in reversed(range(7)):
            total = total + (1 - actions[:, i]) * 0.3 / 7 * (1.0 if c is None else c[i])
            expected.insert(0, total)
        close(gates.reward_to_go(actions, loss, 0.3, c), torch.stack(expected, 1))


def test_curriculum_frees_the_last_layers_first():
    assert gates.curriculum_mask(4, 0).tolist() == [False] * 4
    assert gates.curriculum_mask(4, 1).tolist() == [False, False, False, True]
    assert gates.curriculum_mask(4, 4).tolist() == [True] * 4
    mask = gates.curriculum_mask(4, 2)
    assert torch.where(mask, torch.zeros(3, 4), 1).tolist() == [[1, 1, 0, 0]] * 3


def test_self_critical_loss_is_blockdrops():
    p = probabilities(6, 5)
    actions = gates.sample_actions(p)
    reward, greedy = (
        random_tensor(6, dtype=torch.float64).requires_grad_(),
        random_tensor(6, dtype=torch.float64),
    )
    mask = gates.curriculum_mask(5, 3)
    expected = 0.0
    for n, i in itertools.product(range(6), range(2, 5)):
        log_p = p[n, i].log() if actions[n, i] else (1 - p[n, i]).log()
        expected = expected - log_p * (reward[n] - greedy[n]).detach() / 6
    loss = gates.self_critical_loss(gates.log_probability(p, actions), reward, greedy, mask)
    close(loss, expected)
    assert torch.equal(
        loss, gates.self_critical_loss(gates.log_probability(p, actions), reward, greedy, mask.expand(6, 5))
    )
    loss.backward()
    assert reward.grad is None and p.grad[:, :2].norm() == 0 and p.grad[:, 2:].norm() > 0


@pytest.mark.parametrize("baseline", [None, 0.7, "tensor"])
def test_reinforce_is_the_gradient_of_the_expected_reward(baseline):
    """Summed over all actions with their probabilities, whatever the baseline."""
    p = probabilities(1, 3)
    reward_of = dict(zip(itertools.product((0.0, 1.0), repeat=3), torch.rand(8).tolist(), strict=True))
    expected_reward, loss = 0.0, 0.0
    if baseline == "tensor":
        baseline = torch.tensor([0.4], dtype=torch.float64)
    for actions, reward in reward_of.items():
        a = torch.tensor([actions], dtype=torch.float64)
        probability = torch.where(a == 1, p, 1 - p).prod()
        expected_reward = expected_reward + probability * reward
        log_p = gates.log_probability(p, a)
        one = gates.reinforce_loss(log_p, torch.tensor([reward], dtype=torch.float64), baseline)
        loss = loss + probability.detach() * one
    actual, expected = (torch.autograd.grad(value, p)[0] for value in (loss, -expected_reward))
    close(actual, expected)


def test_reinforce_takes_a_reward_for_each_action():
    log_p, reward = random_tensor(4, 3, dtype=torch.float64), random_tensor(4, 3, dtype=torch.float64)
    close(gates.reinforce_loss(log_p, reward), -(log_p * reward).sum() / 4)
    column = reward[:, 0]
    close(gates.reinforce_loss(log_p[:, 0], column, 0.5), -(log_p[:, 0] * (column - 0.5)).mean())


def test_losses_of_no_sample_are_zero():
    log_p = torch.zeros(0, 3, requires_grad=True)
    loss = gates.self_critical_loss(log_p, torch.zeros(0), torch.zeros(0))
    loss.backward()
    assert loss == 0 and log_p.grad.shape == (0, 3)
    assert gates.usage_reward(torch.zeros(0, 3), torch.zeros(0, dtype=torch.bool)).shape == (0,)
    assert gates.reward_to_go(torch.zeros(0, 3), torch.zeros(0), 0.1).shape == (0, 3)


def test_compiles_without_graph_breaks():
    def step(p, reward, greedy):
        probability = gates.explore(p)
        actions = gates.sample_actions(probability)
        log_p = gates.log_probability(probability, actions)
        return actions, gates.self_critical_loss(log_p, reward, greedy) - gates.entropy(probability).mean()

    p, reward, greedy = torch.rand(5, 4), torch.rand(5), torch.rand(5)
    torch.manual_seed(0)
    actions, loss = torch.compile(step, fullgraph=True, backend="aot_eager")(p, reward, greedy)
    torch.manual_seed(0)
    expected_actions, expected_loss = step(p, reward, greedy)
    assert torch.equal(actions, expected_actions)
    torch.testing.assert_close(loss, expected_loss)


P, A = torch.full((3, 4), 0.5), torch.ones(3, 4)
YES, R = torch.ones(3, dtype=torch.bool), torch.ones(3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: gates.sample_actions(A.int()), TypeError, r"probability: expected a floating tensor, got torch\.int32"),
        (lambda: gates.sample_actions(torch.tensor(0.5), True), ValueError, r"probability: expected \[..., K\], got shape \(\)"),
        (lambda: gates.log_probability(P, R), ValueError, r"actions: expected shape \(3, 4\), got \(3,\)"),
        (lambda: gates.log_probability(P, None), ValueError, r"actions: expected shape \(3, 4\), got \(\)"),
        (lambda: gates.log_probability(P, R, True), TypeError, r"actions: expected int64 choices, got torch\.float32"),
        (lambda: gates.explore(P, 0.4), ValueError, r"alpha: expected it in \[0.5, 1\], got 0.4"),
        (lambda: gates.usage_reward(A, R), TypeError, r"correct: expected a bool tensor, got torch\.float32"),
        (lambda: gates.usage_reward(A, YES[:2]), ValueError, r"correct: expected \[3\], one for each sample, got shape \(2,\)"),
        (lambda: gates.usage_reward(R, YES), ValueError, r"actions: expected \[N, L\], got shape \(3,\)"),
        (lambda: gates.reward_to_go(A, R[:2], 0.1), ValueError, r"loss: expected \[3\], one for each sample, got shape \(2,\)"),
        (lambda: gates.reward_to_go(A, R, 0.1, R), ValueError, r"cost: expected \[4\], got shape \(3,\)"),
        (lambda: gates.reward_to_go(A, R, math.nan), ValueError, "alpha: expected it finite, got nan"),
        (lambda: gates.curriculum_mask(3, 4), ValueError, "free: expected at most the 3 layers, got 4"),
        (lambda: gates.curriculum_mask(3, -1), ValueError, "free: expected an int >= 0, got -1"),
        (lambda: gates.reinforce_loss(A[None], R), ValueError, r"log_probability: expected \[N, L\] or \[N\], got shape \(1, 3, 4\)"),
        (lambda: gates.reinforce_loss(A, torch.ones(4)), ValueError, r"reward: expected shape \(3,\) or \(3, 4\), got \(4,\)"),
        (lambda: gates.reinforce_loss(A, R, torch.ones(2)), ValueError, r"baseline: expected a shape that broadcasts to \(3,\), got \(2,\)"),
        (lambda: gates.reinforce_loss(A, R, None, YES), ValueError, r"mask: expected log_probability's shape, \(3, 4\), or that of a row, got \(3,\)"),
        (lambda: gates.self_critical_loss(A, R, R[:1]), ValueError, r"greedy_reward: expected reward's \(3,\), got \(1,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
