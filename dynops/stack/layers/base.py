"""Layer: what a stack is made of, and Rows, a value of it. The names of layers in errors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ... import modes
from ...geometry import BlockGeometry, ConvGeometry
from ...ops.epilogue import ACTIVATIONS
from ...plans import PixelPlan
from ..receptive_field import Same, Span
from ..trace import Step

SAME = (Same(), Same())


def spans_of(g: BlockGeometry) -> tuple[Span, Span]:
    """The pixels of a grid's blocks along y and x."""
    return Span(g.first_h, g.tile_h, g.step_h), Span(g.first_w, g.tile_w, g.step_w)


def place(path: str) -> str:
    """The name of a layer in an error: its path in the module that was passed, "module" for itself."""
    return path.removeprefix("module.")


def called(step: Step) -> str:
    """The name of a call in an error: the module whose forward makes it, and the function."""
    function = step.target.rpartition(":")[2] or step.kind
    where = place(step.scope)
    return f"{where}.{function}" if where else function


def mapped(value, function):
    """A tuple, list, dict or slice with ``function`` of each member; anything else as it is."""
    if isinstance(value, tuple):
        return tuple([function(v) for v in value])
    if isinstance(value, list):  # a list of torch.fx stays behind
        return [function(v) for v in value]
    if isinstance(value, dict):
        return {k: function(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(function(value.start), function(value.stop), function(value.step))
    return value


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(y + residual)``, in place where nothing else needs ``y``."""
    free = not modes.differentiated(y)
    if residual is not None:
        residual = residual.to(y.dtype)  # differs under autocast only, where rows have it so too
        own = free and residual.shape == y.shape and not residual.requires_grad
        y = y.add_(residual) if own else y + residual
        free = free and not y.requires_grad
    if activation == "relu" and free:
        return y.relu_()
    return ACTIVATIONS[activation](y)


class Rows(NamedTuple):
    """A value that exists at some pixels: the map's rows there."""

    values: Tensor  # [P, C]
    plan: PixelPlan


class NoTensor(TypeError):
    """A layer got what it cannot take: a part that returns several tensors, or one sample alone. The trace holds no longer."""


class Unjoinable(Exception):
    """A layer cannot run in a sequence at these sizes."""


class Layer:
    """One layer of a stack. A type of layer is one subclass.

    Attributes:
        name: its path, for errors.
        inputs, out: the numbers of the values that it reads and makes.
        free: the values that no later layer reads.
        reaches: for each input the receptive field along y and x.
        outside: what its first input must be where it lies outside the map: "zero", "-inf" (below
            every value), "edge" (the nearest pixel inside), or "" where it makes no difference.
        refusal: why it cannot compute a part of its output from a part of its input; "" where it can.
        packs: whether it makes rows from rows, without dense maps between.
        converted: whether ``convert_`` gave its module a class that masks the output.
        recorded: the recorded call of the module or function, for dense maps.
        joins: whether it may run in a sequence of layers (:mod:`..sequences`).
        conv: the convolution that it is, or None; ``transposed``: whether it is a transposed one.
    """

    outside = ""
    refusal = ""
    packs = False
    converted = False
    joins = False
    recorded: Layer | None = None
    conv: nn.Module | None = None
    transposed = False
    free: tuple[int, ...] = ()

    def __init__(self, name: str, inputs: tuple[int, ...], out: int, reaches=None):
        self.name, self.inputs, self.out = name, inputs, out
        self.reaches = reaches or (SAME,) * len(inputs)

    def check(self) -> None:
        """Raises TypeError where the layer, as it is now, cannot run on parts of a map."""

    def geometry(self, in_shape: tuple[int, int, int]) -> ConvGeometry | None:
        """The input pixels that an output pixel reads, for a layer that packs. None: the one at its own place."""
        return None

    def macs(self, in_shape: tuple[int, int, int]) -> float:
        """Multiply-accumulates of one output pixel."""
        return 0.0

    def rows(self, run):
        """The output in a :class:`~dynops.stack.run_rows.Run`: rows at a plan, or a dense tensor."""
        return self.recorded.rows(run)

    def join(self, bound) -> None:
        """Adds its step to a sequence that is bound to sizes (:class:`..sequences.bound.Bound`).

        Raises:
            Unjoinable: it has none at these sizes.
        """
        raise Unjoinable

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        """The tiles ``[B, C, out.tile_h, out.tile_w]`` of tiles that hold exactly what these read.

        There is no padding: what lies outside the map is in the tiles, as ``outside`` asks for it.
        ``blocks.at(axis)`` are the tiles' places in the grid.
        """
        raise NotImplementedError

    def whole(self, inputs: list[Tensor]) -> Tensor:
        """The output for whole maps, for inference, of a layer that packs."""
        return self.tiles(inputs, None, None)
