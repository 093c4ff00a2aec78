"""Inputs: what changed in the tensors that a model is called with."""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor

from ...ops.pixels.rows import gather_rows
from ..maps.layout import NCHW
from . import masks
from .followed import Followed
from .recording import Recording
from .stored import Stored, positions
from .tape import ALL, Tape, Value


class Inputs(Recording):
    """The part of a :class:`~.frame.Frame` that begins a call."""

    fresh: bool  # everything is computed anew

    def __init__(self, tape: Tape, options):
        super().__init__(tape, options)
        self.misaligned: set[int] = set()  # values that do not move by whole pixels
        self._alive: list = []
        self._entered: list[Followed] = []  # the model's inputs

    def enter(self, number: int, x: Tensor, told: Tensor | None) -> Followed:
        """An input of the model as a followed tensor. Finds what changed in it.

        Args:
            told: bool ``[N, H, W]``: the caller knows what changed in it.
        """
        tape = self.tape
        if number == len(tape.inputs):
            is_map = x.dim() == 4 and x.is_floating_point()
            axes, size = (NCHW, (x.shape[0], *x.shape[2:])) if is_map else (None, None)
            tape.inputs.append(tape.new(None, 0, x, axes, size))
        value = tape.inputs[number]
        if self.fresh or value.stored is None:
            value.plan, value.decided = ALL, True
            self.keep(value, x, own=False)
        elif value.axes is None:
            if not torch.equal(value.stored, x):
                value.plan, value.stored = ALL, x.clone()
        else:
            self._compare(value, x, told)
        if value.plan is not None and value.axes is not None and self.options.spread != "exact":
            self._widen(value)
        self._entered.append(self.follow(value))
        return self._entered[-1]

    def _compare(self, value: Value, x: Tensor, told: Tensor | None) -> None:
        stored, threshold = value.stored, self.options.threshold_of("input", [value.stored.dense])
        if told is None:
            if torch.equal(stored.dense, x):
                return
            told = differs(stored.dense, x, threshold)
            if threshold > 0:
                stored.note_owed(stored.dense, x, told)
        value.plan = self.plan_of(told)
        if value.plan is ALL:
            self.keep(value, x, own=False)
        elif value.plan is not None:
            stored.rows.index_copy_(0, positions(value.plan), gather_rows(x, value.plan.index, None))

    def _widen(self, value: Value) -> None:
        mask = self.mask_of(value)
        if self.moved is None or self.moved.shape == mask.shape:
            self.moved = mask if self.moved is None else self.moved | mask
        else:
            self.moved = self.moved | masks.at_size(mask, self.moved.shape[1:])

    @functools.cached_property
    def everything(self) -> bool:
        """True where every input changed everywhere: what is made of them is taken to have changed."""
        maps = [value for value in self.tape.inputs if value.axes is not None]
        return bool(maps) and all(value.plan is ALL for value in maps)

    def idle(self) -> bool:
        """True where no input changed."""
        return self.shift is None and all(value.plan is None for value in self.tape.inputs)

    def rest(self) -> None:
        """Notes that no step computed anything."""
        self._entered.clear()
        for step in self.tape.steps:
            step.rows, step.seconds = 0, 0.0

    def align(self, shift: tuple[int, int] | None) -> None:
        """Moves what is kept by ``shift = (dx, dy)`` pixels of the input."""
        if shift is None or shift == (0, 0) or self.fresh:
            return
        self.shift = shift
        x = next((value for value in self.tape.inputs if value.axes is not None), None)
        for value in self.tape.values:
            if x is None or type(value.stored) is not Stored:
                continue
            by = [s * size for s, size in zip(shift, (value.size[2], value.size[1]), strict=True)]
            of = x.size[2], x.size[1]
            if any(b % o for b, o in zip(by, of, strict=True)):
                self.misaligned.add(value.number)
            elif value.size[1:] != (1, 1):
                value.stored.moved_by(by[0] // of[0], by[1] // of[1])

    def write_back(self, tensors: list[Tensor]) -> None:
        """Gives the caller's tensors what the model wrote into them."""
        for x, entered in zip(tensors, self._entered, strict=True):
            if entered.plain is not None or entered.value.step is not None:
                self.tape.pure = False
                now = entered.plain if entered.plain is not None else self.whole(entered.value)
                if not torch.equal(now, x):
                    with torch.inference_mode(x.is_inference()):
                        x.copy_(now)
        self._entered.clear()

    def follow(self, value: Value) -> Followed:
        made = Followed(self, value)
        value.alive += 1
        self._alive.append(weakref.ref(made))
        if len(self._alive) > 4096:
            self._alive = [r for r in self._alive if r() is not None]
        return made

    def _living(self):
        return [x for r in self._alive if (x := r()) is not None and x.plain is None]


def differs(kept: Tensor, x: Tensor, threshold: float) -> Tensor:
    """bool ``[N, H, W]``: where maps ``[N, C, H, W]`` differ by more than a threshold. NaN differs from everything."""
    if threshold > 0:
        return ~((kept - x).abs_() <= threshold).all(1)
    return (kept != x).any(1)
