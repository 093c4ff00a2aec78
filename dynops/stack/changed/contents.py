"""Contents: what values hold in a call, whole or at a plan. What is not kept is computed when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ...plans import PixelPlan
from ..maps import SparseMap
from ..maps.layout import gathered
from .changes import Changes
from .fused import Fused, fused_of
from .rules import Context
from .stored import Stored
from .tape import Step, Tape, Value, filled


class Contents(Changes):
    """The part of a :class:`~.frame.Frame` that reads and keeps values."""

    def __init__(self, tape: Tape, options):
        super().__init__(options)
        self.tape = tape
        self._rows: dict[tuple, Tensor] = {}  # of values with several readers, by number and id of the plan

    def called(self, step: Step, value_of: Callable):
        """The function of a step, with ``value_of(value)`` for each of its values."""
        values = self.tape.values
        name, args, kwargs = step.key
        args = filled(args, lambda n: value_of(values[n]), step.plains)
        kwargs = filled(kwargs, lambda n: value_of(values[n]), step.plains)
        func = (
            torch.Tensor.reshape
            if name == "view" and not any(isinstance(a, torch.dtype) for a in args)
            else step.func
        )
        with _in_modes(step.modes):
            return func(*args, **kwargs)

    def keep(self, value: Value, x: Tensor, own: bool) -> None:
        """Keeps the content of a value."""
        value.dense = None
        if value.axes is None:
            value.stored = x if own else x.clone()
        else:
            value.stored = Stored(x, value.axes, value.size, own)

    def whole(self, value: Value) -> Tensor:
        """The content of a value; it must not be written into."""
        if value.dense is not None:
            return value.dense
        if value.stored is not None:
            return value.stored.dense if type(value.stored) is Stored else value.stored
        step = value.step
        made = [x for x in step.rule.dense(self, step) if isinstance(x, Tensor)]
        if value.alive > 0:
            value.dense = made[value.place]
        return made[value.place]

    def for_step(self, step: Step) -> Callable:
        """Maps a value to its content as a step takes it: what works in place has a copy where the value is kept."""

        def taken(value: Value) -> Tensor:
            if value is not step.target:
                return self.whole(value)
            mine = value.stored is None and value.alive <= 1
            return self.whole(value) if mine else self.whole(value).clone()

        return taken

    def whole_or_none(self, value: Value) -> Tensor | None:
        """As :meth:`whole`, of a value that need not be computed for it."""
        if value.dense is None and value.stored is None:
            return None
        return self.whole(value)

    def whole_rows(self, value: Value) -> Tensor:
        """The rows ``[N * H * W, C]`` of a map ``[N, C, H, W]``."""
        if type(value.stored) is Stored and value.dense is None:
            return value.stored.rows
        return self.whole(value).permute(0, 2, 3, 1).flatten(0, 2)

    def whole_map(self, value: Value, context) -> SparseMap:
        """A map ``[N, C, H, W]`` whose rows are all pixels."""
        made = SparseMap.of_rows(self.whole_rows(value), self.full(value.size), context)
        made._dense = self.whole(value)
        return made

    def map_at(self, value: Value, plan: PixelPlan, context) -> SparseMap:
        """The rows of a value at a plan, computed where it is not kept."""
        if value.dense is None and value.stored is None:
            key = value.number, id(plan)
            found = self._rows.get(key)
            if found is not None:
                return SparseMap.of_rows(found, plan, context, value.axes)
            step = value.step
            made = [x for x in step.rule.rows(self, step, plan) if isinstance(x, Tensor)]
            x = made[value.place]
            if type(x) is not SparseMap:
                x = SparseMap.of_rows(x, plan, context, value.axes)
            x.active = context
            if len(value.readers) > 1:
                self._rows[key] = x.rows()
                self._plans[id(plan)] = plan  # so that its id stays its own
            return x
        if value.dense is None:
            rows = value.stored.at(plan)
        else:
            rows = gathered(value.dense, plan, value.axes)
        return SparseMap.of_rows(rows, plan, context, value.axes)

    def content(self, value: Value) -> Tensor:
        """A copy of a value."""
        return self.whole(value).clone()

    def autocasts(self, x) -> bool:
        device = x.device.type
        return torch.is_autocast_enabled(device) and x.dtype != torch.float64

    def _fused(self, step: Step) -> Fused | None:
        """The convolution that a step ends, where one kernel makes it with all between; found once."""
        if step.fused == "":
            step.fused = None if self.options.is_cuda else fused_of(step)
        return step.fused

    def rows_at(self, value: Value, plan: PixelPlan) -> Tensor:
        """The rows ``[P, C]`` of a value at a plan."""
        if value.dense is None and value.stored is None and len(value.readers) == 1:
            fused = self._fused(value.step)
            if fused is not None and (rows := fused.rows(self, plan)) is not None:
                return rows
        return self.map_at(value, plan, Context(plan)).rows()


def modes_now() -> tuple:
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    )


@contextlib.contextmanager
def _in_modes(modes: tuple):
    """Inside it autocast is as it was where the step was recorded."""
    if modes == modes_now():
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype in modes:
            stack.enter_context(torch.autocast(kind, dtype, enabled))
        yield
