"""Layers that follow each other, run as one call of the binary (``csrc/cpu/pixels/sequence.h``).

Between two kernels Python costs 25 to 60 us a layer, most of it misses of the caches: more than the kernels themselves
where few pixels are active. A sequence is bound to the sizes of its inputs once. A call then looks at every weight and
statistic together, brings the plans, and runs. It takes float32 rows of compact plans on a CPU, without gradients, under
a mask; what it does not take, the layers run one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..geometry import ConvGeometry
from ..kept import Mark, kept
from ..kernels.cpu.engine import setup_of, takes_winograd
from ..kernels.cpu.prepared import Prepared, StepKind, key_of
from ..plans import PixelPlan
from .layers.base import Layer, Rows, Unjoinable
from .norm import check_features, fold, tensors_of, uses_batch_statistics
from .policy import Masked

_WINDOWS = (StepKind.MAX_POOL, StepKind.MEAN_POOL, StepKind.NEAREST)
_MOST_BOUND = 16  # sizes and kinds of masks that a sequence stays bound to


def parts_of(layers: list[Layer], output: int) -> tuple[Layer | Sequence, ...]:
    """The layers, with each run of two and more that join as a :class:`Sequence`."""
    parts: list = []
    joined: list[Layer] = []
    for i, layer in enumerate([*layers, None]):
        ends = layer is None or (
            layer.conv is not None and layer.out == output
        )  # it writes the dense map itself
        if not ends and layer.joins and 0 not in layer.inputs:
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
        self._bound: dict[tuple, _Bound | None] = {}

    def run(self, run) -> bool:
        """Puts the outputs among the values of a run; False, and nothing done, where the layers must run one by one."""
        if not run.direct or type(run.policy) is not Masked or run.policy.active.ragged:
            return False
        found = [run.found(v) for v in self.inputs]
        if not all(type(x) is Rows and _is_plain(x.values) and _is_compact(x.plan) for x in found):
            return False
        sizes = tuple((*x.plan.shape, x.values.shape[1]) for x in found)
        bound = self._bound_to(sizes, run, found)
        return bound is not None and bound.run(run, found)

    def _bound_to(self, sizes: tuple, run, found: list[Rows]) -> _Bound | None:
        bound = self._bound.get(sizes)
        if bound is None:
            if sizes in self._bound:
                return None
            try:
                bound = _Bound(self, sizes)
            except (Unjoinable, ValueError):  # which the layers raise too
                bound = None
            if len(self._bound) >= _MOST_BOUND:
                self._bound = {}
            self._bound[sizes] = bound
        return bound


def _is_plain(values: Tensor) -> bool:
    return type(values) is Tensor and values.dtype is torch.float32 and values.is_contiguous()


def _is_compact(plan) -> bool:
    return type(plan) is PixelPlan and plan.count is None and len(plan) > 0


class _Bound:
    """A sequence at the sizes of its inputs. The layers' ``join`` fill it."""

    def __init__(self, sequence: Sequence, sizes: tuple):
        self.sequence = sequence
        self.slots: dict[tuple, int] = {}  # of a size (N, H, W): its plan's place
        self.makers: list[tuple] = []  # of each: how the mask brings it there
        self.sizes: dict[int, tuple] = {}  # of each value
        self.channels: dict[int, int] = {}
        self.steps: list[tuple] = []  # kind, inputs, out, weights, geometry
        self.tiled: dict[int, ConvGeometry] = {}  # the slots whose 3x3 convolutions may run as Winograd's
        for value, (*size, channels) in zip(sequence.inputs, sizes, strict=True):
            self._place(value, tuple(size), channels, None, False)
        for layer in sequence.layers:
            layer.join(self)
        self.number = {value: i for i, value in enumerate(self.sizes)}
        self._made: tuple | None = None

    # --------------------------------------------------------------------------------- by layers

    def step(
        self, kind: StepKind, layer: Layer, size: tuple, channels: int,
        geometry: ConvGeometry | None = None, ceil: bool = False, weights: tuple | None = None,
        inputs: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """Adds a layer's step.

        Args:
            size, channels: of its output, whose mask ``use_mask.after(geometry, ceil)`` brings there.
            weights: (convolution or None, norm or None, activation, geometry).
            inputs: those of the layer, in another order.
        """
        self._place(layer.out, size, channels, geometry, ceil)
        self.steps.append((kind, layer.inputs if inputs is None else inputs, layer.out, weights, geometry))
        conv, g = (None, None) if weights is None else (weights[0], weights[3])
        if conv is not None and takes_winograd(g, conv._parameters["weight"].shape, torch.float32):
            self.tiled[self.slots[size]] = g

    def _place(self, value: int, size: tuple, channels: int, geometry, ceil: bool) -> None:
        self.sizes[value], self.channels[value] = size, channels
        if size not in self.slots:
            self.slots[size] = len(self.makers)
            self.makers.append((size, geometry, ceil))

    def same(self, values) -> tuple[tuple, int]:
        """Size and channels of values that share them.

        Raises:
            Unjoinable: they do not.
        """
        sizes, channels = {self.sizes[v] for v in values}, {self.channels[v] for v in values}
        if len(sizes) != 1 or len(channels) != 1:
            raise Unjoinable
        return sizes.pop(), channels.pop()

    # ------------------------------------------------------------------------------------ running

    def run(self, run, found: list[Rows]) -> bool:
        active, device, plans = run.policy.active, found[0].plan.device, []
        for size, geometry, ceil in self.makers:
            plan = active.plan(size, device) if geometry is None else active.after(geometry, device, ceil)
            if not _is_compact(plan):
                return False
            plans.append(plan)
        slots = [self.slots[self.sizes[v]] for v in self.sequence.inputs]
        if any(x.plan is not plans[slot] for x, slot in zip(found, slots, strict=True)):
            return False
        tensors = self._tensors()
        if tensors is None:
            return False
        quads = [
            run.quads(p, g) if (g := self.tiled.get(i)) is not None else None for i, p in enumerate(plans)
        ]
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
        arguments += [x.values.data_ptr() for x in found]
        like, outs = found[0].values, []
        for value in self.sequence.outputs:
            plan = plans[self.slots[self.sizes[value]]]
            outs.append(Rows(like.new_empty((len(plan), self.channels[value])), plan))
        backends._C.run_sequence(capsule, len(plans), *arguments, *[x.values.data_ptr() for x in outs])
        for value, out in zip(self.sequence.outputs, outs, strict=True):
            run.env[value] = out
        return True

    def _tensors(self) -> list[Tensor | None] | None:
        """Every weight and statistic; None where a norm has those of the batch, or a tensor is of another kind."""
        tensors: list[Tensor | None] = []
        for _, _, _, weights, _ in self.steps:
            if weights is None:
                continue
            conv, norm, *_ = weights
            if conv is not None:
                tensors += (conv._parameters["weight"], conv._parameters["bias"])
            if norm is not None:
                if uses_batch_statistics(norm):
                    return None
                tensors += tensors_of(norm)
        return tensors

    def _capsule(self, tensors: list, quads: tuple[bool, ...]):
        """What the binary runs, made again where a tensor changed; None where one is of another kind."""
        if kept.stepped:
            kept.clear()
        made, now = (
            self._made,
            (kept.epoch, quads, *[w[1].eps for *_, w, _ in self.steps if w and w[1] is not None]),
        )
        if made is not None and made[0] == now and made[1].holds(*tensors):
            return made[2]
        floats = (
            t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu and not t.is_meta) for t in tensors
        )
        if not all(floats):
            return None
        mark = Mark(*tensors)
        prepared = []
        for step in self.steps:
            prepared.append(None if step[3] is None else self._prepare(step, quads))
            if step[3] is not None and prepared[-1] is None:
                return None
        capsule = self._make(prepared)
        self._made = now, mark, capsule, prepared  # the prepared ones hold the weights that the capsule reads
        return capsule

    def _prepare(self, step: tuple, quads: tuple[bool, ...]) -> Prepared | None:
        kind, inputs, out, (conv, norm, activation, g), _ = step
        channels = self.channels[out]
        if conv is None:  # of each row: a depthwise convolution by ones
            weight, bias = torch.ones(channels, 1, 1, 1), None
        else:
            weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        if weight.dtype is not torch.float32 or not (bias is None or bias.dtype is torch.float32):
            return None
        ins = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
        outs = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
        if ins != self.channels[inputs[0]] or outs != channels:
            return None
        setup = setup_of(g, weight.shape, torch.float32, True)
        pointwise = kind == StepKind.EACH or (
            self.sizes[inputs[0]] == self.sizes[out] and g.is_pointwise and not g.transposed
        )
        as_quads = setup.winograd and quads[self.slots[self.sizes[out]]]

        def make() -> Prepared:
            if norm is not None:
                check_features(norm, channels)
            affine = (None, None) if norm is None else fold(norm)
            return Prepared(weight, bias, g, setup, activation, *affine, pointwise, as_quads)

        if conv is None:
            return make()
        eps, tensors = (0.0, ()) if norm is None else (norm.eps, tensors_of(norm))
        return kept.get((eps, *key_of(g, pointwise, activation, as_quads)), make, weight, bias, *tensors)

    def _make(self, prepared: list):
        number, last = self.number, {}
        for i, (_, inputs, out, _, _) in enumerate(self.steps):
            last.update(dict.fromkeys((*inputs, out), i))
        steps = []
        for i, ((kind, inputs, out, _, g), one) in enumerate(zip(self.steps, prepared, strict=True)):
            freed = [number[v] for v, at in last.items() if at == i and v not in self.sequence.outputs]
            geometry = tuple(g) if kind in _WINDOWS else None
            conv = None if one is None else one.conv
            steps.append((int(kind), [number[v] for v in inputs], number[out], conv, geometry, freed))
        values = [(self.slots[size], self.channels[v]) for v, size in self.sizes.items()]
        ends = [[number[v] for v in these] for these in (self.sequence.inputs, self.sequence.outputs)]
        return backends._C.make_sequence(values, *ends, steps)
