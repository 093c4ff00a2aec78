"""Changes: where values changed in a call."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...plans import PixelPlan
from . import masks
from .tape import ALL, Step, Tape, Value


class Changes:
    """The part of a :class:`~.frame.Frame` that knows plans. A plan is made once in a call, and found by what it is made of.

    Attributes:
        moved: for a spread that is given: bool ``[N, H, W]`` of the input.
        shift: ``(dx, dy)`` by which the image has moved since the last call, or None.
        constants_moved: whether a tensor among the arguments of the step that runs differs, which is no value.
    """

    tape: Tape

    def __init__(self, options):
        self.options = options
        self.moved: Tensor | None = None
        self.shift: tuple[int, int] | None = None
        self.constants_moved = False
        self._plans: dict = {}

    def full(self, size: tuple[int, int, int]) -> PixelPlan:
        return _full(size, self.options.device)

    def plan_of(self, mask: Tensor):
        """None for a mask without pixels, ``ALL`` for a full one, else its plan."""
        return self._checked(PixelPlan.from_mask(mask))

    def _checked(self, plan: PixelPlan):
        if len(plan) == 0:
            return None
        return ALL if len(plan) == math.prod(plan.shape) else plan

    def mask_of(self, value: Value) -> Tensor:
        """bool ``[N, H, W]``: where a value changed."""
        if value.plan is None:
            return torch.zeros(value.size, dtype=torch.bool, device=value.device)
        if value.plan is ALL:
            return torch.ones(value.size, dtype=torch.bool, device=value.device)
        return value.plan.mask()

    def region(self, size: tuple[int, int, int]):
        """What changes in maps of a size, where the spread is given."""
        key = "region", size
        if key not in self._plans:
            if self.moved is None:
                self._plans[key] = ALL
            else:
                mask = masks.at_size(self.moved, size[1:])
                mask = masks.dilated(mask, self.options.spread)
                self._plans[key] = self.plan_of(mask) if mask.shape[0] == size[0] else ALL
        return self._plans[key]

    def union(self, plans: list):
        """The plan that holds all of these."""
        first = plans[0]
        if ALL in plans or all(p is first for p in plans):
            return ALL if ALL in plans else first
        key = ("union", *(id(p) for p in plans))
        if key not in self._plans:
            largest = max(plans, key=len)
            mask = largest.mask()
            for other in plans:
                mask = mask if other is largest else mask | other.mask()
            made = self.plan_of(mask)
            same = made is not ALL and len(made) == len(largest)
            self._plans[key] = largest if same else made, plans
        return self._plans[key][0]

    def of_samples(self, plan, size: tuple[int, int, int]):
        """All pixels of the samples that a plan has a pixel of."""
        if plan is ALL or size[0] == 1:
            return ALL
        samples = plan.mask().flatten(1).any(1)
        return self.plan_of(samples[:, None, None].expand(size).contiguous())

    def together(self, step: Step, inputs: list):
        """What changes in a result that is made of these pixel by pixel."""
        if self.constants_moved:
            return ALL
        if step.widest is not None and all(v.plan is not ALL for v in inputs):
            plan = inputs[step.widest].plan
            if plan is not None:
                return plan
        plans = []
        for v in inputs:
            if v.plan is None:
                continue
            if v.plan is ALL or v.axes is None:
                return ALL
            if v.size == step.size:
                plans.append(v.plan)
            elif v.size == (step.size[0], 1, 1):
                plans.append(self.of_samples(v.plan, step.size))
            else:
                return ALL
        return self.union(plans)

    def through(self, x: Value, reads, size: tuple[int, int, int], geometry=None):
        """What changes in a result that reads a neighbourhood of ``x``."""
        if x.plan is ALL:
            return ALL
        if self.options.spread != "exact":
            return None if x.plan is None else self.region(size)
        if x.plan is None and self.shift is None:
            return None
        key = "through", id(x.plan), id(reads[0].at), id(reads[1].at), self.shift is None
        if key not in self._plans and geometry is not None and self.shift is None:
            made = x.plan.needed_by(masks.turned(geometry))
            self._plans[key] = self._checked(made), x.plan
        if key not in self._plans:
            mask = masks.spread(self.mask_of(x), reads)
            if self.shift is not None:
                mask = mask | masks.borders(reads)
            self._plans[key] = self.plan_of(mask), x.plan
        return self._plans[key][0]

    def in_blocks(self, plan: PixelPlan):
        block = self.options.block
        if block is None:
            return plan
        key = "blocks", id(plan)
        if key not in self._plans:
            self._plans[key] = self.plan_of(masks.in_blocks(plan.mask(), block)), plan
        return self._plans[key][0]


@functools.lru_cache(maxsize=64)
def _full(size: tuple[int, int, int], device: torch.device) -> PixelPlan:
    return PixelPlan.full(size, device)
