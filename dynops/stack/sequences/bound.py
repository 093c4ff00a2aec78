"""A sequence of layers at the sizes of its inputs: the steps that the binary runs, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ... import backends
from ...geometry import ConvGeometry
from ...kept import Mark, kept
from ...kernels.cpu.engine import setup_of, takes_winograd
from ...kernels.cpu.prepared import Prepared, StepKind, key_of
from ..layers.base import Layer, Rows, Unjoinable
from ..layers.resample import Padded, through
from ..norm import check_features, fold, tensors_of, uses_batch_statistics
from . import moves

_WINDOWS = (StepKind.MAX_POOL, StepKind.MEAN_POOL, StepKind.NEAREST)


@dataclass
class Weights:
    """What a step multiplies by.

    Attributes:
        geometry: of the convolution.
        conv: the module with ``weight`` and ``bias``, a convolution or a Linear; None: each row is taken by itself.
        norm: the BatchNorm2d after it, or None.
    """

    geometry: ConvGeometry
    conv: nn.Module | None = None
    norm: nn.Module | None = None
    activation: str = ""

    def tensors(self) -> tuple[Tensor | None, ...]:
        own = () if self.conv is None else (self.conv._parameters["weight"], self.conv._parameters["bias"])
        return own if self.norm is None else (*own, *tensors_of(self.norm))


@dataclass
class Step:
    """A step of the binary; ``inputs`` and ``out`` are numbers of values."""

    kind: StepKind
    inputs: tuple[int, ...]
    out: int
    weights: Weights | None = None
    geometry: ConvGeometry | None = None
    channels: list[int] = field(default_factory=list)  # that are taken


class Bound:
    """A sequence at the sizes of its inputs. The layers' ``join`` fill it.

    Args:
        sizes: ``(N, H, W, C)`` of each input.
    """

    def __init__(self, sequence, sizes: tuple):
        self.sequence = sequence
        self.slots: dict[tuple, int] = {}  # of a size (N, H, W): its plan's place
        self.makers: list[tuple] = []  # of each: how the mask brings it there
        self._sizes: dict[int, tuple] = {}  # of each value that is rows
        self._channels: dict[int, int] = {}
        self._moved: dict[int, object] = {}  # values that only move others' channels
        self._same: dict[int, int] = {}  # values that are others
        self._pads: dict[int, ConvGeometry] = {}  # values that are others with zeros around, and the padding
        self.steps: list[Step] = []
        self.tiled: dict[int, ConvGeometry] = {}  # the slots whose 3x3 convolutions may run as Winograd's
        self.idle: list[nn.Module] = []  # dropouts, which do nothing in eval mode
        for value, (*size, channels) in zip(sequence.inputs, sizes, strict=True):
            self._place(value, tuple(size), channels, None, False)
        for layer in sequence.layers:
            layer.join(self)
        self.results = {value: self._result(value) for value in sequence.outputs}
        ends = dict.fromkeys(v for v in self.results.values() if type(v) is int and v not in sequence.inputs)
        self.outputs = tuple(ends)
        self.number = {value: i for i, value in enumerate(self._sizes)}
        self._made: tuple | None = None

    # --------------------------------------------------------------------------------- by layers

    def step(
        self, kind: StepKind, layer: Layer, size: tuple, channels: int,
        geometry: ConvGeometry | None = None, ceil: bool = False, weights: Weights | None = None,
        inputs: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """Adds a layer's step.

        Args:
            size, channels: of its output, whose mask ``use_mask.after(geometry, ceil)`` brings there.
            inputs: those of the layer, in another order.
        """
        inputs = tuple(self.rows(v) for v in (layer.inputs if inputs is None else inputs))
        self._place(layer.out, size, channels, geometry, ceil)
        self.steps.append(Step(kind, inputs, layer.out, weights, geometry))
        g, conv = (None, None) if weights is None else (weights.geometry, weights.conv)
        if conv is not None and takes_winograd(g, conv._parameters["weight"].shape, torch.float32):
            self.tiled[self.slots[size]] = g

    def multiply(
        self, layer: Layer, size: tuple, channels: int, geometry: ConvGeometry | None = None,
        conv: nn.Module | None = None, norm: nn.Module | None = None, activation: str = "",
    ) -> None:  # fmt: skip
        """Adds a layer's convolution; without ``conv`` what a norm or activation makes of each row by itself."""
        if conv is not None:
            first, *rest = layer.inputs
            pad = self._pads.get(first)
            weights = Weights(geometry if pad is None else through(pad, geometry), conv, norm, activation)
            inputs = layer.inputs if pad is None else (self._same[first], *rest)
            return self.step(StepKind.CONV, layer, size, channels, geometry, weights=weights, inputs=inputs)
        each = ConvGeometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, channels, 0)  # depthwise 1x1
        return self.step(StepKind.EACH, layer, size, channels, weights=Weights(each, None, norm, activation))

    def move(self, layer: Layer, call: Callable) -> None:
        """Adds a layer that only moves channels, or computes with sizes."""
        self._moved[layer.out] = moves.moved(call, {v: self._tree(v) for v in layer.inputs})

    def idles(self, layer: Layer, module: nn.Module) -> None:
        """Adds a layer that does nothing in eval mode."""
        self.idle.append(module)
        self._same[layer.out] = layer.inputs[0]

    def pad(self, layer: Layer, geometry: ConvGeometry) -> None:
        """Adds zeros around a map, which convolutions read through."""
        self._same[layer.out], self._pads[layer.out] = self.rows(layer.inputs[0]), geometry
        self._reach(geometry.out_shape, geometry, False)

    def padded_size(self, value: int) -> tuple[int, int, int]:
        """The size of a value as a convolution reads it, with the zeros around it."""
        return self._pads[value].out_shape if value in self._pads else self.size(value)

    def size(self, value: int) -> tuple[int, int, int]:
        return self._sizes[self.rows(value)]

    def channels(self, value: int) -> int:
        return self._channels[self.rows(value)]

    def same(self, values) -> tuple[tuple, int]:
        """Size and channels of values that share them.

        Raises:
            Unjoinable: they do not.
        """
        sizes, channels = {self.size(v) for v in values}, {self.channels(v) for v in values}
        if len(sizes) != 1 or len(channels) != 1:
            raise Unjoinable
        return sizes.pop(), channels.pop()

    def rows(self, value: int) -> int:
        """The value that has a value's rows; moved channels are taken here.

        Raises:
            Unjoinable: it is no map.
        """
        while value in self._same:
            if value in self._pads:
                raise Unjoinable
            value = self._same[value]
        if value in self._sizes:
            return value
        found = self._moved.get(value)
        root = getattr(found, "root", None)
        if root is None:
            raise Unjoinable
        size, channels = self._sizes[root], self._channels[root]
        taken = moves.channels_taken(found, size, channels, last=False)
        if taken == list(range(channels)):
            self._same[value] = root
            return root
        self._place(value, size, len(taken), None, False)
        self.steps.append(Step(StepKind.TAKE, (root,), value, channels=taken))
        return value

    def _tree(self, value: int):
        while value in self._same and value not in self._pads:
            value = self._same[value]
        if value in self._moved:
            return self._moved[value]
        value = self.rows(value)
        return moves.whole(value, self._sizes[value], self._channels[value])

    def _result(self, value: int):
        """The value that a result is, or the number or tuple that it is itself."""
        found = self._moved.get(value)
        if value in self._moved and not _holds_maps(found):
            return (found,)
        return self.rows(self._same[value] if value in self._pads else value)

    def _place(self, value: int, size: tuple, channels: int, geometry, ceil: bool) -> None:
        self._sizes[value], self._channels[value] = size, channels
        self._reach(size, geometry, ceil)

    def _reach(self, size: tuple, geometry, ceil: bool) -> None:
        """Brings the mask to a size."""
        if size not in self.slots:
            self.slots[size] = len(self.makers)
            self.makers.append((size, geometry, ceil))

    # ------------------------------------------------------------------------------------ running

    def run(self, run, found: list[Rows]) -> bool:
        """See :meth:`.sequence.Sequence.run`; ``found``: the inputs."""
        if any(module.training for module in self.idle):
            return False
        plans = self._plans(run, found)
        tensors = None if plans is None else self._tensors()
        if tensors is None:
            return False
        tiled = self.tiled
        quads = [run.quads(plan, tiled[i]) if i in tiled else None for i, plan in enumerate(plans)]
        capsule = self._capsule(tensors, tuple(q is not None for q in quads))
        if capsule is None:
            return False
        arguments = []
        for plan, tiles in zip(plans, quads, strict=True):
            arguments += (
                plan.index.data_ptr(), run.inverse(plan).data_ptr(), run.index_of_rows(plan).data_ptr(),
                0 if tiles is None else tiles.data_ptr(), len(plan), 0 if tiles is None else tiles.shape[0],
                plan.shape[1] * plan.shape[2],
            )  # fmt: skip
        made = dict(zip(self.sequence.inputs, found, strict=True))
        for value in self.outputs:
            plan = plans[self.slots[self._sizes[value]]]
            made[value] = Rows(found[0].values.new_empty((len(plan), self._channels[value])), plan)
        arguments += [rows.values.data_ptr() for rows in made.values()]
        backends._C.run_sequence(capsule, len(plans), *arguments)
        for value, result in self.results.items():
            found = made[result] if type(result) is int else result[0]
            pad = self._pads.get(value)
            run.env[value] = found if pad is None else Padded(found, plans[self.slots[pad.out_shape]], pad)
        return True

    def _plans(self, run, found: list[Rows]) -> list | None:
        """The plan of each size; None where one is empty, or not that of an input."""
        active, device, plans = run.policy.active, found[0].plan.device, []
        for size, geometry, ceil in self.makers:
            plan = active.plan(size, device) if geometry is None else active.after(geometry, device, ceil)
            if plan.count is not None or len(plan) == 0:
                return None
            plans.append(plan)
        for value, rows in zip(self.sequence.inputs, found, strict=True):
            if rows.plan is not plans[self.slots[self._sizes[value]]]:
                return None
        return plans

    def _tensors(self) -> list[Tensor | None] | None:
        """Every weight and statistic; None where a norm has the statistics of the batch."""
        tensors: list[Tensor | None] = []
        for step in self.steps:
            if (weights := step.weights) is not None:
                if weights.norm is not None and uses_batch_statistics(weights.norm):
                    return None
                tensors += weights.tensors()
        return tensors

    def _capsule(self, tensors: list, quads: tuple[bool, ...]):
        """What the binary runs, made again where a tensor changed; None where one is of another kind."""
        if kept.stepped:
            kept.clear()
        norms = (step.weights.norm for step in self.steps if step.weights is not None)
        made, now = self._made, (kept.epoch, quads, *[norm.eps for norm in norms if norm is not None])
        if made is not None and made[0] == now and made[1].holds(*tensors):
            return made[2]
        plain = (type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors if t is not None)
        if not all(plain):
            return None
        mark = Mark(*tensors)
        prepared = [None if step.weights is None else self._prepare(step, quads) for step in self.steps]
        if any(
            one is None and step.weights is not None for one, step in zip(prepared, self.steps, strict=True)
        ):
            return None
        capsule = self._make(prepared)
        self._made = now, mark, capsule, prepared  # the prepared ones hold the weights that the capsule reads
        return capsule

    def _prepare(self, step: Step, quads: tuple[bool, ...]) -> Prepared | None:
        weights, channels, value = step.weights, self._channels[step.out], step.inputs[0]
        g, norm, activation = weights.geometry, weights.norm, weights.activation
        weight, bias = _weight_of(weights, channels)
        if weight.dtype is not torch.float32 or not (bias is None or bias.dtype is torch.float32):
            return None
        ins, outs = weight.shape[1] * g.groups, weight.shape[0]
        if g.transposed:
            ins, outs = weight.shape[0], weight.shape[1] * g.groups
        if ins != self._channels[value] or outs != channels:
            return None
        setup = setup_of(g, weight.shape, torch.float32, True)
        stays = self._sizes[value] == self._sizes[step.out] and g.is_pointwise and not g.transposed
        pointwise = step.kind is StepKind.EACH or stays
        as_quads = setup.winograd and quads[self.slots[self._sizes[step.out]]]

        def make() -> Prepared:
            if norm is not None:
                check_features(norm, channels)
            affine = (None, None) if norm is None else fold(norm)
            return Prepared(weight, bias, g, setup, activation, *affine, pointwise, as_quads)

        if weights.conv is None:
            return make()
        eps, tensors = (0.0, ()) if norm is None else (norm.eps, tensors_of(norm))
        return kept.get((eps, *key_of(g, pointwise, activation, as_quads)), make, weight, bias, *tensors)

    def _make(self, prepared: list):
        number, last = self.number, {}
        for i, step in enumerate(self.steps):
            last.update(dict.fromkeys((*step.inputs, step.out), i))
        steps = []
        for i, (step, one) in enumerate(zip(self.steps, prepared, strict=True)):
            freed = [number[v] for v, at in last.items() if at == i and v not in self.outputs]
            geometry = tuple(step.geometry) if step.kind in _WINDOWS else None
            conv = None if one is None else one.conv
            inputs = [number[v] for v in step.inputs]
            steps.append((int(step.kind), inputs, number[step.out], conv, geometry, freed, step.channels))
        values = [(self.slots[size], self._channels[v]) for v, size in self._sizes.items()]
        ends = [[number[v] for v in these] for these in (self.sequence.inputs, self.outputs)]
        return backends._C.make_sequence(values, *ends, steps)


def _weight_of(weights: Weights, channels: int) -> tuple[Tensor, Tensor | None]:
    if weights.conv is None:  # of each row: a depthwise convolution by ones
        return torch.ones(channels, 1, 1, 1), None
    return weights.conv._parameters["weight"], weights.conv._parameters["bias"]


def _holds_maps(tree) -> bool:
    leaves = torch.utils._pytree.tree_leaves(tree, is_leaf=lambda leaf: type(leaf) is moves.Moved)
    return any(type(leaf) is moves.Moved for leaf in leaves)
