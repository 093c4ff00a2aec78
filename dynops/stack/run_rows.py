"""Runs a stack on packed rows: the executor of every policy (:mod:`dynops.stack.policy`).

A value is a dense tensor or :class:`Rows`. All that can be decided without values was decided when the stack was made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends, modes
from ..kernels.cpu import engine
from ..modes import autocast_dtype
from ..ops import checks
from ..ops.pixels.rows import gather_rows, in_format_of, scatter_pixels
from ..plans import PixelPlan
from .graph import Stack
from .layers.base import Rows
from .layers.pool import sample_of, spread_over
from .layers.resample import Padded, picked, rows_at
from .maps import SparseMap, bare, normed
from .maps.layout import NCHW, NCS
from .masked_output import under_mask
from .sequences import Sequence


def run_rows(stack: Stack, inputs, policy, maps: bool = False, as_map: bool = False):
    """The stack's output, as the policy has it: a dense tensor, in the format of the first input ``[N, C, H, W]``.

    Args:
        inputs: a tensor for each input of the stack.
        maps: calls that no layer knows run on maps (:mod:`dynops.stack.maps`).
        as_map: the output is a map too.
    """
    run = Run(stack, inputs, policy, maps, as_map)
    parts = stack.parts(tuple([run.kind(v) for v in range(len(inputs))])) if run.direct else stack.layers
    for part in parts:
        run.part(part)
    if as_map:
        return run.map(stack.output)
    out = run.result()
    return in_format_of(out, inputs[0]) if isinstance(out, Tensor) and out.dim() == 4 else out


class Run:
    """The values of one run of a stack."""

    def __init__(self, stack: Stack, inputs, policy, maps: bool = False, as_map: bool = False):
        x = inputs[0]
        self.stack, self.policy, self.autocast = stack, policy, autocast_dtype(x)
        self.maps, self.as_map = maps, as_map
        self.env: list = [None] * stack.values
        self._x, self._inputs = x, inputs
        self.env[: len(inputs)] = inputs
        self.ended: PixelPlan | None = None  # the output's plan, where a layer wrote the dense map itself
        self.recorded: set[int] = set()  # dense values that a recorded call made, with its strides
        self._originals: dict[int, Tensor] = {}  # of values that were put in another format
        self._gathered: dict[int, Tensor] = {}  # rows of the input, by the id of their plan
        # kernels may be called by themselves
        self.direct = not torch.is_grad_enabled() and self.autocast is None and _is_direct(x)
        self._derived: dict[tuple, Tensor | None] = {}  # of plans, which do not change in a run

    def part(self, part) -> None:
        """Runs a layer or a sequence."""
        if type(part) is not Sequence:
            self.layer(part)
        elif part.run(self):
            self.free(part.layers)
        else:
            for layer in part.layers:
                self.layer(layer)

    def layer(self, layer) -> None:
        """Runs one layer."""
        self.env[layer.out] = layer.rows(self)
        for value in layer.free:
            self.env[value] = None

    def free(self, layers) -> None:
        """Forgets the values that nobody reads after these layers."""
        for layer in layers:
            for value in layer.free:
                self.env[value] = None

    # -------------------------------------------------------------------------------------- inputs

    def kind(self, value: int) -> str:
        """ "rows" of a map, a "map" that is dense, or a "vector": any other tensor."""
        found = self.found(value)
        if type(found) is Rows:
            return "rows"
        is_map = isinstance(found, Tensor) and found.dim() == 4 and found.shape[2:] != (1, 1)
        return "map" if value == 0 or is_map else "vector"

    def found(self, value: int):
        """A value: rows, a dense tensor, or a map of other axes. A map that waits is computed."""
        found = self.env[value]
        if type(found) is Padded:
            found = self.env[value] = found.rows()
        if type(found) is SparseMap and found.axes == NCHW and found.margins is None:
            if found.is_input:  # it stays one
                return found.dense()
            found = self.env[value] = Rows(found.rows(), found.plan)
        return found

    def waiting(self, value: int) -> SparseMap | None:
        """A value that is a convolution which was not computed yet: what follows may be computed with it."""
        found = self.env[value]
        return found if type(found) is SparseMap and found.convolution() is not None else None

    def bare(self, *arguments) -> SparseMap:
        """A convolution that waits; see :func:`maps.convolution.bare`."""
        return bare(*arguments, self.policy.active)

    def pixels_in_one_axis(self, value: int) -> SparseMap | None:
        """A value that is a map ``[N, C, H * W]``."""
        found = self.found(value)
        return found if type(found) is SparseMap and found.axes == NCS else None

    def normed(self, norm: nn.Module, x: SparseMap) -> SparseMap:
        """A norm of a map; of a convolution that waits it is computed with it."""
        return normed(norm, x)

    def rows_of(self, value: int) -> Rows | None:
        """A value that exists as rows, or None."""
        found = self.found(value)
        return found if type(found) is Rows else None

    def dense(self, value: int):
        """A value as a dense tensor."""
        found = self.found(value)
        if type(found) is SparseMap:
            return found.dense()
        return scatter_pixels(found.values, found.plan) if type(found) is Rows else found

    def map(self, value: int):
        """A value as the functions of maps take it."""
        found = self.env[value]
        found = self.found(value) if type(found) is Padded else found
        if type(found) is Rows:
            return SparseMap.of_rows(found.values, found.plan, self.policy.active)
        if value == 0 and type(found) is not SparseMap and isinstance(found, Tensor) and found.dim() == 4:
            return SparseMap.of_input(found, self.policy.active)
        return found

    def read_whole(self, value: int) -> SparseMap | None:
        """A dense map as an input, whose pixels outside of the mask are read too; None for rows."""
        found = self.found(value)
        if type(found) is Rows or found.dim() != 4:
            return None
        return found if type(found) is SparseMap else SparseMap.of_input(found, self.policy.active)

    def is_bordered(self, value: int) -> bool:
        """True for an input that the model padded: functions of maps know where its mask lies."""
        found = self.env[value]
        return type(found) is SparseMap and found.margins is not None

    def as_called(self, value: int):
        """As :meth:`dense`, in the memory format that the value has where each layer runs alone."""
        found = self._originals[value] if value in self._originals else self.dense(value)
        layers_own = value >= len(self._inputs) and value not in self.recorded
        if layers_own and isinstance(found, Tensor) and found.dim() == self._x.dim() == 4:
            return in_format_of(found, self._x)
        return found

    def as_returned(self, value: int):
        """A value as one of several outputs: the input is itself."""
        if value >= len(self._inputs):
            return self.map(value) if self.as_map else self.as_called(value)
        given = self._inputs[value]
        return given.dense() if type(given) is SparseMap and not self.as_map else given

    def shape(self, value: int) -> tuple[int, int, int]:
        """``(N, H, W)`` of a value."""
        found = self.found(value)
        return found.plan.shape if type(found) is Rows else (found.shape[0], found.shape[2], found.shape[3])

    def device(self, value: int) -> torch.device:
        found = self.found(value)
        return found.plan.device if type(found) is Rows else found.device

    def read_at(self, value: int, index: Tensor) -> Tensor:
        """The rows of a value at flat positions, int64 ``[P]``; zero at -1 and where it does not exist."""
        found = self.found(value)
        if type(found) is Rows:
            return rows_at(found, index)
        return picked(found.permute(0, 2, 3, 1).flatten(0, 2), index)

    def at(self, value: int, plan: PixelPlan) -> Tensor | None:
        """The rows of a value at a plan, or None where it has another size. One row for all of ``[N, C, 1, 1]``, N = 1."""
        found = self.found(value)
        if type(found) is Rows:
            if found.plan is plan:
                return found.values
            return _spread_rows(found, plan) if found.plan.shape[1:] == (1, 1) else _within(found, plan)
        if not isinstance(found, Tensor) or found.dim() != 4:
            return None
        if self.shape(value) != plan.shape:
            return _spread(found, plan)
        if value != 0:
            return gather_rows(found, plan.index, plan.count)
        rows = self._gathered.get(id(plan))
        if rows is None:
            rows = self._gathered[id(plan)] = gather_rows(found, plan.index, plan.count)
        return rows

    def added(self, value: int, plan: PixelPlan, channels: int) -> Tensor | None:
        """As :meth:`at`, or a dense map of the plan's size itself, which a convolution reads where it lies."""
        found = self.found(value)
        n, h, w = plan.shape
        if type(found) is not Rows and isinstance(found, Tensor) and found.shape == (n, channels, h, w):
            return self.dense(value)
        return self.at(value, plan)

    def together(self, layer) -> tuple[PixelPlan | None, list]:
        """The inputs of a layer that works pixel by pixel: rows of one plan; or None and dense tensors."""
        plan = self.shared_plan(layer)
        if plan is not None:
            values = [self.at(v, plan) for v in layer.inputs]
            if all(v is not None for v in values):
                return plan, values
        return None, [self.dense(v) for v in layer.inputs]

    def share_rows(self, values) -> bool:
        """True for values that are all rows of one plan, or rows of one pixel a sample beside these."""
        plan = None
        for value in values:
            found = self.found(value)
            if type(found) is not Rows:
                return False
            if found.plan is plan or (found.plan.shape[1:] == (1, 1) and len(values) > 1):
                continue
            if plan is not None:
                return False
            plan = found.plan
        return True

    def masked_as(self, layer, out):
        """What a call made of dense tensors, as rows where it is a map of the size of an input that is one."""
        if self.policy.zero_outside and isinstance(out, Tensor) and out.dim() == 4:
            for value in layer.inputs:
                rows = self.rows_of(value)
                if rows is not None and rows.plan.shape == (out.shape[0], *out.shape[2:]):
                    return Rows(gather_rows(out, rows.plan.index, rows.plan.count), rows.plan)
        return out

    def inverse(self, plan: PixelPlan) -> Tensor:
        """The row at each pixel of a plan, or -1."""
        found = self._derived.get((id(plan), "inverse"))
        return self._keep(plan, "inverse", plan.inverse()) if found is None else found

    def quads(self, plan: PixelPlan, geometry) -> Tensor | None:
        """Winograd's tiles of a plan, or None."""
        key = id(plan), "quads"
        if key not in self._derived:
            self._keep(plan, "quads", engine.quads_of(plan.index, plan.count, geometry, plan.derived))
        return self._derived[key]

    def _keep(self, plan: PixelPlan, name: str, made):
        self._derived[id(plan), name] = made
        self._derived[id(plan), "plan"] = plan  # so that its id stays its own
        return made

    # ------------------------------------------------------------------------------------- outputs

    def shared_plan(self, layer) -> PixelPlan | None:
        """The plan of a layer's output, which is made pixel by pixel. None: its inputs are dense, and so is the output."""
        return self.policy.shared(layer.out, [self.found(v) for v in layer.inputs])

    def plan_like(self, value: int, out: int) -> PixelPlan:
        """The plan of a value ``out`` that has the size of another."""
        return self.policy.plan(out, self.shape(value), self.device(value))

    def masked(self, layer: nn.Module, value: int) -> Rows:
        """The rows of what a converted layer makes of a dense map."""
        out, plan = under_mask(layer, self.dense(value), self.policy.active)
        return Rows(gather_rows(out, plan.index, plan.count), plan)

    def put(self, value: int, copy: Tensor) -> Tensor:
        """Takes a copy of a dense map, in another format, in its place."""
        found = self.found(value)
        if copy is not found and isinstance(found, Tensor):
            self._originals.setdefault(value, found)
        if type(self.env[value]) is SparseMap and self.env[value].is_input:
            self.env[value] = SparseMap.of_input(copy, self.policy.active)
        else:
            self.env[value] = copy
        return copy

    def ends_with(self, layer) -> bool:
        """True for the layer that makes the output: it may write the dense map itself."""
        return layer is self.stack.layers[-1] and layer.out == self.stack.output and not self.as_map

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


def _is_direct(x) -> bool:
    return (
        x.device.type == "cpu"
        and modes.route(None) == modes.DIRECT
        and backends.choose(None, x.device, x.dtype) == "cpp"
    )


def checked_base(base: Tensor, x: Tensor, plan, channels: int, dtype: torch.dtype) -> Tensor:
    """``base`` in the output's dtype, which is not that of ``x`` under autocast."""
    checks.dense_map(base, plan, "base", channels, None if dtype != x.dtype else x.dtype)
    return base.to(dtype)


def _spread(x, plan: PixelPlan) -> Tensor | None:
    """A tensor ``[N, C, 1, 1]`` (or N = 1) as rows: that of its sample at each pixel."""
    n = plan.shape[0]
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2:] != (1, 1) or x.shape[0] not in (1, n):
        return None
    return spread_over(x.flatten(1).expand(n, -1), plan)


def _spread_rows(rows: Rows, plan: PixelPlan) -> Tensor | None:
    """As :func:`_spread`, of rows of one pixel a sample: each pixel of the plan lies in a sample that has one."""
    if plan.count is not None:  # of whose sizes nothing may be asked
        return _spread(scatter_pixels(rows.values, rows.plan), plan)
    n = plan.shape[0]
    if rows.plan.shape[0] != n:
        return None
    if n == 1:
        return rows.values.expand(len(plan), -1)
    if len(rows.plan) == n and rows.plan.count is None:
        return spread_over(rows.values, plan)
    return rows.values[rows.plan.inverse().reshape(-1)[sample_of(plan)].clamp(min=0).long()]


def _within(rows: Rows, plan: PixelPlan) -> Tensor | None:
    """The rows at a plan that lies within their own; None for a plan of another size."""
    if rows.plan.shape != plan.shape:
        return None
    index = rows.plan.inverse().reshape(-1)[plan.index.clamp(min=0).long()]
    if plan.count is not None:
        index = torch.where(plan.index < 0, -1, index)
    return gather_rows(rows.values.t()[None, :, None], index, plan.count)
