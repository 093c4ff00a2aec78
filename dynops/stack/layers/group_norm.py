"""Group and instance norms, which have a view of each whole sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.epilogue import apply_epilogue
from ...plans import PixelPlan
from ..trace import Step, dense_type
from .base import Layer, Rows


class GroupNorm(Layer):
    """A converted GroupNorm or InstanceNorm2d: its statistics are those of each sample's active pixels."""

    def __init__(self, name: str, step: Step, norm: nn.Module):
        super().__init__(name, step.inputs, step.out)
        self.norm, self.forward = norm, dense_type(norm).forward
        self.refusal = f"{name}: expected a layer that reads a fixed neighbourhood, got {norm}"

    def rows(self, run):
        x = self.inputs[0]
        if run.rows_of(x) is None and run.dense(x).dim() != 4:
            return self.forward(self.norm, run.dense(x))
        plan = run.plan_like(x, self.out)
        return Rows(group_norm_rows(self.norm, run.at(x, plan), plan), plan)


def group_norm_rows(norm: nn.Module, rows: Tensor, plan: PixelPlan) -> Tensor:
    """``norm`` of the rows ``[P, C]``, with the mean and variance of each sample's group over its active pixels.

    Accumulates in float32 at least. With one value in a group the variance is 0.
    """
    n, h, w = plan.shape
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else rows.shape[1]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(1, (groups, -1))  # [P, G, C / G]
    live = plan.index >= 0
    owner = torch.where(live, plan.index.long() // max(h * w, 1), n)
    pixels = wide.new_zeros(n + 1).index_add(0, owner, live.to(wide.dtype)).clamp(min=1)[:, None]

    def mean(values: Tensor) -> Tensor:  # [P, G] to [P, G, 1]
        return (values.new_zeros(n + 1, groups).index_add(0, owner, values) / pixels)[owner][:, :, None]

    centred = wide - mean(wide.mean(2))
    out = centred * (mean(centred.square().mean(2)) + norm.eps).rsqrt()
    out = apply_epilogue(out.flatten(1).to(rows.dtype), "", norm.weight, norm.bias, None, None)
    return out if plan.count is None else torch.where(live[:, None], out, 0)
