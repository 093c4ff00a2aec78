"""Losses that hold a budget: of gates, or of what :class:`MacCounter` counted. (Of experts: ``dynops.nn``.)

Gates are given as ``gates``: a tensor ``[N, L]`` of L gates, or one tensor (or
:class:`dynops.gates.Decision`, of which the mask counts) for each layer, whose first dimension is the batch.
Hard in the forward and soft in the backward pass, they have the gradient of the soft one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..geometry import is_share
from ..nn import ChannelGatedConv2d
from .beta import beta_cdf
from .macs import LayerMacs, MacCounter


def target_rate_loss(gates, target: float | Sequence[float]) -> Tensor:
    """The mean over layers of ``(target - mean gate)²``.

    Args:
        gates: see above.
        target: the rate of open gates, in [0, 1]; one for all layers or one for each (ConvNet-AIG keeps the
            first ones open).

    Paper: Veit and Belongie, Convolutional Networks with Adaptive Inference Graphs (ECCV 2018).
    """
    rates = _rates(_masks(gates))
    if isinstance(target, (int, float)):
        target = [target] * len(rates)
    if len(target) != len(rates):
        raise ValueError(
            f"target: expected a number, or one for each of {len(rates)} layers, got {len(target)}"
        )
    for value in target:
        if not is_share(value):
            raise ValueError(f"target: expected rates in [0, 1], got {value!r}")
    return (rates - rates.new_tensor(target)).square().mean()


def mask_l1_loss(masks) -> Tensor:
    """The mean over layers of the mean \\|mask\\|: the rate of open gates where they are 0 and 1.

    Args:
        masks: as ``gates`` above.
    """
    return _rates([mask.abs() for mask in _masks(masks)]).mean()


def cost_loss(gates, costs: Sequence[float] | Tensor, target: float | None = None) -> Tensor:
    """The share of a cost that is paid, or its squared distance to a target.

    The share is ``sum_l costs[l] * mean gate_l / sum costs``.

    Args:
        gates: see above.
        costs: ``[L]``, what a layer costs where its gate is open: measured energy or latency, in any unit.
        target: the share to hold, in [0, 1]; None: less is better.

    Paper: EnergyNet (2018): energy of each layer from a table.
    """
    rates = _rates(_masks(gates))
    costs = torch.as_tensor(costs, dtype=rates.dtype, device=rates.device)
    if costs.shape != rates.shape:
        raise ValueError(
            f"costs: expected [{len(rates)}], one for each layer, got shape {tuple(costs.shape)}"
        )
    share = (costs * rates).sum() / costs.sum()
    return share if target is None else (share - target).square()


# ------------------------------------------------------------------------------------------ MACs


def network_ratio_loss(macs, target: float) -> Tensor:
    """``(sum_b c_b / sum_b C_b - target)²``, c the MACs that were computed and C those with every gate open.

    Args:
        macs: a :class:`MacCounter` after its forward pass (everything counts), or :class:`LayerMacs` of the
            blocks that count, as a mapping or an iterable; see :func:`blocks_of`.
        target: theta, the share to hold, in [0, 1].

    Paper: Verelst and Tuytelaars, Dynamic Convolutions (CVPR 2020).
    """
    _check_target(target)
    if isinstance(macs, MacCounter):
        return (macs.total / max(macs.dense, 1.0) - target).square()
    layers = _layers(macs)
    computed = torch.stack([layer.computed for layer in layers]).sum()
    return (computed / max(sum(layer.dense for layer in layers), 1.0) - target).square()


def block_bounds_loss(macs, target: float, progress: float, anneal: float = 0.33) -> Tensor:
    """Bounds of each block's share that open while training goes on: none closes or opens for good too early.

    With ``q = cos²(pi/2 * min(progress / anneal, 1))`` and s a block's share of its own MACs, the mean over
    blocks of::

        max(0, q * target - s)² + max(0, s - (1 - q * (1 - target)))²

    Args:
        macs: :class:`LayerMacs` of the blocks, as a mapping or an iterable, or a :class:`MacCounter`: its
            layers.
        target: as in :func:`network_ratio_loss`.
        progress: the share of training that is done, in [0, 1].
        anneal: the share of training after which there are no bounds.

    Paper: Verelst and Tuytelaars, Dynamic Convolutions (CVPR 2020); the schedule is that of its code.
    """
    _check_target(target)
    if not progress >= 0 or not anneal > 0:
        raise ValueError(
            f"progress, anneal: expected progress >= 0 and anneal > 0, got {progress!r}, {anneal!r}"
        )
    q = math.cos(min(progress / anneal, 1.0) * math.pi / 2) ** 2
    shares = [layer.computed / layer.dense for layer in _layers(macs) if layer.dense > 0]
    if not shares:
        raise ValueError("macs: expected at least one block with MACs, got none")
    share = torch.stack(shares)
    below = (q * target - share).clamp(min=0).square()
    above = (share - (1 - q * (1 - target))).clamp(min=0).square()
    return (below + above).mean()


def blocks_of(layers: Mapping[str, LayerMacs], names: Iterable[str]) -> dict[str, LayerMacs]:
    """The MACs of blocks, each the sum of the layers in a module of that name.

    Args:
        layers: ``MacCounter.layers``.
        names: of modules.

    Raises:
        ValueError: a name under which nothing was counted.
    """
    blocks = {}
    for name in names:
        inside = [macs for key, macs in layers.items() if key == name or key.startswith(f"{name}.")]
        if not inside:
            raise ValueError(f"names: expected modules with counted layers, got {name!r}")
        computed = torch.stack([layer.computed for layer in inside]).sum()
        blocks[name] = LayerMacs(computed, sum(layer.dense for layer in inside))
    return blocks


# ------------------------------------------------------------------------------------- thresholds


def threshold_target_loss(thresholds: nn.Module | Iterable[Tensor], target: float) -> Tensor:
    """``sum (threshold - target)²`` over all channels: what holds CGNet's gates closed.

    Args:
        thresholds: a model, whose :class:`dynops.nn.ChannelGatedConv2d` count, or the thresholds.
        target: T.

    Paper: Hua et al., Channel Gating Neural Networks (NeurIPS 2019).
    """
    if isinstance(thresholds, nn.Module):
        thresholds = [m.threshold for m in thresholds.modules() if isinstance(m, ChannelGatedConv2d)]
    losses = [(threshold - target).square().sum() for threshold in thresholds]
    if not losses:
        raise ValueError("thresholds: expected a model with ChannelGatedConv2d, or thresholds, got none")
    return torch.stack(losses).sum()


def batch_shaping_loss(scores: Tensor, alpha: float = 0.6, beta: float = 0.4) -> Tensor:
    """The Cramér–von Mises distance of each gate's scores over a batch to a Beta distribution.

    With the N scores of a gate in ascending order x_1 … x_N and F the distribution's cumulative function, the
    mean over i and over gates of ``(i / (N + 1) - F(x_i))²``: gates learn to differ between samples.

    Args:
        scores: floating ``[N, ...]`` in [0, 1], soft scores of gates over a batch.
        alpha, beta: of the Beta distribution; the paper's mean is 0.6.

    Paper: Bejnordi et al., Batch-Shaping for Learning Conditional Channel Gated Networks (ICLR 2020).
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() == 0:
        what = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating tensor [N, ...], got {what}")
    if not alpha > 0 or not beta > 0:
        raise ValueError(f"alpha, beta: expected positive numbers, got {alpha!r}, {beta!r}")
    if scores.numel() == 0:
        return scores.sum()
    n = scores.shape[0]
    ordered = scores.reshape(n, -1).sort(0).values
    cumulative = beta_cdf(ordered, alpha, beta)
    empirical = torch.arange(1, n + 1, dtype=cumulative.dtype, device=scores.device)[:, None] / (n + 1)
    return (empirical - cumulative).square().mean()


# ------------------------------------------------------------------------------------ arguments


def _masks(gates) -> list[Tensor]:
    """A tensor for each layer."""
    if isinstance(gates, Tensor):
        if gates.dim() != 2:
            raise ValueError(
                f"gates: expected [N, L], or a tensor for each layer, got shape {tuple(gates.shape)}"
            )
        gates = gates.unbind(1)
    elif hasattr(gates, "mask"):
        gates = [gates]
    masks = [getattr(gate, "mask", gate) for gate in gates]
    if not masks:
        raise ValueError("gates: expected at least one, got none")
    for mask in masks:
        if not isinstance(mask, Tensor):
            raise TypeError(f"gates: expected tensors or Decisions, got {type(mask).__name__}")
    return [mask if mask.is_floating_point() else mask.float() for mask in masks]


def _rates(masks: list[Tensor]) -> Tensor:
    """``[L]``, float32 at least; 0 for a layer without values."""
    wide = [mask.to(torch.promote_types(mask.dtype, torch.float32)) for mask in masks]
    return torch.stack([mask.sum() / max(mask.numel(), 1) for mask in wide])


def _layers(macs) -> list[LayerMacs]:
    if isinstance(macs, MacCounter):
        macs = macs.layers
    if not isinstance(macs, Iterable):
        raise TypeError(f"macs: expected a MacCounter or LayerMacs of blocks, got {type(macs).__name__}")
    layers = list(macs.values() if isinstance(macs, Mapping) else macs)
    if not layers or not all(hasattr(layer, "computed") for layer in layers):
        raise TypeError(
            f"macs: expected a MacCounter or LayerMacs, got {type(macs).__name__} of {len(layers)}"
        )
    return layers


def _check_target(target: float) -> None:
    if not is_share(target):
        raise ValueError(f"target: expected a share in [0, 1], got {target!r}")
