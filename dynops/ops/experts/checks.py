"""Argument checks of the ops on experts."""

from __future__ import annotations

from typing import NamedTuple

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
    if isinstance(plan, ExpertPlan) and plan.order.device == x.device:
        return plan
    return checks.plan(plan, ExpertPlan, "plan", x.device, "from_topk")


def plan_rows(x, name: str, plan: ExpertPlan, packed: bool) -> None:
    """``x`` has a row for each token, or packed for each pair."""
    expected, what = (plan.num_rows, "row of the plan (T * K)") if packed else (plan.tokens, "token")
    if x.shape[0] != expected:
        raise ValueError(f"{name}: expected a row for each {what}, {expected}, got shape {tuple(x.shape)}")


class Weights(NamedTuple):
    """A linear layer of each expert, as ops take it: the last dimension of the matrix is contiguous."""

    matrix: Tensor  # [E, O, I], transposed [E, I, O]; int8 with a scale
    scale: Tensor | None  # [E, O]
    bias: Tensor | None  # [E, O]
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.matrix.shape[2] if self.transposed else self.matrix.shape[1]

    @property
    def inputs(self) -> int:
        return self.matrix.shape[1] if self.transposed else self.matrix.shape[2]


def weights_of(
    weight, bias, names: tuple[str, str], x: Tensor, experts: int, inputs: int | None, transposed: bool
) -> Weights:
    """Checks a weight and a bias of these names. A weight that is contiguous along the other dimension is turned.

    Args:
        inputs: of each expert; None: they are checked later.
    """
    (name, bias_name), scale = names, None
    shape = "[E, I, O]" if transposed else "[E, O, I]"
    if isinstance(weight, QuantizedExperts):
        weight, scale = weight
        if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or scale.dtype != torch.float32:
            raise TypeError(f"{name}: expected an int8 weight and a float32 scale in QuantizedExperts")
    else:
        checks.tensor(weight, name, 3, shape)
        checks.same(weight, name, x)
    if weight.dim() != 3 or weight.device != x.device:
        raise ValueError(
            f"{name}: expected {shape} on {x.device}, got {tuple(weight.shape)} on {weight.device}"
        )
    if weight.stride(2) != 1 and weight.stride(1) == 1:
        weight, transposed = weight.mT, not transposed
    checked = Weights(weight, scale, bias, transposed)
    if scale is not None:
        checks.shaped(scale, name, (weight.shape[0], checked.outputs), what="a scale ")
    if inputs is not None:
        fits(checked, name, experts, inputs)
    if bias is not None:
        checks.tensor(bias, bias_name, 2, "[E, O]")
        checks.same(bias, bias_name, x)
        checks.shaped(bias, bias_name, (experts, checked.outputs))
    return checked


def fits(weights: Weights, name: str, experts: int, inputs: int, of: str = "x") -> None:
    """The weights are of so many experts and inputs."""
    shape, got = weights.matrix.shape, weights.inputs
    if shape[0] != experts or got != inputs:
        raise ValueError(
            f"{name}: expected {experts} experts of {inputs} inputs, as the plan and {of} have them, got "
            f"{shape[0]} of {got} in shape {tuple(shape)}"
        )


def topk_weight_of(weight, plan: ExpertPlan) -> None:
    if weight is None:
        return
    checks.tensor(weight, "topk_weight", 2, "[T, K]")
    checks.floating(weight, "topk_weight")
    checks.shaped(weight, "topk_weight", plan.position.shape, what="")
    checks.on_plan(weight, plan, "topk_weight")


def activation(name: str | None, gated: bool) -> str:
    return checks.activation(name, (*ACTIVATIONS, CLAMPED) if gated else tuple(ACTIVATIONS))


def autocast(x: Tensor, *others) -> tuple:
    """``x`` and the tensors that go with it in autocast's dtype; int8 weights stay."""
    dtype = modes.autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))
