"""A sequence of layers at the sizes of its inputs: the steps that the binary runs, and what they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ... import backends
from ...geometry import ConvGeometry, conv_geometry
from ...kept import Mark, kept
from ...kernels.cpu.engine import setup_of, takes_winograd
from ...kernels.cpu.prepared import Prepared, StepKind, key_of, sequence
from ..layers.base import Layer, Rows, Unjoinable
from ..layers.resample import Padded, through
from ..maps import Standardised
from ..norm import check_features, fold, tensors_of, uses_batch_statistics
from ..staleness import hooked
from . import moves

_WINDOWS = (StepKind.MAX_POOL, StepKind.MEAN_POOL, StepKind.NEAREST)


@dataclass
class Weights:
    """What a step multiplies by.

    Attributes:
        geometry: of the convolution.
        conv: the module with ``weight`` and ``bias``, a convolution or a Linear; None: each row is taken by itself.
        norm: the BatchNorm2d after it, or None; of a layer norm that itself.
        scale: makes the vector ``[C]`` that it multiplies by after it, of ``scaled_by``; or None.
    """

    geometry: ConvGeometry
    conv: nn.Module | None = None
    norm: nn.Module | None = None
    activation: str = ""
    scale: Callable[[], Tensor] | None = None
    scaled_by: Callable[[], tuple] = tuple

    def tensors(self) -> tuple[Tensor | None, ...]:
        if type(self.conv) is Standardised:
            own = self.conv.tensors()
        else:
            own = (
                () if self.conv is None else (self.conv._parameters["weight"], self.conv._parameters["bias"])
            )
        own = own if self.norm is None else (*own, *tensors_of(self.norm))
        return (*own, *self.scaled_by())

    def affine(self, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """What follows the products."""
        if self.norm is not None:
            check_features(self.norm, channels)
            return fold(self.norm)
        if self.scale is None:
            return None, None
        scale = self.scale().detach().reshape(-1)
        return scale.expand(channels).contiguous(), None


@dataclass
class Step:
    """A step of the binary; ``inputs`` and ``out`` are numbers of values."""

    kind: StepKind
    inputs: tuple[int, ...]
    out: int
    weights: Weights | None = None
    geometry: ConvGeometry | None = None
    channels: list[int] = field(default_factory=list)  # that are taken
    layer_norm: nn.Module | None = None

    def norm_tensors(self) -> tuple[Tensor | None, ...]:
        found = () if self.layer_norm is None else self.layer_norm._parameters
        return (found["weight"], found["bias"]) if found else ()


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
        self._last: set[int] = set()  # values [N, H, W, C]
        self._moved: dict[int, object] = {}  # values that only move others' channels
        self._same: dict[int, int] = {}  # values that are others
        self._pads: dict[int, tuple[int, ConvGeometry]] = {}  # values that are others with zeros around
        self._roots: dict[tuple, int] = {}  # of (value, channels last): the rows that it is
        self.constants: dict[int, Layer] = {}  # values made of parameters alone
        self.steps: list[Step] = []
        self.tiled: dict[int, ConvGeometry] = {}  # the slots whose 3x3 convolutions may run as Winograd's
        self.called: list[tuple] = []  # children of modules on the way to those that layers call
        self.constant: list[Standardised] = []
        self.leaves: list[tuple] = []  # these, and their types
        self.idle: list[nn.Module] = []  # dropouts, which do nothing in eval mode
        self._readers = Counter(v for layer in sequence.layers for v in layer.inputs)
        self._readers.update(sequence.outputs)
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
        inputs: tuple[int, ...] | None = None, layer_norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """Adds a layer's step.

        Args:
            size, channels: of its output, whose mask ``use_mask.after(geometry, ceil)`` brings there.
            inputs: those of the layer, in another order.
        """
        inputs = layer.inputs if inputs is None else inputs
        last = self.is_last(inputs[0])
        inputs = tuple(self.rows(v, last) for v in inputs)
        self._place(layer.out, size, channels, geometry, ceil)
        if last:
            self._last.add(layer.out)
        self.steps.append(Step(kind, inputs, layer.out, weights, geometry, layer_norm=layer_norm))
        g, conv = (None, None) if weights is None else (weights.geometry, weights.conv)
        if conv is not None and takes_winograd(g, _as_kernel(conv).shape, torch.float32):
            self.tiled[self.slots[size]] = g

    def multiply(
        self, layer: Layer, size: tuple, channels: int, geometry: ConvGeometry | None = None,
        conv: nn.Module | None = None, norm: nn.Module | None = None, activation: str = "",
    ) -> None:  # fmt: skip
        """Adds a layer's convolution; without ``conv`` what a norm or activation makes of each row by itself."""
        if conv is not None:
            first, *rest = layer.inputs
            first, pad = self._pads.get(first, (first, None))
            weights = Weights(geometry if pad is None else through(pad, geometry), conv, norm, activation)
            inputs = (first, *rest)
            return self.step(StepKind.CONV, layer, size, channels, geometry, weights=weights, inputs=inputs)
        before = self._alone(layer.inputs[0]) if len(layer.inputs) == 1 else None
        found = None if before is None else before.weights
        bare = found is not None and found.norm is found.scale is None and len(before.inputs) == 1
        if found is not None and not found.activation and (norm is None or bare):
            found.activation, found.norm = activation, found.norm if norm is None else norm
            self._same[layer.out] = layer.inputs[0]
            return None
        weights = Weights(_each(channels), None, norm, activation)
        return self.step(StepKind.EACH, layer, size, channels, weights=weights)

    def standardised(self, layer: Layer, module: nn.Conv2d, forward: Callable) -> None:
        """Adds a convolution whose weight is made of its parameters."""
        conv = Standardised(module, forward)
        stride, padding, dilation, groups = conv.arguments
        g = conv_geometry(
            self.size(layer.inputs[0]), module.kernel_size, stride, padding, dilation, groups, padding
        )
        if self.channels(layer.inputs[0]) != module.in_channels:
            raise Unjoinable
        self.constant.append(conv)
        self.multiply(layer, g.out_shape, module.out_channels, g, conv)

    def linear(self, layer: Layer, module: nn.Module, inputs: int, outputs: int) -> None:
        """Adds a Linear of maps ``[N, H, W, C]``: a 1x1 convolution of their rows."""
        (n, h, w), channels = self.same(layer.inputs)
        if not self.is_last(layer.inputs[0]) or channels != inputs:
            raise Unjoinable
        g = ConvGeometry(n, h, w, h, w, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0)
        self.step(StepKind.CONV, layer, (n, h, w), outputs, g, weights=Weights(g, module))

    def norm(self, kind: StepKind, layer: Layer, module: nn.Module, last: bool) -> None:
        """Adds a LayerNorm or GRN over channels, which are the last dimension or not."""
        size, channels = self.same(layer.inputs)
        vectors = [v for v in module._parameters.values() if v is not None]
        if self.is_last(layer.inputs[0]) is not last or any(v.numel() != channels for v in vectors):
            raise Unjoinable
        if kind is StepKind.LAYER_NORM and tuple(module.normalized_shape) != (channels,):
            raise Unjoinable
        self.step(kind, layer, size, channels, layer_norm=module)

    def scale(
        self, layer: Layer, value: int, scale: Callable[[], Tensor], tensors: Callable[[], tuple]
    ) -> None:
        """Adds the product of a map and a vector of its channels, which ``scale`` makes of ``tensors``."""
        size, channels = self.same((value,))
        shape = scale().shape
        at = -1 if self.is_last(value) else -3
        if shape.numel() != 1 and (shape.numel() != channels or len(shape) < -at or shape[at] != channels):
            raise Unjoinable
        before = self._alone(value)
        if before is not None and before.kind is StepKind.CONV and len(before.inputs) == 1:
            found = before.weights
            if found.norm is None and found.scale is None and not found.activation:
                found.scale, found.scaled_by, self._same[layer.out] = scale, tensors, value
                return
        weights = Weights(_each(channels), scale=scale, scaled_by=tensors)
        self.step(StepKind.EACH, layer, size, channels, weights=weights, inputs=(value,))

    def add(self, layer: Layer, a: int, b: int) -> None:
        """Adds a sum: the residual of a convolution that nothing else reads, where the other value is there by then."""
        size, channels = self.same((a, b))
        last = self.is_last(a)
        for one, other in ((a, b), (b, a)):
            before, root = self._alone(one), self.rows(other, last)
            if before is None or before.weights.activation or len(before.inputs) != 1:
                continue
            if before.kind is StepKind.CONV and not any(
                s.out == root for s in self.steps[self.steps.index(before) :]
            ):
                before.inputs = (before.inputs[0], root)
                self._same[layer.out] = one
                return
        self.step(StepKind.SUM, layer, size, channels, inputs=(a, b))

    def calls(self, module: nn.Module, path: str, inner: nn.Module) -> None:
        """Notes a module that its layer calls, which must stay where it is and have no hooks."""
        names, parents = path.split("."), [module]
        for name in names[:-1]:
            parents.append(parents[-1]._modules[name])
        children = (*parents[1:], inner)
        self.called += [
            (p._modules, name, child) for p, name, child in zip(parents, names, children, strict=True)
        ]
        self.leaves.append((inner, type(inner)))

    def group_norm(self, layer: Layer, module: nn.Module, groups: int, activation: str = "") -> None:
        """Adds a GroupNorm or InstanceNorm2d over each sample's pixels of the mask, and an activation."""
        size, channels = self.same(layer.inputs)
        vectors = [v for v in module._parameters.values() if v is not None]
        if self.is_last(layer.inputs[0]) or channels % groups or any(v.numel() != channels for v in vectors):
            raise Unjoinable
        self.step(StepKind.GROUP_NORM, layer, size, channels, layer_norm=module)
        self.steps[-1].channels = [groups]
        if activation:
            found, made = self.steps[-1], -1 - len(self._sizes)
            self._place(made, size, channels, None, False)
            found.out, weights = made, Weights(_each(channels), activation=activation)
            self.steps.append(Step(StepKind.EACH, (made,), layer.out, weights))

    def move(self, layer: Layer, call: Callable) -> None:
        """Adds a layer that only moves channels, or computes with sizes."""
        self._moved[layer.out] = moves.moved(call, {v: self._tree(v) for v in layer.inputs})

    def idles(self, layer: Layer, module: nn.Module) -> None:
        """Adds a layer that does nothing in eval mode."""
        self.idle.append(module)
        self._same[layer.out] = layer.inputs[0]

    def pad(self, layer: Layer, geometry: ConvGeometry) -> None:
        """Adds zeros around a map, which convolutions read through."""
        self._pads[layer.out] = self.rows(layer.inputs[0]), geometry
        self._reach(geometry.out_shape, geometry, False)

    def padded_size(self, value: int) -> tuple[int, int, int]:
        """The size of a value as a convolution reads it, with the zeros around it."""
        return self._pads[value][1].out_shape if value in self._pads else self.size(value)

    def size(self, value: int) -> tuple[int, int, int]:
        return self._sizes[self.rows(value)]

    def channels(self, value: int) -> int:
        return self._channels[self.rows(value)]

    def same(self, values) -> tuple[tuple, int]:
        """Size and channels of values that share them, and the place of their channels.

        Raises:
            Unjoinable: they do not.
        """
        last = self.is_last(values[0])
        roots = [self.rows(v, last) for v in values]
        sizes, channels = {self._sizes[v] for v in roots}, {self._channels[v] for v in roots}
        if len(sizes) != 1 or len(channels) != 1:
            raise Unjoinable
        return sizes.pop(), channels.pop()

    def is_last(self, value: int) -> bool:
        """True for a map ``[N, H, W, C]``."""
        value = self._follow(value)
        if value in self._sizes:
            return value in self._last
        try:
            self.rows(value, True)
        except Unjoinable:
            return False
        return True

    def rows(self, value: int, last: bool = False) -> int:
        """The value that has a value's rows; moved channels are taken here.

        Args:
            last: the value is a map ``[N, H, W, C]``.

        Raises:
            Unjoinable: it is no such map.
        """
        value = self._follow(value)
        if value in self._sizes and (value in self._last) is last:
            return value
        if (value, last) in self._roots:
            return self._roots[value, last]
        found = self._tree(value)
        root = getattr(found, "root", None)
        if root is None:
            raise Unjoinable
        size, channels = self._sizes[root], self._channels[root]
        taken = moves.channels_taken(found, size, channels, last)
        made = root
        if taken != list(range(channels)):
            made = -1 - len(self._sizes)  # no layer's
            self._place(made, size, len(taken), None, False)
            self.steps.append(Step(StepKind.TAKE, (root,), made, channels=taken))
        self._roots[value, last] = made
        return made

    def _follow(self, value: int) -> int:
        while value in self._same:
            value = self._same[value]
        return value

    def _alone(self, value: int) -> Step | None:
        """The step that multiplies, if what it makes goes into this value alone, and nobody else reads either."""
        while self._readers[value] == 1:
            if value in self._same:
                value = self._same[value]
            elif value in self._moved and (root := getattr(self._moved[value], "root", None)) is not None:
                value = root if self.rows(value, self.is_last(value)) == root else value
                if value != root:
                    return None
            else:
                found = next((step for step in self.steps if step.out == value), None)
                return None if found is None or found.weights is None else found
        return None

    def _tree(self, value: int):
        value = self._follow(value)
        if value in self._moved:
            return self._moved[value]
        if value not in self._sizes:
            raise Unjoinable
        found = moves.whole(value, self._sizes[value], self._channels[value])
        return found._replace(index=found.index.permute(0, 2, 3, 1)) if value in self._last else found

    def _result(self, value: int):
        """The value that a result is, or the number or tuple that it is itself."""
        value = self._follow(self._pads.get(value, (value,))[0])
        if value in self._moved and not moves.holds_maps(self._moved[value]):
            return (self._moved[value],)
        return self.rows(value)

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
        if any(module.training for module in self.idle) or not self._calls_hold():
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
                plan.index.data_ptr(), run.inverse(plan).data_ptr(),
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
            rows = made[result] if type(result) is int else result[0]
            if value in self._pads:
                pad = self._pads[value][1]
                rows = Padded(rows, plans[self.slots[pad.out_shape]], pad)
            run.env[value] = rows
        return True

    def _calls_hold(self) -> bool:
        """True where the modules that layers call are those that were bound, with nothing set on them."""
        if any(children.get(name) is not child for children, name, child in self.called):
            return False
        if not all(conv.holds() for conv in self.constant):
            return False
        return not any(hooked(inner) or type(inner) is not kind for inner, kind in self.leaves)

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
            tensors += step.norm_tensors()
        return tensors

    def _capsule(self, tensors: list, quads: tuple[bool, ...]):
        """What the binary runs, made again where a tensor changed; None where one is of another kind."""
        if kept.stepped:
            kept.clear()
        norms = (step.layer_norm if step.weights is None else step.weights.norm for step in self.steps)
        made, now = self._made, (kept.epoch, quads, *[norm.eps for norm in norms if norm is not None])
        if made is not None and made[0] == now and made[1].holds(*tensors):
            return made[2]
        norms = {id(t) for step in self.steps for t in step.norm_tensors()}  # read as they lie
        plain = (
            type(t) in (Tensor, nn.Parameter)
            and t.is_cpu
            and (id(t) not in norms or (t.dtype is torch.float32 and t.is_contiguous()))
            for t in tensors
            if t is not None
        )
        if not all(plain):
            return None
        mark = Mark(*tensors)
        prepared = [None if step.weights is None else self._prepare(step, quads) for step in self.steps]
        if any(
            one is None and step.weights is not None for one, step in zip(prepared, self.steps, strict=True)
        ):
            return None
        capsule = self._make(prepared)
        self._made = now, mark, capsule, prepared, tensors  # which the capsule reads
        return capsule

    def _prepare(self, step: Step, quads: tuple[bool, ...]) -> Prepared | None:
        weights, channels, value = step.weights, self._channels[step.out], step.inputs[0]
        g, conv, activation = weights.geometry, weights.conv, weights.activation
        weight = (
            torch.ones(channels, 1, 1, 1) if conv is None else _as_kernel(conv)
        )  # by ones, depthwise: each row
        bias = None if conv is None else conv._parameters["bias"]
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
            affine = weights.affine(channels)
            return Prepared(weight, bias, g, setup, activation, *affine, pointwise, as_quads)

        if conv is None or weights.scale is not None:
            return make()
        eps, tensors = (0.0, ()) if weights.norm is None else (weights.norm.eps, tensors_of(weights.norm))
        return kept.get((eps, *key_of(g, pointwise, activation, as_quads)), make, weight, bias, *tensors)

    def _make(self, prepared: list):
        number, last = self.number, {}
        for i, step in enumerate(self.steps):
            last.update(dict.fromkeys((*step.inputs, step.out), i))
        steps = []
        for i, (step, one) in enumerate(zip(self.steps, prepared, strict=True)):
            freed = [number[v] for v, at in last.items() if at == i and v not in self.outputs]
            geometry = step.geometry if step.kind in _WINDOWS else None
            inputs = [number[v] for v in step.inputs]
            vectors = (*(0 if t is None else t.data_ptr() for t in step.norm_tensors() or (None, None)),)
            vectors += (0.0 if step.layer_norm is None else step.layer_norm.eps,)
            steps.append((step.kind, inputs, number[step.out], one, geometry, freed, step.channels, vectors))
        values = [(self.slots[size], self._channels[v]) for v, size in self._sizes.items()]
        ends = [[number[v] for v in these] for these in (self.sequence.inputs, self.outputs)]
        return sequence(values, *ends, steps)


def _as_kernel(conv: nn.Module) -> Tensor:
    """``[O, C/groups, kh, kw]``, of a Linear too."""
    weight = conv._parameters["weight"]
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _each(channels: int) -> ConvGeometry:
    """The geometry of a depthwise 1x1 convolution, which takes each row by itself."""
    return ConvGeometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, channels, 0)
