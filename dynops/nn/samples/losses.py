"""Trains networks with exits: losses over all of them, and gradients that do not grow with their number.

``logits`` are those of every exit, as a model with exits returns them in training: a list of E tensors
``[N, C]`` (or ``[N, C, ...]``), or one ``[E, N, C]``. Losses are means over the samples, computed in float32 at
least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ... import modes

Exits = Sequence[Tensor] | Tensor


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def gradient_rescale(x: Any, scale: float) -> Any:
    """Returns ``x``, a tensor or a pytree of tensors, and multiplies its gradient by ``scale``.

    Paper: Li et al., Improved techniques for training adaptive deep networks (ICCV 2019), gradient
        equilibrium.
    """
    if scale == 1 or not (torch.is_grad_enabled() or modes.transformed()):
        return x

    def rescaled(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        if modes.transformed():  # a Function with rules for all of them cannot be compiled
            return leaf.detach() + (leaf - leaf.detach()) * scale
        return _Rescale.apply(leaf, scale)

    return rescaled(x) if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, rescaled, x)


class GradientRescale(nn.Module):
    """:func:`gradient_rescale` as a layer: the identity, whose gradient is multiplied by ``scale``."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Any) -> Any:
        return gradient_rescale(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def weighted_exit_loss(
    logits: Exits,
    labels: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """``sum_e weights[e] * loss(logits[e], labels)``.

    Args:
        logits: those of E exits.
        labels: whatever ``loss`` takes.
        weights: one for each exit; None: 1 (MSDNet). BranchyNet weighs the first exit most; PABEE takes e /
            sum(1 … E).
        loss: of one exit, a scalar.

    Papers: BranchyNet (ICPR 2016), MSDNet (ICLR 2018), Shallow-Deep Networks (ICML 2019), PABEE
    (NeurIPS 2020).
    """
    logits = _exits(logits)
    weights = _weights(weights, len(logits), "exits")
    return sum(weight * loss(_wide(each), labels) for weight, each in zip(weights, logits, strict=True))


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, reverse: bool = False
) -> Tensor:
    """``T² * KL(p_teacher || p_student)``, p the softmax of the logits over T; the teacher gets no gradient.

    Args:
        student, teacher: ``[N, C]`` or ``[N, C, ...]``; the loss is a mean over all but the classes, 0 where
            there are none.
        temperature: T.
        reverse: ``KL(p_student || p_teacher)`` instead (FastBERT).

    Papers: Hinton et al., Distilling the knowledge in a neural network (2015); FastBERT (ACL 2020).
    """
    if student.shape != teacher.shape or student.dim() < 2:
        raise ValueError(
            f"teacher: expected the student's [N, C, ...] {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    log_s = torch.log_softmax(_wide(student) / temperature, 1)
    log_t = torch.log_softmax(_wide(teacher).detach() / temperature, 1)
    of, other = (log_s, log_t) if reverse else (log_t, log_s)
    gap = torch.where(of == -torch.inf, 0, of - other)  # 0 * log(0 / q) is 0, also for a q of 0
    divergence = (of.exp() * gap).sum(1)
    return temperature**2 * divergence.sum() / max(divergence.numel(), 1)


def self_distillation_loss(
    logits: Exits,
    temperature: float = 1.0,
    weights: Sequence[float] | Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """The sum over the exits but the last of their :func:`distillation_loss` from the last exit.

    Args:
        logits: those of E exits.
        temperature, reverse: see :func:`distillation_loss`.
        weights: one for each exit but the last; None: 1.

    IMTA trains exit e with ``(1 - a) * cross_entropy + a * distillation`` (``weighted_exit_loss`` and this,
    each with its weights); FastBERT trains the last exit first, then the others with this alone,
    ``reverse=True``.

    Papers: IMTA (ICCV 2019), one-for-all knowledge distillation; FastBERT (ACL 2020).
    """
    logits = _exits(logits)
    weights = _weights(weights, len(logits) - 1, "exits but the last")
    losses = (distillation_loss(each, logits[-1], temperature, reverse=reverse) for each in logits[:-1])
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return total if isinstance(total, Tensor) else _wide(logits[-1]).sum() * 0  # a single exit


def exit_probabilities(confidence: Exits) -> Tensor:
    """The probability ``[E, N]`` that a sample leaves at each exit, from its confidences.

    ``p[e] = confidence[e] * prod_{d < e} (1 - confidence[d])``; the last exit takes the rest.

    Args:
        confidence: probabilities of E - 1 exits, ``[N]`` each, as ``model(x, confidence=True)`` gives a
            :class:`LearnedExit`'s.
    """
    leave = torch.stack([_wide(each) for each in _exits(confidence, "confidence")])
    stay = torch.cat([torch.ones_like(leave[:1]), torch.cumprod(1 - leave, 0)])
    return torch.cat([leave * stay[:-1], stay[-1:]])


def exit_cost(confidence: Exits, costs: Sequence[float] | Tensor) -> Tensor:
    """The expected cost of a sample, a penalty that teaches learned exits to leave early.

    The mean over the samples of ``sum_e p[e] * costs[e]``, p the :func:`exit_probabilities`.

    Args:
        confidence: as in :func:`exit_probabilities`.
        costs: of a sample that leaves at each of E exits, everything until then included, in any unit (as a
            share of the last one: in [0, 1]).
    """
    chance = exit_probabilities(confidence)
    costs = _weights(costs, len(chance), "exits", "costs")
    costs = torch.as_tensor(costs, dtype=chance.dtype, device=chance.device)
    return (costs @ chance).sum() / max(chance.shape[1], 1)


def learned_exit_loss(
    logits: Exits,
    labels: Tensor,
    confidence: Exits,
    costs: Sequence[float] | Tensor,
    penalty: float = 1.0,
) -> Tensor:
    """Trains a :class:`LearnedExit`: the expected cross-entropy and ``penalty`` times the expected cost.

    The mean over the samples of ``sum_e p[e] * (cross_entropy(logits[e], label) + penalty * costs[e])``, p
    the :func:`exit_probabilities`; gradients go to the heads and to the confidences.

    Args:
        logits: ``[N, C]`` or ``[N, C, ...]`` of E exits.
        labels: int ``[N]`` or ``[N, ...]``.
        confidence, costs: as in :func:`exit_cost`.

    Papers: Demir, Early-exit convolutional neural networks (METU thesis 2019), EPNet (CIKM 2020), IDK
    cascades (UAI 2018) weigh prediction against cost in this way.
    """
    chance = exit_probabilities(confidence)
    logits = _exits(logits)
    if len(logits) != len(chance):
        raise ValueError(
            f"confidence: expected one for each of {len(logits)} exits but the last, got {len(chance) - 1}"
        )
    losses = [F.cross_entropy(_wide(each), labels, reduction="none") for each in logits]
    losses = torch.stack([each.flatten(1).mean(1) if each.dim() > 1 else each for each in losses])
    return (chance * losses).sum() / max(chance.shape[1], 1) + penalty * exit_cost(confidence, costs)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exits(values: Exits, name: str = "logits") -> list[Tensor]:
    values = list(values.unbind(0)) if isinstance(values, Tensor) and values.dim() > 1 else values
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, Tensor) for v in values):
        raise TypeError(f"{name}: expected a list of tensors, one for each exit, got {type(values).__name__}")
    return list(values)


def _weights(weights, count: int, what: str, name: str = "weights"):
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise ValueError(f"{name}: expected one for each of {count} {what}, got {len(weights)}")
    return weights
