"""A sequence of layers at the sizes of its inputs: the steps that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...geometry import ConvGeometry, conv_geometry
from ...kernels.cpu.engine import takes_winograd
from ...kernels.cpu.prepared import StepKind
from ..layers.base import Layer, Unjoinable
from ..layers.resample import resizing, through
from ..maps import Standardised
from ..staleness import hooked, settings_of
from . import moves
from .steps import Step, Weights, as_kernel, each


class Parted(Unjoinable):
    """The layer at ``position`` cannot join the others at these sizes."""

    def __init__(self, position: int):
        super().__init__(position)
        self.position = position


class Bound:
    """A sequence at the sizes of its inputs. The layers' ``join`` fill it.

    Args:
        inputs: ``((N, H, W), C)`` of each input that is rows, and those that are sizes themselves.
    """

    def __init__(self, sequence, inputs: tuple):
        self.sequence = sequence
        self.slots: dict[tuple, int] = {}  # of a size (N, H, W): its plan's place
        self.makers: list[tuple] = []  # of each: how the mask brings it there
        self._sizes: dict[int, tuple] = {}  # of each value that is rows
        self._channels: dict[int, int] = {}
        self._last: set[int] = set()  # values [N, H, W, C]
        self._moved: dict[int, object] = {}  # values that only move others' channels
        self._before: dict[int, tuple[int, ...]] = {}  # of each of these: what it is made of
        self._same: dict[int, int] = {}  # values that are others
        self._pads: dict[int, tuple[int, ConvGeometry]] = {}  # values that are others with zeros around
        self._roots: dict[tuple, int] = {}  # of (value, channels last): the rows that it is
        self.constants: dict[int, Layer] = {}  # values made of parameters alone
        self.steps: list[Step] = []
        self.tiled: dict[int, ConvGeometry] = {}  # the slots whose 3x3 convolutions may run as Winograd's
        self.called: list[tuple] = []  # children of modules on the way to those that layers call
        self.constant: list[Standardised] = []
        self.leaves: list[tuple] = []  # these, and their types
        self.settings: list[tuple] = []  # of these: (attributes, name, value)
        self.idle: list[nn.Module] = []  # dropouts, which do nothing in eval mode
        self._readers = Counter(v for layer in sequence.layers for v in layer.inputs)
        self._readers.update(sequence.outputs)
        for value, given in zip(sequence.inputs, inputs, strict=True):
            if moves.is_size(given):
                self._moved[value] = given
            else:
                self._place(value, *given, None, False)
        self.inputs = tuple(self._sizes)
        self.results: dict[int, object] = {}
        for i, layer in enumerate(sequence.layers):
            try:
                layer.join(self)
            except (Unjoinable, ValueError) as reason:  # a ValueError the layer raises too
                raise Parted(self._cause(layer, i)) from reason
        for i, layer in enumerate(sequence.layers):
            try:
                if layer.out in sequence.outputs:
                    self.results[layer.out] = self._result(layer.out)
            except Unjoinable as reason:
                raise Parted(i) from reason
        ends = dict.fromkeys(v for v in self.results.values() if type(v) is int and v not in self.inputs)
        self.outputs = tuple(ends)
        self.number = {value: i for i, value in enumerate(self._sizes)}

    def _cause(self, layer: Layer, position: int) -> int:
        """The position of the layer that made what ``layer`` cannot read; else its own."""
        for value in layer.inputs:
            if value in self._moved and moves.holds_maps(self._moved[value]) and not self.is_last(value):
                try:
                    self.rows(value)
                except Unjoinable:
                    return next(i for i, maker in enumerate(self.sequence.layers) if maker.out == value)
        return position

    # --------------------------------------------------------------------------------- by layers

    def step(
        self, kind: StepKind, layer: Layer, size: tuple, channels: int,
        geometry: ConvGeometry | None = None, ceil: bool = False, weights: Weights | None = None,
        inputs: tuple[int, ...] | None = None, layer_norm: nn.Module | None = None, out: int | None = None,
    ) -> None:  # fmt: skip
        """Adds a layer's step.

        Args:
            size, channels: of its output, whose mask ``use_mask.after(geometry, ceil)`` brings there.
            inputs: those of the layer, in another order.
            out: another value than the layer's.
        """
        inputs, out = layer.inputs if inputs is None else inputs, layer.out if out is None else out
        last = self.is_last(inputs[0])
        inputs = tuple(self.rows(v, last) for v in inputs)
        self._place(out, size, channels, geometry, ceil)
        if last:
            self._last.add(out)
        self.steps.append(Step(kind, inputs, out, weights, geometry, layer_norm=layer_norm))
        g, conv = (None, None) if weights is None else (weights.geometry, weights.conv)
        if conv is not None and takes_winograd(g, as_kernel(conv).shape, torch.float32):
            self.tiled[self.slots[size]] = g

    def multiply(
        self, layer: Layer, size: tuple, channels: int, geometry: ConvGeometry | None = None,
        conv: nn.Module | None = None, norm: nn.Module | None = None, activation: str = "",
    ) -> None:  # fmt: skip
        """Adds a layer's convolution; without ``conv`` what a norm or activation makes of each row by itself."""
        if conv is not None:
            first, *rest = layer.inputs
            first, pad = self._pads.get(first, (first, None))
            vector = next((v for v in rest if self._is_vector(v, size, channels)), None)
            activated = activation if vector is None else ""
            weights = Weights(geometry if pad is None else through(pad, geometry), conv, norm, activated)
            inputs, out = ((first, *rest), layer.out) if vector is None else ((first,), self._unnamed())
            self.step(StepKind.CONV, layer, size, channels, geometry, weights=weights, inputs=inputs, out=out)
            return None if vector is None else self._add_vector(layer, out, vector, activation)
        before = self._alone(layer.inputs[0]) if len(layer.inputs) == 1 else None
        found = None if before is None else before.weights
        bare = found is not None and found.norm is found.scale is None and len(before.inputs) == 1
        if found is not None and not found.activation and (norm is None or bare):
            found.activation, found.norm = activation, found.norm if norm is None else norm
            self._same[layer.out] = layer.inputs[0]
            return None
        weights = Weights(each(channels), None, norm, activation)
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
        found = scale()
        shape, at = found.shape, -1 if self.is_last(value) else -3
        if found.dtype is not torch.float32 or len(shape) > 4:
            raise Unjoinable
        if shape.numel() != 1 and (shape.numel() != channels or len(shape) < -at or shape[at] != channels):
            raise Unjoinable
        before = self._alone(value)
        if before is not None and before.kind is StepKind.CONV and len(before.inputs) == 1:
            found = before.weights
            if found.norm is None and found.scale is None and not found.activation:
                found.scale, found.scaled_by, found.scale_shape = scale, tensors, shape
                self._same[layer.out] = value
                return
        weights = Weights(each(channels), scale=scale, scaled_by=tensors, scale_shape=shape)
        self.step(StepKind.EACH, layer, size, channels, weights=weights, inputs=(value,))

    def add(self, layer: Layer, a: int, b: int) -> None:
        """Adds a sum: the residual of a convolution that nothing else reads, where the other value is there by then."""
        for one, other in ((a, b), (b, a)):
            if self._is_vector(other, self.size(one), self.channels(one)):
                return self._add_vector(layer, one, other, "")
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

    def _is_vector(self, value: int, size: tuple, channels: int) -> bool:
        """True for one pixel a sample beside a map of this size."""
        return size[1:] != (1, 1) and self.size(value) == (size[0], 1, 1) and self.channels(value) == channels

    def _add_vector(self, layer: Layer, value: int, vector: int, activation: str) -> None:
        """Adds the sum of a map and of one pixel a sample, and an activation."""
        size, channels = self.size(value), self.channels(value)
        out = self._unnamed() if activation else layer.out
        self.step(StepKind.SUM, layer, size, channels, inputs=(value, vector), out=out)
        if activation:
            weights = Weights(each(channels), activation=activation)
            self.step(StepKind.EACH, layer, size, channels, weights=weights, inputs=(out,))

    def _unnamed(self) -> int:
        """A value that is no layer's."""
        return -1 - len(self._sizes)

    def calls(self, module: nn.Module, path: str, inner: nn.Module) -> None:
        """Notes a module that its layer calls, which must stay where and as it is, and have no hooks."""
        if hooked(inner):
            raise Unjoinable
        names, parents = path.split("."), [module]
        for name in names[:-1]:
            parents.append(parents[-1]._modules[name])
        children = (*parents[1:], inner)
        self.called += [
            (p._modules, name, child) for p, name, child in zip(parents, names, children, strict=True)
        ]
        self.leaves.append((inner, type(inner)))
        # an eps is looked at in each call
        self.settings += [(vars(inner), *pair) for pair in settings_of(inner) if pair[0] != "eps"]

    def group_norm(self, layer: Layer, module: nn.Module, groups: int, activation: str = "") -> None:
        """Adds a GroupNorm or InstanceNorm2d over each sample's pixels of the mask, and an activation."""
        size, channels = self.same(layer.inputs)
        vectors = [v for v in module._parameters.values() if v is not None]
        if self.is_last(layer.inputs[0]) or channels % groups or any(v.numel() != channels for v in vectors):
            raise Unjoinable
        out = self._unnamed() if activation else layer.out
        self.step(StepKind.GROUP_NORM, layer, size, channels, layer_norm=module, out=out)
        self.steps[-1].channels = [groups]
        if activation:
            weights = Weights(each(channels), activation=activation)
            self.step(StepKind.EACH, layer, size, channels, weights=weights, inputs=(out,))

    def resize(self, layer: Layer, value: int, *arguments) -> None:
        """Adds an ``F.interpolate`` of a value with these arguments."""
        size, channels = self.same((value,))
        found = None if self.is_last(value) else resizing(size, *arguments)
        if found is None:
            raise Unjoinable
        out = found.geometry.out_shape
        self.step(found.kind, layer, out, channels, found.moves, inputs=(value,))
        self.steps[-1].geometry, self.steps[-1].linear = found.geometry, found.linear

    def known(self, value: int):
        """A value that is no map: sizes and numbers.

        Raises:
            Unjoinable: it is one.
        """
        found = self._moved.get(value)
        if found is None or moves.holds_maps(found):
            raise Unjoinable
        return found

    def move(self, layer: Layer, call: Callable, of_sizes: bool) -> None:
        """Adds a layer that only moves channels, or computes with sizes; ``of_sizes``: with these alone."""
        values = {v: self._tree(v) for v in layer.inputs}
        if of_sizes and any(map(moves.holds_maps, values.values())):
            raise Unjoinable
        self._moved[layer.out], self._before[layer.out] = moves.moved(call, values), layer.inputs

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
            made = self._unnamed()
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
            elif value in self._moved:
                root = getattr(self._moved[value], "root", None)
                if root is None or self.rows(value, self.is_last(value)) != root:
                    return None
                if len(self._before[value]) > 1:
                    return None
                value = self._before[value][0]
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
