"""From a module to the layers that run on blocks (``nn.layers``): its trace, read step by step.

What cannot run on blocks raises TypeError here, with the name of the layer or call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from torch import nn

from .activations import ELEMENTWISE
from .layers import (
    Activation,
    Add,
    AvgPool,
    Call,
    Conv,
    Dropout,
    Layer,
    MaxPool,
    Norm,
    Upsample,
    called,
    place,
)
from .trace import Ref, Step, Untraceable, dense_type, trace

KINDS = {
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.BatchNorm2d: "norm",
    nn.MaxPool2d: "pool",
    nn.AvgPool2d: "pool",
}

# elementwise with finite gradients everywhere: what lies outside the map may be anything
_CALLS = {
    f"{module}:{name}"
    for module, names in {
        "operator": "add sub mul neg abs",
        "torch": "add sub subtract mul multiply neg abs clamp sigmoid maximum minimum square",
        "torch.nn.functional": "sigmoid hardtanh hardsigmoid softplus logsigmoid softsign",
    }.items()
    for name in names.split()
}
_METHODS = ("add", "sub", "mul", "neg", "abs", "clamp", "sigmoid", "square")
_COPIES = ("contiguous", "clone")
_DIVISIONS = ("operator:truediv", "torch:div", "div")
_CATS = ("torch:cat", "torch:concat", "torch:concatenate")


class Stack(NamedTuple):
    """A module as layers. Values are numbered; 0 is the input."""

    layers: tuple[Layer, ...]
    dropouts: tuple[Dropout, ...]
    output: int
    multiple: tuple[int, int]  # of what blocks must lie apart, so that every value's blocks are whole pixels


class Whole(nn.Module):
    """A module as the root of a trace, so that it may be a single layer."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def layers_of(module: nn.Module) -> Stack:
    """The layers that compute ``module``'s output from its input.

    Raises:
        TypeError: a layer that cannot run on blocks, by name; a module that torch.fx cannot trace.
    """
    whole = Whole(module)
    kinds = {m: KINDS[kind] for m in module.modules() if (kind := dense_type(m)) in KINDS}
    try:
        steps = trace(whole, kinds, whole=True)
    except Untraceable as reason:
        raise TypeError(f"module: expected one that can be traced; {reason}") from None
    steps, output = _without_copies(steps.steps, steps.output)
    dropouts = tuple(Dropout(step.target, whole) for step in steps if step.kind == "dropout")
    parameters = {step.out: step.target for step in steps if step.kind == "attr"}
    layers = [_layer(step, whole, parameters) for step in steps if step.kind not in ("attr", "dropout")]
    needed, kept = {output}, []
    for layer in reversed(layers):
        if layer.out in needed:
            needed.update(layer.inputs)
            kept.append(layer)
    if 0 not in needed:
        raise TypeError("module: expected an output that is computed from the input")
    layers = tuple(reversed(kept))
    return Stack(layers, dropouts, output, _multiple(layers, output))


def _without_copies(steps: tuple[Step, ...], output: int) -> tuple[list[Step], int]:
    """The steps, where what a dropout or a copy returns is the value that it got."""
    same: dict[int, int] = {}
    kept = []
    for step in steps:
        inputs = tuple(same.get(v, v) for v in step.inputs)
        residual = same.get(step.residual, step.residual)
        args, kwargs = _renamed((step.args, step.kwargs), same)
        step = step._replace(inputs=inputs, residual=residual, args=args, kwargs=kwargs)
        copies = step.kind == "dropout" or (step.kind == "method" and step.target in _COPIES)
        if copies:
            same[step.out] = inputs[0]
        if not copies or step.kind == "dropout":
            kept.append(step)
    return kept, same.get(output, output)


def _renamed(value, same: dict[int, int]):
    """Recorded arguments with other numbers of values."""
    if type(value) is Ref:
        return Ref(same.get(value.value, value.value))
    if isinstance(value, (tuple, list)):
        return tuple(_renamed(v, same) for v in value)
    return value


def _multiple(layers: tuple[Layer, ...], output: int) -> tuple[int, int]:
    """The smallest distance of output blocks at which those of every value are whole pixels apart."""
    ratios = {output: (Fraction(1), Fraction(1))}  # pixels of each value for one of the output
    for layer in reversed(layers):
        for value, reach in zip(layer.inputs, layer.reaches, strict=False):
            ratio = tuple(ratios[layer.out][i] * reach[i].ratio for i in (0, 1))
            if ratios.setdefault(value, ratio) != ratio:
                raise TypeError(f"{layer.name}: expected maps of one resolution where two paths meet")
    return tuple(math.lcm(*(ratio[i].denominator for ratio in ratios.values())) for i in (0, 1))


def _layer(step: Step, module: nn.Module, parameters: dict[int, str]) -> Layer:
    if step.kind == "conv":
        norm = None if step.norm is None else module.get_submodule(step.norm)
        return Conv(step, module.get_submodule(step.target), norm)
    if step.kind == "norm":
        return Norm(step, module.get_submodule(step.target))
    if step.kind == "act":
        return Activation(step, module)
    if step.kind == "add" and not any(v in parameters for v in step.inputs):
        return Add(step)
    if step.kind == "add":
        args = tuple(Ref(v) for v in step.inputs)
        return Call(step._replace(kind="function", target="operator:add", args=args), module, parameters)
    if step.kind in ("pool", "module"):
        return _module_layer(step, module.get_submodule(step.target), module)
    return _call_layer(step, module, parameters)


def _module_layer(step: Step, layer: nn.Module, module: nn.Module) -> Layer:
    name = place(step.target)
    if len(step.inputs) == 1:
        if isinstance(layer, nn.MaxPool2d):
            return MaxPool(name, step.inputs, step.out, layer)
        if isinstance(layer, nn.AvgPool2d):
            return AvgPool(name, step.inputs, step.out, layer)
        if isinstance(layer, nn.Upsample):
            return Upsample(name, step.inputs, step.out, layer)
        if type(layer) in ELEMENTWISE:
            return Activation(step, module)
    raise TypeError(
        f"{name}: expected a layer that reads a fixed neighbourhood (convolution with zero padding, BatchNorm2d, "
        f"pooling, Upsample, activation), got {layer}"
    )


def _call_layer(step: Step, module: nn.Module, parameters: dict[int, str]) -> Layer:
    as_module = _AS_MODULES.get(step.target)
    if as_module is not None and step.kind == "function" and len(step.inputs) == 1:
        return _module_layer_of_call(step, as_module)
    maps = [v for v in step.inputs if v not in parameters]
    if step.target in _CATS and _cats_channels(step) and len(maps) == len(step.inputs):
        return Call(step, module, parameters)
    known = step.target in (_METHODS if step.kind == "method" else _CALLS)
    divides = step.target in _DIVISIONS and maps == [getattr(step.args[0], "value", None)]
    if maps and (known or divides):
        return Call(step, module, parameters)
    raise TypeError(f"{called(step)}: expected a call that blocks can make, got {step.target}")


def _cats_channels(step: Step) -> bool:
    dim = dict(step.kwargs).get("dim", step.args[1] if len(step.args) > 1 else 0)
    return dim in (1, -3)


def _max_pool(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    pool = nn.MaxPool2d(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)
    return MaxPool, pool


def _avg_pool(
    kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    pool = nn.AvgPool2d(kernel_size, stride or None, padding, ceil_mode, count_include_pad, divisor_override)
    return AvgPool, pool


def _interpolate(
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    if antialias:
        raise TypeError("antialias=True")
    return Upsample, nn.Upsample(size, scale_factor, mode, align_corners)


_AS_MODULES = {
    "torch.nn.functional:max_pool2d": _max_pool,
    "torch:max_pool2d": _max_pool,
    "torch.nn.functional:avg_pool2d": _avg_pool,
    "torch.nn.functional:interpolate": _interpolate,
}


def _module_layer_of_call(step: Step, as_module: Callable) -> Layer:
    """The layer of a functional pool or interpolation."""
    kwargs = {k: v for k, v in step.kwargs if k != "input"}
    try:
        kind, module = as_module(*step.args[1:], **kwargs)
    except TypeError as error:
        raise TypeError(f"{called(step)}: expected arguments that blocks can take, got {error}") from None
    return kind(called(step), step.inputs, step.out, module)
