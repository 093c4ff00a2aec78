"""Policies: the plan that each value of a stack has on rows, and the content outside of it.

A policy has:

- ``zero_outside``: whether a value is zero where it has no row. Else nothing reads it there.
- ``plan(value, shape, device, geometry)``: the plan of a value of ``shape = (N, H, W)``, which a layer of this geometry
  makes (None: one that keeps the size).
- ``shared(value, inputs)``: the plan of a value that is made of others pixel by pixel; None where these are dense.
- ``output``: the plan of the stack's output, where the caller gave it, and ``base``: the output outside of it; None
  for zero.

A policy that keeps values between calls would answer with the plan of what changed, and with the kept map as ``base``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..plans import PixelPlan
from .layers.base import Rows

if TYPE_CHECKING:
    from .graph import Stack


class Masked:
    """A value exists at the active mask of its own resolution and is zero elsewhere, after every layer.

    The input, and what layers that were not converted make, is dense and may be anything outside the mask.
    """

    zero_outside = True
    output = base = None

    def __init__(self, active):
        self.active = active

    def plan(self, value: int, shape: tuple[int, int, int], device: torch.device, geometry=None) -> PixelPlan:
        return self.active.plan(shape, device) if geometry is None else self.active.after(geometry, device)

    def shared(self, value: int, inputs: list) -> PixelPlan | None:
        plan = None
        for x in inputs:
            if type(x) is Rows and (
                plan is None or (x.plan is not plan and x.plan.num_pixels > plan.num_pixels)
            ):
                plan = x.plan  # one pixel a sample meets each pixel of the others
        return plan


class Needed:
    """A value exists wherever a later layer reads it: the result is the dense one at the output's plan.

    Args:
        sizes: ``(H, W)`` of each value.
        plan: the output's.
        base: ``[N, O, H, W]``.
    """

    zero_outside = False

    def __init__(self, stack: Stack, sizes: dict, plan: PixelPlan, base: Tensor | None = None):
        self.plans, self.output, self.base = needed_plans(stack, sizes, plan), plan, base

    def plan(self, value: int, shape: tuple[int, int, int], device: torch.device, geometry=None) -> PixelPlan:
        return self.plans[value]

    def shared(self, value: int, inputs: list) -> PixelPlan:
        return self.plans[value]


def needed_plans(stack: Stack, sizes: dict, plan: PixelPlan) -> dict[int, PixelPlan]:
    """The plan of each value but the input: all that its readers read."""
    needs: dict[int, list[PixelPlan]] = {stack.output: [plan]}
    inside: dict[int, PixelPlan] = {}  # by the id of a plan: one that lies within it
    plans, batch = {stack.output: plan}, plan.shape[0]
    for layer in reversed(stack.layers):
        to = plans[layer.out] = _union(needs[layer.out], inside)
        for i, value in enumerate(layer.inputs):
            if value == 0:
                continue
            reads, geometry = to, layer.geometry((batch, *sizes[value])) if i == 0 else None
            if geometry is not None:
                reads = to.needed_by(geometry)
                if reads is not to and _reads_its_own_place(geometry):
                    inside[id(reads)] = to
            needs.setdefault(value, []).append(reads)
    return plans


def _reads_its_own_place(g: ConvGeometry) -> bool:
    """True where output pixel p reads input pixel p, maybe among others."""
    return (
        not g.transposed
        and g.stride_h == g.stride_w == 1
        and (g.in_h, g.in_w) == (g.out_h, g.out_w)
        and g.pad_h % g.dil_h == g.pad_w % g.dil_w == 0
        and g.pad_h // g.dil_h < g.kernel_h
        and g.pad_w // g.dil_w < g.kernel_w
    )


def _union(plans: list[PixelPlan], inside: dict[int, PixelPlan]) -> PixelPlan:
    """The plan that holds all of them: one of them, where it is known to."""
    for plan in plans:
        held, within = {id(plan)}, plan
        while (within := inside.get(id(within))) is not None:
            held.add(id(within))
        if all(id(other) in held for other in plans):
            return plan
    mask = plans[0].mask()
    for plan in plans[1:]:
        mask = mask | plan.mask()
    if plans[0].count is None:
        return PixelPlan.from_mask(mask)
    expected = [plan.expected for plan in plans]
    return PixelPlan.from_mask(mask, mask.numel(), None if None in expected else max(expected))
