"""A stack: the layers of a traced module over numbered values."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from torch import nn

from .activations import fused_name
from .layers import Call, GlobalPool, Layer, ZeroPad, layer_of
from .sequences import Sequence, parts_of
from .staleness import Watch, signature, signatures
from .trace import Step, Trace, Untraceable, dense_type, fuse, trace
from .tracing.simplify import without_copies, without_permutes

KINDS = {
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.BatchNorm2d: "norm",
    nn.MaxPool2d: "pool",
    nn.AvgPool2d: "pool",
    nn.Upsample: "layer",
    nn.PixelShuffle: "layer",
    nn.ZeroPad2d: "layer",
}


class Stack(NamedTuple):
    """Layers in the order in which they run. Values are numbered; 0 is the input."""

    layers: tuple[Layer, ...]
    values: int  # how many
    output: int
    checked: tuple[Layer, ...] = ()  # layers that do not run, but must be in eval mode
    multiple: tuple[int, int] = (1, 1)  # of the distance of blocks, so that every value's are whole pixels
    watch: Watch | None = None  # what it holds for
    known: dict | None = None  # parts, by the kinds of the inputs

    def parts(self, kinds: tuple[str, ...]) -> tuple[Layer | Sequence, ...]:
        """The layers, with those that run in one call together.

        Args:
            kinds: of each input: "rows", "map" or "vector".
        """
        if kinds not in self.known:
            self.known[kinds] = parts_of(self.layers, self.output, kinds)
        return self.known[kinds]

    @property
    def packs(self) -> bool:
        """True where all of it can run on rows."""
        return all(layer.packs for layer in self.layers)


class Whole(nn.Module):
    """A module as the root of a trace, so that it may be a single layer."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def stack_of(steps: Trace, module: nn.Module) -> Stack:
    """All layers of a trace of ``module``, whatever they read."""
    return _made(_layers(steps.steps, module), steps.values, steps.output)


def local_stack_of(module: nn.Module) -> Stack:
    """The layers that compute ``module``'s output, each of which can compute a part of it from a part of its input.

    Dropouts, which do nothing in eval mode, are only checked.

    Raises:
        TypeError: a layer that reads more than a neighbourhood, by name; a module that torch.fx cannot trace.
    """
    whole = Whole(module)
    kinds = {m: KINDS[kind] for m in module.modules() if (kind := dense_type(m)) in KINDS}
    try:
        steps = trace(whole, kinds, whole=True)
    except Untraceable as reason:
        raise TypeError(f"module: expected one that can be traced; {reason}") from None
    dropouts = _layers([step for step in steps.steps if step.kind == "dropout"], whole)
    kept, output = without_permutes(*without_copies(steps.steps, steps.output), whole)
    layers = _layers(kept, whole)
    for layer in layers:
        if layer.refusal:
            raise TypeError(layer.refusal)
    layers = _that_count(layers, output)
    of_pixels = [step.target for step in kept if step.kind == "per_pixel" and ":" not in step.target]
    modules = (*steps.modules, *(signature(whole, path) for path in dict.fromkeys(of_pixels)))
    watch = Watch(whole, steps._replace(modules=modules), hooks=False)
    return _made(layers, steps.values, output, tuple(dropouts), _multiple(layers, output), watch)


def chain_of(module: nn.Module, names: list[tuple[str, str, nn.Module]]) -> Stack:
    """The stack of modules that run one after the other.

    Args:
        names: kind (of a step), path in ``module``, and module.
    """
    steps = []
    for value, (kind, name, layer) in enumerate(names):
        activation = fused_name(layer) if kind == "act" else ""
        args = ("module",) if kind == "act" else ()
        steps.append(Step(kind, name, (value,), value + 1, args, activation=activation))
    watch = Watch(module, Trace("", tuple(steps), 0, 0, modules=signatures(module)), hooks=False)
    return _made(
        _layers(fuse(tuple(steps), len(steps)), module), len(steps) + 1, len(steps), (), (1, 1), watch
    )


def _layers(steps, module: nn.Module) -> list[Layer]:
    parameters = {step.out: step.target for step in steps if step.kind == "attr"}
    return [layer_of(step, module, parameters) for step in steps if step.kind != "attr"]


def _made(layers: list[Layer], values: int, output: int, *rest) -> Stack:
    """Notes at each layer which values nobody reads after it, and which convolutions a call alone follows."""
    layers = _sizes_first(layers)
    seen = {output}
    for layer in reversed(layers):
        layer.free = tuple({v for v in (*layer.inputs, layer.out) if v not in seen})
        seen.update(layer.free)
    for layer in layers:
        if layer.out == output:
            continue
        readers = [reader for reader in layers if layer.out in reader.inputs]
        if layer.conv is not None and layer.is_bare:
            layer.waits = len(readers) == 1 and type(readers[0]) is Call and not readers[0].joins
        elif type(layer) in (GlobalPool, ZeroPad):
            layer.feeds_convs = all(reader.conv is not None for reader in readers)
    return Stack(tuple(layers), values, output, *rest)._replace(known={})


def _sizes_first(layers: list[Layer]) -> list[Layer]:
    """Puts what reads sizes of the input first: between layers it would part sequences."""
    known, first = {0}, []
    for layer in layers:
        if type(layer) is Call and layer.moves and known.issuperset(layer.inputs):
            known.add(layer.out)
            first.append(layer)
    return [*first, *(layer for layer in layers if layer not in first)]


def _that_count(layers: list[Layer], output: int) -> list[Layer]:
    """The layers that the output is computed from."""
    needed, kept = {output}, []
    for layer in reversed(layers):
        if layer.out in needed:
            needed.update(layer.inputs)
            kept.append(layer)
    if 0 not in needed:
        raise TypeError("module: expected an output that is computed from the input")
    return kept[::-1]


def _multiple(layers: list[Layer], output: int) -> tuple[int, int]:
    """The smallest distance of output blocks at which those of every value are whole pixels apart."""
    ratios = {output: (Fraction(1), Fraction(1))}  # pixels of each value for one of the output
    for layer in reversed(layers):
        for value, reach in zip(layer.inputs, layer.reaches, strict=False):
            ratio = tuple(ratios[layer.out][i] * reach[i].ratio for i in (0, 1))
            if ratios.setdefault(value, ratio) != ratio:
                raise TypeError(f"{layer.name}: expected maps of one resolution where two paths meet")
    return tuple(math.lcm(*(ratio[i].denominator for ratio in ratios.values())) for i in (0, 1))
