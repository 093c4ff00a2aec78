"""Batch norms that no convolution precedes, with the residual sum and activation after them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry
from ...ops.epilogue import ACTIVATIONS
from ...ops.pixels.rows import scatter_pixels
from ..norm import norm_rows, uses_batch_statistics
from ..trace import Step
from .base import Layer, Rows, finish, place


class Norm(Layer):
    """A BatchNorm2d. In training mode its statistics are those of the rows that exist."""

    packs = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(place(step.target), step.inputs, step.out)
        self.norm = module.get_submodule(step.target)
        self.x, self.residual, self.activation = step.inputs[0], step.residual, step.activation
        self.refusal = statistics_refusal(self.name, self.norm)

    def check(self) -> None:
        check_norm(self.name, self.norm)

    def rows(self, run):
        if run.rows_of(self.x) is None:
            self.norm._check_input_dim(run.dense(self.x))
        plan = run.plan_like(self.x, self.out)
        x = run.at(self.x, plan)
        if self.residual is None:
            return Rows(norm_rows(self.norm, x, plan, None, self.activation), plan)
        residual = run.at(self.residual, plan, x.shape[1])
        if residual is not None:
            return Rows(norm_rows(self.norm, x, plan, residual, self.activation), plan)
        out = scatter_pixels(norm_rows(self.norm, x, plan), plan) + run.dense(self.residual)
        return ACTIVATIONS[self.activation](out)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        residual = None if self.residual is None else inputs[1]
        return finish(dense_norm(self.norm, inputs[0]), residual, self.activation)


def check_norm(name: str, norm: nn.BatchNorm2d) -> None:
    """Raises TypeError for statistics that are those of the batch."""
    if uses_batch_statistics(norm):
        raise TypeError(f"{name}: expected a norm in eval mode, got {norm} in training mode")


def statistics_refusal(name: str, norm: nn.BatchNorm2d) -> str:
    if norm.running_mean is None:
        return f"{name}: expected a norm with running statistics, got {norm}"
    return ""


def dense_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
