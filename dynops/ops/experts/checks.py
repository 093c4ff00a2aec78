"""Argument checks of the ops on experts, and weights of eight bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...plans import ExpertPlan
from .. import checks
from ..epilogue import ACTIVATIONS

CLAMPED = "clamped_swiglu"


class QuantizedExperts(NamedTuple):
    """Weights of eight bits: ``weight[e, o, i] * scale[e, o]``.

    ``weight``: int8 ``[E, O, I]`` (transposed ``[E, I, O]``); ``scale``: float32 ``[E, O]``.
    """

    weight: Tensor
    scale: Tensor


def rows(x, name: str) -> Tensor:
    checks.tensor(x, name, 2, "rows [R, C]")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    return x


def plan_of(plan, x: Tensor) -> ExpertPlan:
    if not isinstance(plan, ExpertPlan):
        raise TypeError(f"plan: expected an ExpertPlan (ExpertPlan.from_topk), got {type(plan).__name__}")
    if plan.device != x.device:
        raise ValueError(f"plan: expected it on x's device {x.device}, got {plan.device}")
    return plan


def plan_rows(x, name: str, plan: ExpertPlan, packed: bool) -> None:
    """``x`` has a row for each token, or packed for each pair."""
    expected, what = (plan.num_rows, "row of the plan (T * K)") if packed else (plan.tokens, "token")
    if x.shape[0] != expected:
        raise ValueError(f"{name}: expected a row for each {what}, {expected}, got shape {tuple(x.shape)}")


def weight_of(weight, name: str, x: Tensor, transposed: bool) -> tuple[Tensor, Tensor | None, bool]:
    """The weight, its scale if it has eight bits, and whether it is transposed.

    Its last dimension is contiguous: a weight that is so along the other one counts as transposed.
    """
    shape = "[E, I, O]" if transposed else "[E, O, I]"
    if isinstance(weight, QuantizedExperts):
        weight, scale = weight
        if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or scale.dtype != torch.float32:
            raise TypeError(f"{name}: expected an int8 weight and a float32 scale in QuantizedExperts")
    else:
        scale = None
        checks.tensor(weight, name, 3, shape)
        checks.same(weight, name, x)
    if weight.dim() != 3 or weight.device != x.device:
        raise ValueError(
            f"{name}: expected {shape} on {x.device}, got {tuple(weight.shape)} on {weight.device}"
        )
    outputs = weight.shape[2] if transposed else weight.shape[1]
    if scale is not None and tuple(scale.shape) != (weight.shape[0], outputs):
        raise ValueError(f"{name}: expected a scale {(weight.shape[0], outputs)}, got {tuple(scale.shape)}")
    if weight.stride(2) != 1 and weight.stride(1) == 1:
        return weight.mT, scale, not transposed
    return weight, scale, transposed


def sizes_of(weight: Tensor, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of an expert."""
    return (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])


def fits(weight: Tensor, name: str, transposed: bool, experts: int, inputs: int, of: str = "x") -> None:
    got = sizes_of(weight, transposed)[1]
    if weight.shape[0] != experts or got != inputs:
        raise ValueError(
            f"{name}: expected {experts} experts of {inputs} inputs, as the plan and {of} have them, got "
            f"{weight.shape[0]} of {got} in shape {tuple(weight.shape)}"
        )


def bias_of(bias, name: str, x: Tensor, experts: int, outputs: int) -> None:
    if bias is None:
        return
    checks.tensor(bias, name, 2, "[E, O]")
    checks.same(bias, name, x)
    if tuple(bias.shape) != (experts, outputs):
        raise ValueError(f"{name}: expected shape {(experts, outputs)}, got {tuple(bias.shape)}")


def topk_weight_of(weight, plan: ExpertPlan) -> None:
    if weight is None:
        return
    checks.tensor(weight, "topk_weight", 2, "[T, K]")
    if not weight.is_floating_point():
        raise TypeError(f"topk_weight: expected a floating dtype, got {weight.dtype}")
    if tuple(weight.shape) != tuple(plan.position.shape):
        raise ValueError(f"topk_weight: expected {tuple(plan.position.shape)}, got {tuple(weight.shape)}")
    if weight.device != plan.device:
        raise ValueError(f"topk_weight: expected it on the plan's device {plan.device}, got {weight.device}")


def activation(name: str | None, gated: bool) -> str:
    known = (*ACTIVATIONS, CLAMPED) if gated else tuple(ACTIVATIONS)
    if name is not None and (not isinstance(name, str) or name not in known):
        raise ValueError(f"activation: expected None or one of {known[1:]}, got {name!r}")
    return name or ""


def autocast(x: Tensor, *others) -> tuple:
    """``x`` and the tensors that go with it in autocast's dtype; int8 weights stay."""
    dtype = modes.autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))
