"""Weights of experts in eight bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedExperts(NamedTuple):
    """Weights of eight bits: ``weight[e, o, i] * scale[e, o]``.

    ``weight``: int8 ``[E, O, I]`` (transposed ``[E, I, O]``); ``scale``: float32 ``[E, O]``.
    """

    weight: Tensor
    scale: Tensor


def quantize_experts(weight: Tensor, transposed: bool = False) -> QuantizedExperts:
    """Rounds the weights of experts to eight bits, with a scale for each output channel.

    Args:
        weight: ``[E, O, I]``, floating; ``transposed``: ``[E, I, O]``.

    Returns:
        ``QuantizedExperts(weight, scale)``: int8 of ``weight``'s shape, and float32 ``[E, O]``: the largest magnitude
        of the channel / 127. Where few rows share an expert the op's time is the weight's bytes, a quarter of
        float32's. Taken by ``grouped_linear`` and ``experts_mlp`` in place of a weight, without a gradient of it.
    """
    rows = weight.detach().float()
    dim = 1 if transposed else 2
    largest = rows.abs().amax(dim, keepdim=True) if rows.shape[dim] else rows.new_zeros(rows.mT.shape[:2])
    scale = largest / 127
    levels = (rows / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return QuantizedExperts(levels, scale.reshape(weight.shape[0], -1).contiguous())


def float_weight(weight: Tensor, scale: Tensor | None, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The weight itself, or ``weight * scale`` of eight bits."""
    if scale is None:
        return weight
    return (weight * (scale[:, None] if transposed else scale[:, :, None])).to(dtype)
