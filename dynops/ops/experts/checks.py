"""Argument checks of the ops on experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import modes
from ...plans import ExpertPlan
from .. import checks
from ..epilogue import ACTIVATIONS
from .quantized import QuantizedExperts

CLAMPED = "clamped_swiglu"


def rows(x, name: str) -> Tensor:
    checks.tensor(x, name, 2, "rows [R, C]")
    checks.floating(x, name)
    return x


def plan_of(plan, x: Tensor) -> ExpertPlan:
    return checks.plan(plan, ExpertPlan, "plan", x.device, "from_topk")


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
    checks.shaped(bias, name, (experts, outputs))


def topk_weight_of(weight, plan: ExpertPlan) -> None:
    if weight is None:
        return
    checks.tensor(weight, "topk_weight", 2, "[T, K]")
    checks.floating(weight, "topk_weight")
    checks.shaped(weight, "topk_weight", plan.position.shape)
    checks.on_plan(weight, plan, "topk_weight")


def activation(name: str | None, gated: bool) -> str:
    return checks.activation(name, (*ACTIVATIONS, CLAMPED) if gated else tuple(ACTIVATIONS))


def autocast(x: Tensor, *others) -> tuple:
    """``x`` and the tensors that go with it in autocast's dtype; int8 weights stay."""
    dtype = modes.autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))
