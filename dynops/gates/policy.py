"""A policy network that plans every layer at once, and what trains it: sampled actions, policy gradients.

An action is 1 where a layer runs and 0 where it is skipped. BlockDrop's training step::

    decision = policy(images)
    probability = explore(decision.score)
    actions = sample_actions(probability)
    reward = usage_reward(actions, predict(images, actions) == labels)
    greedy = usage_reward(decision.mask, predict(images, decision.mask) == labels)
    loss = self_critical_loss(log_probability(probability, actions), reward, greedy)
    loss = loss - beta * entropy(probability).sum(1).mean()

None of this reads a value back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import (
    check_broadcasts,
    check_features,
    check_floating,
    check_int,
    check_number,
    check_rate,
    wide,
)
from .functions import Decision, straight_through
from .heads import logit, open_, pool


class PolicyNet(nn.Module):
    """BlockDrop's policy: a backbone network looks at the input once and decides about all layers.

    ``logit(backbone(x))``, one Bernoulli probability for each layer, so that all plans can be built before
    the first layer runs.

    Args:
        backbone: a module that gives ``[N, features]``, or a map ``[N, features, ...]``, whose mean is taken.
        features: the backbone's.
        layers: L, the layers that may be skipped.
        open_rate: the probability, about, at first. The mask is open from 0.5 on, so at first it is open.

    Shape:
        - x: what the backbone takes.
        - output: :class:`Decision`. mask ``[N, L]``: probability over 0.5, the greedy actions, with a
          straight-through gradient; score ``[N, L]``: the probabilities, to sample from
          (:func:`sample_actions`).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Wu et al., BlockDrop: Dynamic inference paths in residual networks (CVPR 2018).
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        layers: int,
        *,
        open_rate: float = 0.85,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_int("features", features)
        check_int("layers", layers)
        check_rate("open_rate", open_rate)
        self.features, self.layers, self.open_rate = features, layers, open_rate
        self.backbone = backbone
        self.logit = nn.Linear(features, layers, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The backbone keeps its parameters."""
        open_(self.logit, logit(self.open_rate))

    def forward(self, x: Tensor) -> Decision:
        seen = self.backbone(x)
        check_floating("backbone(x)", seen)
        check_features(seen, self.features)
        return straight_through(self.logit(pool(seen)))


# ------------------------------------------------------------------------------------ actions


def explore(probability: Tensor, alpha: float = 0.8) -> Tensor:
    """``alpha * p + (1 - alpha) * (1 - p)``: within [1 - alpha, alpha], so that sampling goes on exploring.

    Raises:
        TypeError: probabilities that are no floating tensor. ValueError: alpha outside [0.5, 1].

    Paper: BlockDrop, with alpha 0.8.
    """
    check_floating("probability", probability)
    check_number("alpha", alpha)
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha: expected it in [0.5, 1], got {alpha!r}")
    return alpha * probability + (1 - alpha) * (1 - probability)


@torch.no_grad()
def sample_actions(probability: Tensor, categorical: bool = False) -> Tensor:
    """Sampled actions, without a gradient.

    Args:
        probability: floating, in [0, 1]. Bernoulli: any shape. Categorical: ``[..., K]``, of any sum.
        categorical: one choice of K instead of independent actions.

    Returns:
        Bernoulli: 0 or 1, of the shape and dtype of probability; NaN where that is. Categorical: int64
            ``[...]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_probability(probability, categorical)
    p = wide(probability)
    if categorical:  # the race of K exponential clocks; torch.multinomial waits for a GPU
        return (p / torch.empty_like(p).exponential_()).argmax(-1)
    actions = (torch.rand_like(p) < p).to(p.dtype) + (p - p)
    return actions.to(probability.dtype)


def log_probability(probability: Tensor, actions: Tensor, categorical: bool = False) -> Tensor:
    """The logarithm of the probability of actions, with its gradient; float32 at least.

    Probabilities are kept an eps of the dtype away from 0 and 1, where they have no gradient.

    Args:
        probability: as in :func:`sample_actions`; categorical ones are divided by their sum.
        actions: what it returned.
        categorical: as there.

    Returns:
        The shape of actions.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_probability(probability, categorical)
    expected = probability.shape[:-1] if categorical else probability.shape
    if not isinstance(actions, Tensor) or actions.shape != expected:
        raise ValueError(
            f"actions: expected shape {tuple(expected)}, got {tuple(getattr(actions, 'shape', ()))}"
        )
    if categorical:
        if actions.dtype != torch.int64:
            raise TypeError(f"actions: expected int64 choices, got {actions.dtype}")
        return _distribution(probability).gather(-1, actions[..., None])[..., 0].log()
    p = _clamped(probability)
    actions = actions.to(p.dtype)
    return actions * p.log() + (1 - actions) * torch.log1p(-p)


def entropy(probability: Tensor, categorical: bool = False) -> Tensor:
    """The entropy, in nats, of each action (``[...]``), or of a choice of K (``[..., K]`` to ``[...]``).

    float32 at least. Probabilities are clamped as in :func:`log_probability`.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_probability(probability, categorical)
    if categorical:
        p = _distribution(probability)
        return -(p * p.log()).sum(-1)
    p = _clamped(probability)
    return -(p * p.log() + (1 - p) * torch.log1p(-p))


def _check_probability(probability, categorical: bool) -> None:
    check_floating("probability", probability)
    if categorical and (probability.dim() == 0 or probability.shape[-1] == 0):
        raise ValueError(f"probability: expected [..., K], got shape {tuple(probability.shape)}")


def _clamped(probability: Tensor) -> Tensor:
    p = wide(probability)
    eps = torch.finfo(p.dtype).eps
    return p.clamp(eps, 1 - eps)


def _distribution(probability: Tensor) -> Tensor:
    p = wide(probability)
    return (p / p.sum(-1, keepdim=True)).clamp_min(torch.finfo(p.dtype).eps)


# ------------------------------------------------------------------------------------ rewards


def usage_reward(actions: Tensor, correct: Tensor, penalty: float = 1.0) -> Tensor:
    """BlockDrop's reward: ``1 - (used / L) ** 2`` where the prediction is right, ``-penalty`` where not.

    Args:
        actions: ``[N, L]``, nonzero where a layer ran.
        correct: bool ``[N]``.
        penalty: BlockDrop's gamma; higher keeps more accuracy.

    Returns:
        float ``[N]``, without a gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_matrix("actions", actions)
    check_number("penalty", penalty)
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        raise TypeError(
            f"correct: expected a bool tensor, got {getattr(correct, 'dtype', type(correct).__name__)}"
        )
    _check_batch("correct", correct, actions)
    used = wide((actions.detach() != 0).to(actions.dtype)).mean(1)
    return torch.where(correct, 1 - used.square(), -penalty)


def reward_to_go(actions: Tensor, loss: Tensor, alpha: float, cost: Tensor | None = None) -> Tensor:
    """SkipNet's reward for gate l: ``-loss + alpha / L * sum over i >= l of (1 - actions[i]) * cost[i]``.

    Args:
        actions: ``[N, L]``, in the order in which the layers run.
        loss: ``[N]``, the loss of each sample's prediction.
        alpha: what skipping everything is worth.
        cost: ``[L]``, that of each layer, relative to their mean; None: ones.

    Returns:
        ``[N, L]``, without a gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    _check_matrix("actions", actions)
    check_floating("loss", loss)
    _check_batch("loss", loss, actions)
    check_number("alpha", alpha)
    saved = wide(1 - actions.detach())
    if cost is not None:
        if cost.shape != actions.shape[1:]:
            raise ValueError(f"cost: expected [{actions.shape[1]}], got shape {tuple(cost.shape)}")
        saved = saved * cost.detach()
    return alpha / max(actions.shape[1], 1) * saved.flip(1).cumsum(1).flip(1) - loss.detach()[:, None]


def curriculum_mask(layers: int, free: int, device=None) -> Tensor:
    """bool ``[layers]``: true for the last ``free`` layers, those that the policy decides about; others run.

    ``torch.where(mask, actions, 1)`` are the actions, and ``self_critical_loss(..., mask=mask)`` trains
    those. BlockDrop frees one more in each epoch.

    Raises:
        ValueError: a count that is negative, or ``free`` over ``layers``.
    """
    check_int("layers", layers)
    check_int("free", free, least=0)
    if free > layers:
        raise ValueError(f"free: expected at most the {layers} layers, got {free}")
    return torch.arange(layers, device=device) >= layers - free


# ------------------------------------------------------------------------------------- losses


def reinforce_loss(
    log_probability: Tensor,
    reward: Tensor,
    baseline: Tensor | float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``-mean over N of sum over L of mask * log_probability * (reward - baseline)``: REINFORCE's gradient.

    SkipNet's hybrid:
    ``loss.mean() + weight * reinforce_loss(log_probability(p, actions), reward_to_go(actions, loss, alpha))``.

    Args:
        log_probability: ``[N, L]`` or ``[N]``, of the actions taken.
        reward: ``[N]``, or ``[N, L]`` one for each action; no gradient flows to it.
        baseline: what to subtract from it, broadcasting with reward.
        mask: ``[L]`` or ``[N, L]``: the actions that count; None: all.

    Returns:
        A scalar; zero for N = 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Williams, Simple statistical gradient-following algorithms (Machine Learning 1992); Wang et al.,
    SkipNet (ECCV 2018).
    """
    check_floating("log_probability", log_probability)
    check_floating("reward", reward)
    if log_probability.dim() not in (1, 2):
        raise ValueError(f"log_probability: expected [N, L] or [N], got shape {tuple(log_probability.shape)}")
    shapes = {tuple(log_probability.shape), tuple(log_probability.shape[:1])}
    if tuple(reward.shape) not in shapes:
        raise ValueError(
            f"reward: expected shape {' or '.join(map(str, sorted(shapes)))}, got {tuple(reward.shape)}"
        )
    if isinstance(baseline, Tensor):
        check_broadcasts("baseline", baseline, reward.shape)
    advantage = (reward if baseline is None else reward - baseline).detach()
    if advantage.dim() < log_probability.dim():
        advantage = advantage[:, None]
    terms = log_probability * advantage
    if mask is not None:
        if mask.shape not in (log_probability.shape, log_probability.shape[1:]):
            raise ValueError(
                f"mask: expected log_probability's shape, {tuple(log_probability.shape)}, or that of a row, "
                f"got {tuple(mask.shape)}"
            )
        terms = terms * mask
    return -terms.sum() / max(log_probability.shape[0], 1)


def self_critical_loss(
    log_probability: Tensor, reward: Tensor, greedy_reward: Tensor, mask: Tensor | None = None
) -> Tensor:
    """:func:`reinforce_loss` with the reward of the greedy actions (probability over 0.5) as the baseline.

    Args:
        log_probability: ``[N, L]``, of the sampled actions.
        reward: ``[N]``, theirs.
        greedy_reward: ``[N]``, that of the same samples under the greedy actions.
        mask: ``[L]`` or ``[N, L]``, as :func:`curriculum_mask` gives it.

    Returns:
        A scalar; zero for N = 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Rennie et al., Self-critical sequence training (CVPR 2017); Wu et al., BlockDrop (CVPR 2018).
    """
    check_floating("greedy_reward", greedy_reward)
    if greedy_reward.shape != reward.shape:
        raise ValueError(
            f"greedy_reward: expected reward's {tuple(reward.shape)}, got {tuple(greedy_reward.shape)}"
        )
    return reinforce_loss(log_probability, reward, greedy_reward, mask)


def _check_matrix(name: str, value) -> None:
    check_floating(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected [N, L], got shape {tuple(value.shape)}")


def _check_batch(name: str, value: Tensor, actions: Tensor) -> None:
    if value.shape != actions.shape[:1]:
        raise ValueError(
            f"{name}: expected [{actions.shape[0]}], one for each sample, got shape {tuple(value.shape)}"
        )
