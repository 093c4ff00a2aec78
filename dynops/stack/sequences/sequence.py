"""Which layers run together, and whether they can in a run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plans import PixelPlan
from ..layers.base import Layer, Rows, Unjoinable
from ..layers.resample import Padded
from ..policy import Masked
from . import moves
from .bound import Parted
from .running import Running

_MOST_BOUND = 16  # sizes that a sequence stays bound to


def parts_of(layers, output: int, kinds: tuple[str, ...]) -> tuple[Layer | Sequence, ...]:
    """The layers, with each run of two and more that join as a :class:`Sequence`.

    Args:
        kinds: of each input: "rows"; a "map" that is dense, which layers alone read; a "vector" of each sample. What
            is made of vectors alone runs before the sequence in whose middle it stands.
    """
    parts: list = []
    joined: list[Layer] = []
    maps = {value for value, kind in enumerate(kinds) if kind == "map"}
    vectors = {value for value, kind in enumerate(kinds) if kind == "vector"}
    for i, layer in enumerate([*layers, None]):
        if layer is not None and layer.inputs and vectors.issuperset(layer.inputs):
            vectors.add(layer.out)
            if not any(v in layer.free for earlier in joined for v in earlier.inputs):
                parts.append(layer)
                continue
        # a last convolution writes the dense map itself
        ends = layer is None or (0 in maps and layer.conv is not None and layer.out == output)
        if not ends and layer.joins and layer.out not in vectors and maps.isdisjoint(layer.inputs):
            joined.append(layer)
            continue
        if len(joined) > 1:
            read = {output}.union(*(later.inputs for later in layers[i:]))
            parts.append(Sequence(tuple(joined), read))
        else:
            parts += joined
        joined = []
        if layer is not None:
            parts.append(layer)
    return tuple(parts)


class Sequence:
    """Layers in order.

    Args:
        read: the values that something after them reads.
    """

    def __init__(self, layers: tuple[Layer, ...], read: set[int]):
        self.layers = layers
        made = [layer.out for layer in layers]
        self.inputs = tuple(dict.fromkeys(v for layer in layers for v in layer.inputs if v not in made))
        self.outputs = tuple(v for v in made if v in read)
        # by the inputs; parts, where one layer cannot join
        self._bound: dict[tuple, Running | tuple | None] = {}

    def run(self, run) -> bool:
        """Puts the outputs among the values of a run; False, and nothing done, where the layers must run one by one."""
        if not run.direct or type(run.policy) is not Masked or run.policy.active.ragged:
            return False
        # the rows of a padding may lie under another mask
        if any(type(run.env[value]) is Padded for value in self.inputs):
            return False
        found, inputs, given = [], [], [run.found(value) for value in self.inputs]
        batch = next((x.plan.shape[0] for x in given if type(x) is Rows), 0)
        for x in given:
            if type(x) is Rows and _is_plain(x.values) and is_compact(x.plan):
                found.append(x)
                inputs.append((x.plan.shape, x.values.shape[1]))
            elif moves.is_size(x):
                inputs.append(x)
            elif (x := _of_samples(run, x, batch)) is not None:
                found.append(x)
                inputs.append((x.plan.shape, x.values.shape[1]))
            else:
                return False
        bound = self._bound_to(tuple(inputs)) if found else None
        if type(bound) is not tuple:
            return bound is not None and bound.run(run, found)
        for part in bound:
            run.part(part)
        return True

    def _bound_to(self, inputs: tuple) -> Running | tuple | None:
        known = self._bound  # another thread may replace it
        if inputs in known:
            return known[inputs]
        try:
            bound = Running(self, inputs)
        except Parted as parted:
            bound = self._around(parted.position)
        except (Unjoinable, ValueError):
            bound = None
        if len(known) >= _MOST_BOUND:
            self._bound = known = {}
        known[inputs] = bound
        return bound

    def _around(self, at: int) -> tuple | None:
        """The layers before and after one that cannot join them, and it, as parts; None where no two are left together."""
        parts: list = []
        for start, end in ((0, at), (at, at + 1), (at + 1, len(self.layers))):
            piece = self.layers[start:end]
            read = {*self.outputs}.union(*(later.inputs for later in self.layers[end:]))
            parts += [Sequence(piece, read)] if len(piece) > 1 else piece
        return tuple(parts) if any(type(part) is Sequence for part in parts) else None


def _is_plain(values: Tensor) -> bool:
    return type(values) is Tensor and values.dtype is torch.float32 and values.is_contiguous()


def _of_samples(run, x, batch: int) -> Rows | None:
    """The rows of a vector ``[N, C, 1, 1]``, or of one for all samples."""
    if type(x) is not Tensor or x.dim() != 4 or x.shape[2:] != (1, 1) or x.shape[0] not in (1, batch):
        return None
    plan = run.policy.active.plan((batch, 1, 1), x.device) if x.is_cpu and batch else None
    if plan is None or x.dtype is not torch.float32 or not is_compact(plan):
        return None
    values = x.flatten(1).expand(batch, -1).contiguous()
    return Rows(values if len(plan) == batch else values[plan.index.long()], plan)


def is_compact(plan) -> bool:
    """True for a plan of pixels that has some, and no capacity."""
    return type(plan) is PixelPlan and plan.count is None and len(plan) > 0
