"""Rules of functions that see all of a map: norms over pixels, and attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plans import PixelPlan
from ..layers.pool import spread_over
from ..maps.layout import gathered
from . import arguments
from .rules import Context, Rule
from .stored import positions
from .tape import ALL


class Statistics(Rule):
    """A group or instance norm. With kept statistics it works pixel by pixel; else a change moves all of a sample."""

    compares = False

    def __init__(self, groups: int, kept: bool):
        self.groups, self.kept = groups, kept
        self.scale = self.shift = None  # [N, C]

    def fits(self) -> bool:
        """True where it is a scale and a shift of each channel, for all samples."""
        return self.kept and self.scale is not None and self.scale.shape[0] == 1

    def affine(self, step) -> tuple[Tensor, Tensor] | None:
        return (self.scale[0], self.shift[0]) if self.fits() else None

    def reads_own_place(self, step, i: int) -> bool:
        return self.kept

    def spread(self, frame, step):
        x = step.inputs[0]
        if any(v.plan is not None for v in step.inputs[1:]) or frame.constants_moved or x.plan is ALL:
            return ALL
        return x.plan if self.kept else frame.of_samples(x.plan, x.size)

    def dense(self, frame, step) -> list:
        x = frame.whole(step.inputs[0])
        if not self.kept:
            return super().dense(frame, step)
        if (
            step.outs and step.outs[0].plan is not ALL and self.scale is not None
        ):  # asked for by what needs all of it
            shape = (*self.scale.shape, *(1,) * (x.dim() - 2))
            return [torch.addcmul(self.shift.view(shape), x, self.scale.view(shape)).to(x.dtype)]
        given = arguments.of_step(step)
        n, c = x.shape[:2]
        x = (
            x
            if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
            else x.contiguous()
        )
        weight, bias = arguments.tensors(step, given, "weight", "bias")
        if frame.autocasts(x):
            x = x.float()
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, c, math.prod(x.shape[2:]), self.groups, given["eps"]
        )
        scale = rstd.repeat_interleave(c // self.groups, 1)
        shift = -mean.repeat_interleave(c // self.groups, 1) * scale
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        self.scale, self.shift = scale, shift if bias is None else shift + bias
        return [out]

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x = step.inputs[0]
        if not self.kept:
            return [gathered(self.dense(frame, step)[0], plan, x.axes)]
        context = Context(plan)
        found = frame.map_at(x, plan, context)
        if plan.shape[0] == 1 and frame.autocasts(found) is False:
            scale, shift = self.scale[0], self.shift[0]
            waits = found.convolution()
            if waits is not None and waits.takes("norm"):
                return [waits.grown(found, scale=scale, shift=shift)]
            rows = found.rows()
            return [torch.addcmul(shift.to(rows.dtype), rows, scale.to(rows.dtype))]
        rows = found.rows()
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        made = torch.addcmul(spread_over(self.shift, plan), wide, spread_over(self.scale, plan))
        return [made.to(step.outs[0].dtype)]


class Attention(Rule):
    """``scaled_dot_product_attention`` without a mask. A query that changed reads all keys and values.

    A key that changed moves every query of its sample. With kept keys it moves none but those that changed too.
    """

    compares = False

    def __init__(self, kept: bool):
        self.kept = kept

    def reads_own_place(self, step, i: int) -> bool:
        return i == 0

    def spread(self, frame, step):
        q, k, v = step.inputs[:3]
        others = [x for x in (k, v) if x.plan is not None]
        if q.plan is ALL or any(x.plan is ALL or x.size != q.size for x in others) or frame.constants_moved:
            return ALL
        if others and not self.kept:
            plans = [x.plan for x in (q, *others) if x.plan is not None]
            return frame.of_samples(frame.union(plans), q.size)
        return q.plan if not others else frame.union([x.plan for x in (q, *others) if x.plan is not None])

    def rows(self, frame, step, plan: PixelPlan) -> list:
        q, k, v = (step.inputs[i] for i in range(3))
        rows = frame.map_at(q, plan, Context(plan)).rows()  # [P, heads, d]
        keys, values = frame.whole(k), frame.whole(v)
        scale = step.scale
        n = plan.shape[0]
        sizes = (
            [len(plan)]
            if n == 1
            else torch.bincount(positions(plan) // math.prod(plan.shape[1:]), minlength=n).tolist()
        )
        made = []
        for i, part in enumerate(rows.split(sizes)):
            heads = part.transpose(0, 1)[None]  # [1, heads, P, d]
            out = F.scaled_dot_product_attention(heads, keys[i : i + 1], values[i : i + 1], scale=scale)
            made.append(out[0].transpose(0, 1))
        return [made[0] if n == 1 else torch.cat(made)]

    def macs(self, step) -> float:
        q, k, v = step.inputs[:3]
        return q.shape[1] * k.shape[2] * (q.shape[3] + v.shape[3])
