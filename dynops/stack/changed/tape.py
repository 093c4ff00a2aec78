"""Tape: the functions that a forward called, and the values between them, as the last calls had them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .stored import Stored

ALL = "everything"  # in the place of a plan


class Ref(NamedTuple):
    """A value among the arguments of a step."""

    value: int


class Plain(NamedTuple):
    """A tensor among the arguments of a step that is no value: a parameter, or one that the forward made of none."""

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Kind:
    """Where a value changes: the pixels that read one of those where another value does.

    Values of one kind change at the same pixels.
    """

    def __init__(self, of: Kind | None = None, reads=None):
        self.of, self.reads = of, reads

    def holds(self, other: Kind) -> bool:
        """True where a value of this kind changes at each pixel where one of the other does, as far as is known."""
        if self is other:
            return True
        if self.of is None:
            return False
        if self.of is other.of and other.reads is not None:
            return all(_is_among(b, a) for a, b in zip(self.reads, other.reads, strict=True))
        return all(axis.reads_itself for axis in self.reads) and self.of.holds(other)


def _is_among(some, all_of) -> bool:
    """True where each read of one axis is one of the other's."""
    if some.size != all_of.size or some.at.shape[1] != all_of.at.shape[1]:
        return False
    return bool(((some.at[:, None] == all_of.at[None]) | (some.at[:, None] < 0)).any(1).all())


GIVEN = Kind()  # of all values where the caller says how far a change spreads


def widest(kinds: list[Kind]) -> Kind | None:
    """One that holds all the others, or None."""
    return next((kind for kind in kinds if all(kind.holds(other) for other in kinds)), None)


class Value:
    """What a step made, or an input.

    Attributes:
        axes: where batch, height, width and channels stand (:mod:`dynops.stack.maps.layout`); None: it is no map.
        size: ``(N, H, W)`` of a map.
        kind: values of one kind change at the same pixels.
        stored: what is kept of it: None where it is computed again from the values before it.
        plan: where it changed in this call: None, a plan, or ``ALL``.
        dense: its content in this call, of one that is not stored.
        readers: of each step that reads it: whether it reads each pixel at its own place, and the kind of what it makes.
    """

    def __init__(self, number: int, step, place: int, x: Tensor, axes=None, size=None, kind=None):
        self.number, self.step, self.place = number, step, place
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.axes, self.size, self.kind = axes, size, kind or Kind()
        self.stored: Stored | Tensor | None = None
        self.plan = self.dense = None
        self.decided = False  # whether it is stored
        self.returned = False
        self.alive = 0  # tensors of the model's Python that have it
        self.shares: set[int] = {number}  # the values that may show the same memory
        self.readers: list[tuple[bool, Kind]] = []

    @property
    def bytes(self) -> int:
        if self.stored is None:
            return 0
        if type(self.stored) is Stored:
            return self.stored.bytes
        return self.stored.numel() * self.stored.element_size()


class Step:
    """A call of a function.

    Attributes:
        key: the function's name and the arguments, with :class:`Ref` and :class:`Plain` in the place of tensors.
        plains: the other tensors among the arguments; copies of them, where they are no parameters.
        rule: what it does to a change (:mod:`.kinds`).
        size: ``(N, H, W)`` of the maps that it reads pixel by pixel.
        spec: the structure of its result.
        modes: autocast's, in which it ran.
    """

    def __init__(self, number: int, func: Callable, name: str, key: tuple, values: list, plains: list):
        self.number, self.func, self.name, self.key = number, func, name, key
        self.inputs: list[Value] = values
        self.plains: list[Tensor] = plains
        self.copied: set[int] = set()  # the places of plains that are copies
        self.draws = False  # whether it draws random numbers: then it runs in each call
        self.rule = self.size = self.spec = None
        self.outs: list[Value] = []
        self.leaves: list = []
        self.target: Value | None = None  # among the inputs: what it writes into
        self.modes = ()
        self.label = name
        self.threshold = 0.0
        # of the last call
        self.rows = self.of = 0
        self.seconds = 0.0
        self.axes: list | None = None  # of its results, where it works pixel by pixel
        self.passes: Value | None = None  # its only input, where it is not kept and changes where that does
        self.widest: int | None = None  # the input that changes wherever another does
        self.fused = ""  # the convolution that it ends (:mod:`.fused`), or None, once it was looked for
        self.waits = False  # a convolution that is computed with the norm after it
        self.held: Tensor | None = None  # its input, until then
        self.last: list[Value] = []  # values that no later step reads
        self.ran = {"dense": 0, "rows": 0}  # times
        self.lost = 0  # calls in which rows were expected to be slower
        self.times = {}  # best seconds of "dense", and of a row by "rows"


class Tape:
    """Steps and values of one forward."""

    def __init__(self):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.inputs: list[Value] = []
        self.calls = 0
        self.tried: dict = {}  # functions that were tried, and the axes of what they make
        self.arguments = None  # the structure of the model's arguments, and what is no tensor among them
        self.mark = None  # of parameters and buffers
        self.turned = -1  # ``kept.turned`` when it began
        self.ids: list[int] = []  # of these
        self.names: dict[int, str] = {}  # of these, by id
        self.returns = self.others = None
        self.watched = None  # a picture of the model, from before its steps were last run by Python
        self.pure = True  # its steps follow from its inputs alone: Python read no content, and made no tensor

    def new(self, step, place: int, x: Tensor, axes=None, size=None, kind=None) -> Value:
        made = Value(len(self.values), step, place, x, axes, size, kind)
        self.values.append(made)
        return made

    def cut(self, steps: int) -> None:
        """Forgets the steps from this one on: the forward does something else now."""
        gone = {id(out) for step in self.steps[steps:] for out in step.outs}
        first = min(
            (out.number for step in self.steps[steps:] for out in step.outs), default=len(self.values)
        )
        del self.steps[steps:]
        if gone:
            del self.values[first:]
            for value in self.values:
                value.shares.difference_update([n for n in value.shares if n >= first])
            for step in self.steps:
                step.fused = ""

    def __del__(self):
        for value in self.values:  # steps and values hold each other: what they keep goes at once
            value.stored = value.dense = None

    @property
    def bytes(self) -> int:
        return sum(value.bytes for value in self.values)


def frozen(tree, values: list, plains: list, followed: type):
    """A tree of arguments in a form that compares with ``==``. Collects its values and its other tensors."""
    kind = type(tree)
    if kind is followed:
        if tree.plain is None:
            values.append(tree.value)
            return Ref(tree.value.number)
        tree = tree.plain
    if isinstance(tree, Tensor):
        plains.append(tree)
        return Plain(len(plains) - 1, tuple(tree.shape), tree.dtype)
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, tuple([frozen(x, values, plains, followed) for x in tree]))
    if kind is dict:
        return (dict, tuple([(k, frozen(x, values, plains, followed)) for k, x in tree.items()]))
    if kind is slice:
        return (
            slice,
            tuple([frozen(x, values, plains, followed) for x in (tree.start, tree.stop, tree.step)]),
        )
    return (None, tree)


def filled(key, value_of: Callable, plains: list):
    """The arguments of a frozen tree, with ``value_of(number)`` in the place of each value."""
    kind = type(key)
    if kind is Ref:
        return value_of(key.value)
    if kind is Plain:
        return plains[key.place]
    container, inner = key
    if container is None:
        return inner
    if container is dict:
        return {k: filled(x, value_of, plains) for k, x in inner}
    made = [filled(x, value_of, plains) for x in inner]
    if container is slice:
        return slice(*made)
    return made if container is list else tuple(made)
