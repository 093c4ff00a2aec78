"""Thresholds that hold a budget, and temperatures that calibrate confidences, fitted on validation logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...plans import most_of
from .criteria import Criterion, MaxSoftmax

_STEPS = 60  # halvings: more than a float64 has bits to tell apart here
_LOG_RATIO = 60.0  # a share that is e^-60 of its neighbour is none in float64


class FittedThresholds(NamedTuple):
    """Thresholds and what they do to the samples that they were fitted on.

    ``threshold``: float64 ``[E - 1]`` in the criterion's units, for ``criterion.set_threshold``.
    ``accuracy``: of the predictions where the samples leave, in [0, 1]. ``cost``: the mean of the cost.
    ``shares``: float64 ``[E]``, of the samples that leave at each exit.
    """

    threshold: Tensor
    accuracy: float
    cost: float
    shares: Tensor


def fit_thresholds(
    logits: Sequence[Tensor] | Tensor,
    labels: Tensor,
    budget: float,
    costs: Sequence[float] | Tensor,
    criterion: Criterion | None = None,
    *,
    confidence: Sequence[Tensor] | Tensor | None = None,
) -> FittedThresholds:
    """Fits thresholds to a budget: the mean cost of a sample is ``budget`` at most, and as near to it as possible.

    MSDNet's procedure: a share proportional to ``q^e`` of the samples is to leave at exit e. At each exit but
    the last, the samples that are still there are sorted, the surest first. The threshold is the confidence
    of the last sample in that share; a sample that reaches it leaves. q is searched by bisection, with the cost
    of the exits that the thresholds choose, ties included. (A larger budget buys more computation,
    not always more accuracy.)

    Args:
        logits: of all E exits for N validation samples, ``[E, N, C]`` or a list, as ``model(x,
            all_exits=True)`` returns them.
        labels: int ``[N]``.
        budget: the mean cost that a sample may have, in the unit of ``costs``.
        costs: of a sample that leaves at each of E exits, everything until then included; not falling.
        criterion: computes the confidence; None: ``MaxSoftmax``. Its temperatures are used, its thresholds
            are not changed. A :class:`Patience` counts exits that agree: its thresholds are whole, and ties
            make the cost go in steps.
        confidence: of the first E - 1 exits, ``[N]`` each, instead of asking the criterion, where it reads
            more than logits (:class:`LearnedExit`): those of ``model(x, confidence=True)``.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a budget below the first exit's cost.

    A sample of NaN confidence leaves nowhere before the last exit. All is read back to the host once.

    Paper: Huang et al., Multi-scale dense networks (ICLR 2018); the authors' code.
    """
    criterion = MaxSoftmax(0.0) if criterion is None else criterion
    if not isinstance(criterion, Criterion):
        raise TypeError(f"criterion: expected a Criterion, got {type(criterion).__name__}")
    exits = _check_logits(logits)
    count, samples = len(exits), exits[0].shape[0]
    if not isinstance(labels, Tensor) or tuple(labels.shape) != (samples,):
        raise ValueError(f"labels: expected a tensor [{samples}], got {getattr(labels, 'shape', labels)!r}")
    costs = _check_costs(costs, count)
    if not budget >= costs[0]:
        raise ValueError(
            f"budget: expected at least the cost of the first exit, {float(costs[0])}, got {budget!r}"
        )
    if confidence is None:
        confidence = confidences(criterion, exits)
    if len(confidence) < count - 1 or any(each.shape != (samples,) for each in confidence[: count - 1]):
        raise ValueError(f"confidence: expected [{samples}] for each of {count - 1} exits")
    sure = [each.detach().cpu().double() for each in confidence[: count - 1]]
    ranked = [
        torch.where(each.isnan(), -math.inf, each).argsort(descending=True, stable=True) for each in sure
    ]

    def tried(log_ratio: float) -> tuple[list[float], Tensor, float]:
        levels, left_at = _leave_by_share(sure, ranked, _shares(log_ratio, count), samples)
        return levels, left_at, float(costs[left_at].mean())

    low, high = -_LOG_RATIO, _LOG_RATIO
    best = tried(high)
    if best[2] > budget:
        best = tried(low)
        if best[2] > budget:  # ties, or NaN: the first exit cannot let all leave
            raise ValueError(f"budget: no thresholds meet {budget!r}; the cheapest ones cost {best[2]}")
        for _ in range(_STEPS):
            middle = (low + high) / 2
            now = tried(middle)
            if now[2] <= budget:
                low, best = middle, now
            else:
                high = middle
    levels, left_at, cost = best
    correct = torch.stack([each.argmax(1) for each in exits]).cpu() == labels.cpu()
    accuracy = float(correct[left_at, torch.arange(samples, device="cpu")].double().mean())
    shares = torch.bincount(left_at, minlength=count).double() / samples
    threshold = criterion.to_threshold(torch.tensor(levels, dtype=torch.float64, device="cpu"))
    return FittedThresholds(threshold, accuracy, cost, shares)


def _shares(log_ratio: float, count: int) -> list[float]:
    """The geometric shares ``q^e / sum``."""
    return torch.softmax(log_ratio * torch.arange(count, dtype=torch.float64, device="cpu"), 0).tolist()


def _leave_by_share(
    sure: list[Tensor], ranked: list[Tensor], shares: list[float], samples: int
) -> tuple[list[float], Tensor]:
    """The least confidence that leaves at each exit but the last, and each sample's exit, int64 ``[N]``."""
    left_at = torch.full((samples,), len(sure), device="cpu")
    here = torch.ones(samples, dtype=torch.bool, device="cpu")
    levels = []
    for exit, (confidence, order) in enumerate(zip(sure, ranked, strict=True)):
        level = math.inf
        there = order[here[order]]  # the surest first
        wanted = min(most_of(shares[exit], samples), len(there))
        if wanted > 0:
            level = float(confidence[there[wanted - 1]])
            level = -math.inf if math.isnan(level) else level  # all that can leave do
        leaves = here & (confidence >= level)
        left_at[leaves], here = exit, here & ~leaves
        levels.append(level)
    return levels, left_at


def confidences(criterion: Criterion, logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """A criterion's confidences ``[N]`` at all but the last exit, from logits alone, without gradients."""
    made, memory = [], None
    with torch.no_grad():
        for exit, each in enumerate(list(logits)[:-1]):
            confidence, memory = criterion.measure(each, exit, None, memory)
            made.append(confidence)
    return made


def fit_temperature(logits: Sequence[Tensor] | Tensor, labels: Tensor) -> Tensor:
    """The temperature that minimises the cross-entropy of ``logits / temperature``.

    It is what ``criterion.set_temperature`` takes. By bisection: in 1 / temperature the loss is convex. In
    float64 and within [0.01, 100], also where logits are never wrong and the best temperature would be 0.

    Args:
        logits: ``[N, C]``, or of each exit a list of these or ``[E, N, C]``. N > 0, finite.
        labels: int ``[N]``.

    Returns:
        float64 ``[]``, or ``[E]``, on the CPU.

    Raises:
        TypeError, ValueError: an argument that does not fit, or logits that are not finite.

    Paper: Guo et al., On calibration of modern neural networks (ICML 2017).
    """
    if not isinstance(logits, Tensor) or logits.dim() == 3:
        return torch.stack([fit_temperature(each, labels) for each in _check_logits(logits)])
    if logits.dim() != 2 or tuple(labels.shape) != tuple(logits.shape[:1]) or len(labels) == 0:
        raise ValueError(
            f"labels: expected one for each row of logits [N, C], N > 0, got {tuple(labels.shape)} "
            f"for {tuple(logits.shape)}"
        )
    z, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    if not bool(z.isfinite().all()):
        raise ValueError("logits: expected finite numbers, got NaN or infinity in it")
    of_label = z.gather(1, labels[:, None])[:, 0]

    def slope(log_inverse: float) -> float:
        """Derivative of the loss by 1 / temperature: the mean logit under the softmax, less the label's."""
        return float(((torch.softmax(z * math.exp(log_inverse), 1) * z).sum(1) - of_label).mean())

    low, high = -math.log(100), math.log(100)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return torch.tensor(math.exp(-(low + high) / 2), dtype=torch.float64, device="cpu")


def _check_logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    exits = list(logits) if isinstance(logits, (Tensor, list, tuple)) else logits
    if not isinstance(exits, list) or not exits or not all(isinstance(each, Tensor) for each in exits):
        raise TypeError(f"logits: expected [E, N, C] or a list of [N, C], got {type(logits).__name__}")
    if any(each.dim() != 2 or each.shape != exits[0].shape for each in exits) or exits[0].shape[0] == 0:
        shapes = [tuple(each.shape) for each in exits]
        raise ValueError(f"logits: expected [N, C] with N > 0 of every exit, got {shapes}")
    return exits


def _check_costs(costs, count: int) -> Tensor:
    made = torch.as_tensor(costs, dtype=torch.float64, device="cpu").detach()
    if tuple(made.shape) != (count,) or not bool((made.diff() >= 0).all()):
        raise ValueError(
            f"costs: expected {count} numbers that do not fall, one for each exit, got {costs!r}"
        )
    return made
