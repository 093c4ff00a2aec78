"""Norms that no convolution precedes: of the batch, and of groups of channels of a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry
from ...kernels.cpu import prepared
from ...ops.epilogue import ACTIVATIONS, apply_epilogue
from ...ops.pixels.rows import scatter_pixels
from ...plans import PixelPlan
from ..norm import check_features, norm_rows, uses_batch_statistics
from ..trace import Step, dense_type
from .base import Layer, Rows, finish, place
from .pool import pixels_of_samples, spread_over, sums_of_samples, takes_kernels


class Norm(Layer):
    """A BatchNorm2d, with the residual sum and activation after it.

    In training mode its statistics are those of the rows that exist.
    """

    packs = joins = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(place(step.target), step.inputs, step.out)
        self.norm = module.get_submodule(step.target)
        self.x, self.residual, self.activation = step.inputs[0], step.residual, step.activation
        self.refusal = statistics_refusal(self.name, self.norm)

    def check(self) -> None:
        check_norm(self.name, self.norm)

    def rows(self, run):
        if (waiting := run.waiting(self.x)) is not None:
            out = run.normed(self.norm, waiting)
            out = out if self.residual is None else out + run.map(self.residual)
            return ACTIVATIONS[self.activation](out)
        if run.rows_of(self.x) is None:
            self.norm._check_input_dim(run.dense(self.x))
        plan = run.plan_like(self.x, self.out)
        x = run.at(self.x, plan)
        if self.residual is None:
            return Rows(norm_rows(self.norm, x, plan, None, self.activation), plan)
        residual = run.at(self.residual, plan)
        if residual is not None:
            return Rows(norm_rows(self.norm, x, plan, residual, self.activation), plan)
        out = scatter_pixels(norm_rows(self.norm, x, plan), plan) + run.dense(self.residual)
        return ACTIVATIONS[self.activation](out)

    def join(self, bound) -> None:
        size, channels = bound.same(self.inputs)
        bound.multiply(self, size, channels, norm=self.norm, activation=self.activation)

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


class GroupNorm(Layer):
    """A converted GroupNorm or InstanceNorm2d: its statistics are those of each sample's active pixels."""

    def __init__(self, name: str, step: Step, norm: nn.Module):
        super().__init__(name, step.inputs, step.out)
        self.norm, self.forward = norm, dense_type(norm).forward
        self.joins = True
        self.refusal = f"{name}: expected a layer that reads a fixed neighbourhood, got {norm}"

    def rows(self, run):
        x = self.inputs[0]
        if (pixels := run.pixels_in_one_axis(x)) is not None:
            return run.normed(self.norm, pixels)
        if run.rows_of(x) is None and run.dense(x).dim() != 4:
            return self.forward(self.norm, run.dense(x))
        plan = run.plan_like(x, self.out)
        return Rows(group_norm_rows(self.norm, run.at(x, plan), plan), plan)

    def join(self, bound) -> None:
        groups = self.norm.num_groups if isinstance(self.norm, nn.GroupNorm) else self.norm.num_features
        bound.group_norm(self, self.norm, groups)


def group_norm_rows(norm: nn.Module, rows: Tensor, plan: PixelPlan) -> Tensor:
    """``norm`` of the rows ``[P, C]``, with the mean and variance of each sample's group over its active pixels.

    Accumulates in float32 at least. With one value in a group the variance is 0.
    """
    check_features(norm, rows.shape[1])
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else rows.shape[1]
    return group_norm_of_rows(rows, plan, groups, norm.weight, norm.bias, norm.eps)


def group_norm_of_rows(rows: Tensor, plan: PixelPlan, groups: int, weight, bias, eps: float) -> Tensor:
    """As :func:`group_norm_rows`, of a norm's parameters."""
    if takes_kernels(rows, plan, weight, bias) and len(plan):
        return prepared.group_norm(rows, plan.index, plan.inverse(), groups, weight, bias, eps)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(1, (groups, -1))  # [P, G, C / G]
    live = None if plan.count is None else (plan.index >= 0)[:, None]
    pixels = pixels_of_samples(plan)[:, None].to(wide.dtype)

    def mean(values: Tensor) -> Tensor:  # [P, G] to [P, G, 1], or [1, G, 1] of one sample
        values = values if live is None else torch.where(live, values, 0)
        means = sums_of_samples(values, plan) / pixels
        return (means if plan.shape[0] == 1 else spread_over(means, plan))[:, :, None]

    centred = wide - mean(wide.mean(2))
    out = centred * (mean(centred.square().mean(2)) + eps).rsqrt()
    out = apply_epilogue(out.flatten(1).to(rows.dtype), "", weight, bias, None, None)
    return out if live is None else torch.where(live, out, 0)
