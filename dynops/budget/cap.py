"""cap: a hard limit on how many gates of a batch are open."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry import is_share
from ..plans import most_of


def cap(
    gate: Tensor, max_fraction: float, score: Tensor | None = None, *, per_sample: bool = False
) -> Tensor:
    """``gate`` with at most ``floor(max_fraction * n)`` of its n values open: those of highest score.

    What no input can exceed, an attacker's neither: slowdown attacks craft inputs that keep every gate open.
    Of equal scores the first ones stay. Reads nothing back to the host.

    Args:
        gate: ``[N]``, or of any shape (pixels ``[N, 1, H, W]``, channels ``[N, C]``): bool, integer or
            floating, nonzero = open.
        max_fraction: in [0, 1], of all n values of the gate; with ``per_sample`` of each sample's.
        score: of the gate's shape, real; NaN ranks last among the open ones. None: the gate itself.
        per_sample: limits each sample by itself. A sample's result then does not depend on its batch.

    Returns:
        The gate, zero where it was closed; dtype of ``gate``. Its gradient flows through what stays open.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Hong et al., A Panda? No, It's a Sloth: Slowdown Attacks on Adaptive Multi-Exit Neural Network
    Inference (ICLR 2021); Haque et al., ILFO: Adversarial Attack on Adaptive Neural Networks (CVPR 2020).
    """
    if not isinstance(gate, Tensor) or gate.is_complex():
        raise TypeError(f"gate: expected a real tensor, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if gate.dim() == 0:
        raise ValueError("gate: expected [N, ...], got a number")
    if not is_share(max_fraction):
        raise ValueError(f"max_fraction: expected a number in [0, 1], got {max_fraction!r}")
    score = gate if score is None else score
    if not isinstance(score, Tensor) or score.is_complex():
        raise TypeError(f"score: expected a real tensor, got {getattr(score, 'dtype', type(score).__name__)}")
    if score.shape != gate.shape:
        raise ValueError(f"score: expected the gate's shape {tuple(gate.shape)}, got {tuple(score.shape)}")
    lists = gate.shape[0] if per_sample else 1
    values = gate.shape[1:].numel() if per_sample else gate.numel()
    most = most_of(max_fraction, values)
    is_open = (gate.detach() != 0).reshape(lists, values)
    keep = _highest(is_open, score.detach().reshape(lists, values), most).view(gate.shape)
    return torch.where(keep, gate, torch.zeros_like(gate))


def _highest(is_open: Tensor, score: Tensor, most: int) -> Tensor:
    """bool ``[S, n]``: the ``most`` open ones of highest score in each row."""
    if score.is_floating_point():
        score = torch.where(score.isnan(), -math.inf, score)
    elif score.dtype == torch.bool:
        score = score.to(torch.uint8)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    open_first = is_open.gather(1, by_score).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, open_first)[:, :most]
    return is_open & torch.zeros_like(is_open).scatter_(1, order, True)
