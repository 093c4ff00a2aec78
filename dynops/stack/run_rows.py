"""Runs a stack on packed rows: the executor of every policy (:mod:`dynops.stack.policy`).

A value is a dense tensor or :class:`Rows`. All that can be decided without values was decided when the stack was made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modes import autocast_dtype
from ..ops import checks
from ..ops.pixels.rows import gather_rows, in_format_of, scatter_pixels
from ..plans import PixelPlan
from .graph import Stack
from .layers.base import Rows
from .masked_output import under_mask


def run_rows(stack: Stack, x: Tensor, policy) -> Tensor:
    """The stack's output for ``x`` ``[N, C, H, W]``, as the policy has it: a dense tensor, in the format of ``x``."""
    run = Run(stack, x, policy)
    env = run.env
    for layer in stack.layers:
        env[layer.out] = layer.rows(run)
        for value in layer.free:
            env[value] = None
    out = run.result()
    if not isinstance(out, Tensor) or out.dim() != 4:
        return out
    return run.noted(in_format_of(out, x))


class Run:
    """The values of one run of a stack."""

    def __init__(self, stack: Stack, x: Tensor, policy):
        self.stack, self.policy, self.autocast = stack, policy, autocast_dtype(x)
        self.env: list = [None] * stack.values
        self.env[0] = self._x = x
        self.ended: PixelPlan | None = None  # the output's plan, where a layer wrote the dense map itself
        self.recorded: set[int] = set()  # dense values that a recorded call made, with its strides
        self._originals: dict[int, Tensor] = {}  # of values that were put in another format
        self._gathered: dict[int, Tensor] = {}  # rows of the input, by the id of their plan

    # -------------------------------------------------------------------------------------- inputs

    def rows_of(self, value: int) -> Rows | None:
        """A value that exists as rows, or None."""
        found = self.env[value]
        return found if type(found) is Rows else None

    def dense(self, value: int):
        """A value as a dense tensor."""
        found = self.env[value]
        return scatter_pixels(found.values, found.plan) if type(found) is Rows else found

    def as_called(self, value: int):
        """As :meth:`dense`, in the memory format that the value has where each layer runs alone."""
        found = self._originals[value] if value in self._originals else self.dense(value)
        layers_own = value != 0 and value not in self.recorded
        if layers_own and isinstance(found, Tensor) and found.dim() == self._x.dim() == 4:
            return in_format_of(found, self._x)
        return found

    def shape(self, value: int) -> tuple[int, int, int]:
        """``(N, H, W)`` of a value."""
        found = self.env[value]
        return found.plan.shape if type(found) is Rows else (found.shape[0], found.shape[2], found.shape[3])

    def device(self, value: int) -> torch.device:
        found = self.env[value]
        return found.plan.device if type(found) is Rows else found.device

    def read_at(self, value: int, index: Tensor) -> Tensor:
        """The rows of a value at flat positions, int64 ``[P]``; zero at -1 and where it does not exist."""
        found = self.env[value]
        if type(found) is Rows:
            rows, at = found.values, found.plan.inverse().reshape(-1)[index.clamp(min=0)].long()
            at = torch.where(index < 0, -1, at)
        else:
            rows, at = found.permute(0, 2, 3, 1).flatten(0, 2), index
        if rows.shape[0] == 0:
            return F.pad(rows, (0, 0, 0, index.shape[0]))  # zeros that keep the gradient's way
        return torch.where((at >= 0)[:, None], rows[at.clamp(min=0)], 0)

    def at(self, value: int, plan: PixelPlan, channels: int | None = None) -> Tensor | None:
        """The rows of a value at a plan, or None where it has another size.

        Args:
            channels: those that a dense map must have to be added so by a policy that masks. It must be known
                to be zero outside of the plan too.
        """
        found = self.env[value]
        if type(found) is Rows:
            return found.values if found.plan is plan else _within(found, plan)
        if not isinstance(found, Tensor) or found.dim() != 4 or self.shape(value) != plan.shape:
            return None
        added = channels is not None and self.policy.zero_outside
        if added and (found.shape[1] != channels or not self.policy.reads(found, plan)):
            return None
        if value != 0:
            return gather_rows(found, plan.index, plan.count)
        rows = self._gathered.get(id(plan))
        if rows is None:
            rows = self._gathered[id(plan)] = gather_rows(found, plan.index, plan.count)
        return rows

    def added(self, value: int, plan: PixelPlan, channels: int) -> Tensor | None:
        """As :meth:`at`, or a dense map of the plan's size itself, which a convolution reads where it lies."""
        found = self.env[value]
        n, h, w = plan.shape
        if type(found) is not Rows and isinstance(found, Tensor) and found.shape == (n, channels, h, w):
            return found if self.policy.reads(found, plan) else None
        return self.at(value, plan, channels)

    def together(self, layer, joins: str) -> tuple[PixelPlan | None, list]:
        """The inputs of a layer that works pixel by pixel: rows of one plan; or None and dense tensors.

        Args:
            joins: the dense maps that a policy that masks reads at the mask of the others: "rows", none; "same", those
                of the same shape; "any", those of the same size, and ``[N, C, 1, 1]``.
        """
        plan = self.shared_plan(layer)
        if plan is not None:
            rows = [self.env[v] for v in layer.inputs if type(self.env[v]) is Rows]
            channels = rows[0].values.shape[1] if rows and joins != "any" else None
            if joins != "rows" or not self.policy.zero_outside or len(rows) == len(layer.inputs):
                values = [self.at(v, plan, channels) for v in layer.inputs]
                if joins == "any":
                    values = [
                        _spread(self.env[v], plan) if r is None else r
                        for v, r in zip(layer.inputs, values, strict=True)
                    ]
                if all(v is not None for v in values):
                    return plan, values
        return None, [self.dense(v) for v in layer.inputs]

    # ------------------------------------------------------------------------------------- outputs

    def shared_plan(self, layer) -> PixelPlan | None:
        """The plan of a layer's output, which is made pixel by pixel. None: its inputs are dense, and so is the output."""
        return self.policy.shared(layer.out, [self.env[v] for v in layer.inputs])

    def plan_like(self, value: int, out: int) -> PixelPlan:
        """The plan of a value ``out`` that has the size of another."""
        return self.policy.plan(out, self.shape(value), self.device(value))

    def masked(self, layer: nn.Module, value: int) -> Rows:
        """The rows of what a converted layer makes of a dense map."""
        out, plan = under_mask(layer, self.dense(value), self.policy.active)
        return Rows(gather_rows(out, plan.index, plan.count), plan)

    def put(self, value: int, copy: Tensor) -> Tensor:
        """Takes a copy of a dense map, in another format, in its place."""
        found = self.env[value]
        if copy is not found and isinstance(found, Tensor):
            self._originals.setdefault(value, found)
            if self.policy.zero_outside:
                self.policy.active.note_like(copy, found)
        self.env[value] = copy
        return copy

    def ends_with(self, layer) -> bool:
        """True for the layer that makes the output: it may write the dense map itself."""
        return layer is self.stack.layers[-1] and layer.out == self.stack.output

    def base(self, channels: int, dtype: torch.dtype) -> Tensor | None:
        """The output outside of its plan, ``[N, O, H, W]`` in its dtype; None for zero."""
        base = self.policy.base
        return None if base is None else checked_base(base, self._x, self.policy.output, channels, dtype)

    def result(self):
        """The output as a dense tensor."""
        output, plan = self.stack.output, self.policy.output
        if plan is None or self.ended is plan:
            return self.dense(output)
        rows = self.at(output, plan)
        return scatter_pixels(rows, plan, self.base(rows.shape[1], rows.dtype))

    def noted(self, out: Tensor) -> Tensor:
        """The output, after a note of where it is zero, for the next stack that gets it."""
        found = self.env[self.stack.output]
        plan = found.plan if type(found) is Rows else self.ended
        if plan is not None and self.policy.zero_outside:
            self.policy.active.note(out, plan)
        return out


def checked_base(base: Tensor, x: Tensor, plan, channels: int, dtype: torch.dtype) -> Tensor:
    """``base`` in the output's dtype, which is not that of ``x`` under autocast."""
    checks.dense_map(base, plan, "base", channels, None if dtype != x.dtype else x.dtype)
    return base.to(dtype)


def _spread(x, plan: PixelPlan) -> Tensor | None:
    """A tensor ``[N, C, 1, 1]`` (or N = 1) as rows: that of its sample at each pixel."""
    n, h, w = plan.shape
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2:] != (1, 1) or x.shape[0] not in (1, n):
        return None
    return x.flatten(1).expand(n, -1)[plan.index.long().clamp(min=0) // (h * w)]


def _within(rows: Rows, plan: PixelPlan) -> Tensor | None:
    """The rows at a plan that lies within their own; None for a plan of another size."""
    if rows.plan.shape != plan.shape:
        return None
    index = rows.plan.inverse().reshape(-1)[plan.index.clamp(min=0).long()]
    if plan.count is not None:
        index = torch.where(plan.index < 0, -1, index)
    return gather_rows(rows.values.t()[None, :, None], index, plan.count)
