"""Calls of functions, methods and modules as they were recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry
from ...kernels.cpu.prepared import StepKind
from ..activations import fused_name
from ..trace import Ref, Step, find
from .base import Layer, Rows, Unjoinable, called, mapped, place
from .named import computes_its_name, is_standardised, norms_channels, norms_last, permutes

# elementwise with finite gradients everywhere: what lies outside the map may be anything
_FUNCTIONS = {
    f"{module}:{name}"
    for module, names in {
        "operator": "add sub mul neg abs",
        "torch": "add sub subtract mul multiply neg abs clamp sigmoid maximum minimum square",
        "torch.nn.functional": "sigmoid hardtanh hardsigmoid softplus logsigmoid softsign",
    }.items()
    for name in names.split()
}
COPIES = ("contiguous", "clone")  # methods that return the value: no layer writes into rows
_METHODS = ("add", "sub", "mul", "neg", "abs", "clamp", "sigmoid", "square")
_DIVISIONS = ("operator:truediv", "torch:div", "div")
WITH_CHANNELS = ("operator:mul", "torch:mul", "operator:add", "torch:add")  # of [N, H, W, C] and [C]
_CATS = ("torch:cat", "torch:concat", "torch:concatenate")
# calls that only move channels or read sizes (..sequences.moves)
_MOVES = {
    *(
        "size",
        "chunk",
        "split",
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
    ),
    *("operator:getitem", "operator:floordiv", "builtins:getattr", "swapaxes", "torch:swapaxes"),
    *("torch:chunk", "torch:split", "torch:reshape", "torch:transpose", "torch:permute", "torch:flatten"),
}
_STEP_KINDS = {
    target: kind
    for kind, targets in {
        StepKind.PRODUCT: "operator:mul torch:mul torch:multiply mul",
        StepKind.SUM: "operator:add torch:add add",
        StepKind.SIGMOID: "torch:sigmoid torch.nn.functional:sigmoid sigmoid",
        StepKind.HARDSIGMOID: "torch.nn.functional:hardsigmoid",
    }.items()
    for target in targets.split()
}


class _Parameter(NamedTuple):
    """A parameter or buffer, where it stands among the arguments of a call."""

    path: str


class Call(Layer):
    """A call as it was recorded: on dense maps, and on parts of a map where it is elementwise or cat of channels."""

    def __init__(self, step: Step, module: nn.Module, parameters: dict[int, str]):
        maps = tuple(v for v in step.inputs if v not in parameters)
        super().__init__(place(step.target) if step.kind == "module" else called(step), maps, step.out)
        self.kind, self.target, self.module = step.kind, step.target, module
        self.function = find(step.target) if step.kind == "function" else None
        self.args, self.kwargs = _with_parameters((step.args, dict(step.kwargs)), parameters)
        self.paths = [parameters[value] for value in step.inputs if value in parameters]
        self.refusal = self._refuses(step)
        self.packs = self.refusal == ""
        self.cats = step.target in _CATS
        self.copies = step.kind == "method" and step.target in COPIES and bool(maps)
        plain = (
            self.packs
            and not self.paths
            and not self.kwargs
            and len(step.args) == len(step.inputs) == len(maps)
        )
        self.step_kind = StepKind.CAT if self.cats else _STEP_KINDS.get(step.target) if plain else None
        self.moves = (
            step.kind in ("function", "method") and step.target in _MOVES and not self.paths and bool(maps)
        )
        inner = (
            module.get_submodule(step.target)
            if step.kind == "module" and len(maps) == len(step.args) == 1
            else None
        )
        self.inner = (
            inner
            if type(inner) is nn.Linear or norms_channels(inner) or permutes(inner) or is_standardised(inner)
            else None
        )
        self.is_constant = bool(self.paths) and not maps and step.target in _MOVES
        one = len(maps) == 1 and len(step.args) == 2
        product = one and _STEP_KINDS.get(step.target) is StepKind.PRODUCT
        self.number = next((a for a in step.args if type(a) in (int, float)), None) if product else None
        divides = one and step.target in _DIVISIONS and type(step.args[1]) in (int, float)
        if divides and 1e-30 < abs(step.args[1]) < 1e30:  # whose reciprocal is a float32 number
            product, self.number = True, 1 / step.args[1]
        self.scales = product and (len(self.paths) == 1 or self.number is not None)
        self.resizes = step.target == "torch.nn.functional:interpolate" and not self.paths and bool(maps)
        joined = (self.step_kind is not None and self.packs) or self.resizes
        self.joins = joined or self.moves or self.is_constant or self.scales or self.inner is not None

    def join(self, bound) -> None:
        kind, inputs = self.step_kind, self.inputs
        if self.inner is not None:
            return self._join_module(bound)
        if self.is_constant:
            bound.constants[self.out] = self
            return None
        constant = next((bound.constants[v] for v in inputs if v in bound.constants), None)
        if self.scales or constant is not None:
            return self._join_scale(bound, constant)
        if self.moves:
            return bound.move(self, self._call, self.target == "operator:floordiv")
        if self.resizes:
            x, *sizes = inputs
            known = {v: bound.known(v) for v in sizes}
            args, kwargs = _filled((self.args, self.kwargs), {x: Ref(x), **known}, self.module, None)
            given = inspect.signature(F.interpolate).bind(*args, **kwargs)
            given.apply_defaults()
            read, *arguments = given.args
            if read != Ref(x):
                raise Unjoinable
            return bound.resize(self, x, *arguments)
        if kind is StepKind.CAT:
            order = self.args[0] if self.args else self.kwargs["tensors"]
            inputs = tuple(ref.value for ref in order)
            if len({bound.size(v) for v in inputs}) != 1:
                raise Unjoinable
            return bound.step(
                kind, self, bound.size(inputs[0]), sum(bound.channels(v) for v in inputs), inputs=inputs
            )
        if kind is StepKind.PRODUCT and len({bound.size(v) for v in inputs}) == 2:  # by one pixel a sample
            inputs = sorted(inputs, key=lambda v: bound.size(v), reverse=True)
            if bound.size(inputs[1])[1:] != (1, 1) or bound.channels(inputs[0]) != bound.channels(inputs[1]):
                raise Unjoinable
            size, channels = bound.size(inputs[0]), bound.channels(inputs[0])
            return bound.step(kind, self, size, channels, inputs=tuple(inputs))
        return bound.step(kind, self, *bound.same(inputs))

    def _join_module(self, bound) -> None:
        inner = self.inner
        bound.calls(self.module, self.target, inner)
        if norms_channels(inner) and not computes_its_name(inner):
            raise Unjoinable
        if type(inner) is nn.Linear:
            bound.linear(self, inner, inner.in_features, inner.out_features)
        elif is_standardised(inner):
            bound.standardised(self, inner, vars(type(inner))["_dynops_base"].forward)
        elif isinstance(inner, nn.GroupNorm):
            bound.calls(self.module, f"{self.target}.act", inner.act)
            bound.calls(self.module, f"{self.target}.drop", inner.drop)
            bound.group_norm(self, inner, inner.num_groups, fused_name(inner.act))
        elif permutes(inner):
            bound.move(self, self._call, False)
        else:
            kind = StepKind.LAYER_NORM if isinstance(inner, nn.LayerNorm) else StepKind.RESPONSE_NORM
            bound.norm(kind, self, inner, norms_last(inner))

    def _join_scale(self, bound, constant: Call | None) -> None:
        """A product of a map and a parameter, or of a reshaped parameter."""
        if constant is None and self.number is not None:
            number = float(self.number)
            return bound.scale(
                self, self.inputs[0], lambda: torch.tensor(number, dtype=torch.float32, device="cpu"), tuple
            )
        of, values = constant or self, [v for v in self.inputs if v not in bound.constants]
        if len(values) != 1 or self.step_kind not in (None, StepKind.PRODUCT):
            raise Unjoinable
        path = of.paths[0]
        tensor = attrgetter(path)
        scale = partial(tensor, of.module) if constant is None else partial(of._call, {})
        bound.scale(self, values[0], scale, lambda: (tensor(of.module),))

    def _refuses(self, step: Step) -> str:
        if not self.inputs:
            return f"{self.name}: expected a call that reads a map, got one of parameters"
        if step.kind == "module":
            return (
                f"{self.name}: expected a layer that reads a fixed neighbourhood (convolution with zero padding, "
                f"BatchNorm2d, pooling, Upsample, activation; LayerNorm and Linear between a permute to channels last and "
                f"the permute back), got {self.module.get_submodule(step.target)}"
            )
        cats = step.target in _CATS and _cats_channels(step) and len(self.inputs) == len(step.inputs)
        known = step.target in (_METHODS if step.kind == "method" else _FUNCTIONS)
        divides = step.target in _DIVISIONS and self.inputs == (getattr(step.args[0], "value", None),)
        if not (cats or known or divides):
            return f"{self.name}: expected a call that blocks can make, got {step.target}"
        return self._refuses_parameters()

    def _refuses_parameters(self) -> str:
        """Asked in each call too: another tensor may stand where one was traced."""
        for path in self.paths:
            shape = getattr(attrgetter(path)(self.module), "shape", ())
            if len(shape) > 4 or any(size != 1 for size in (*shape[-2:], *shape[:-3])):
                return (
                    f"{self.name}: expected {place(path)} of shape [C, 1, 1] or one value, got {tuple(shape)}"
                )
        return ""

    def check(self) -> None:
        if self.paths and self.packs and (refusal := self._refuses_parameters()):
            raise TypeError(refusal)

    def rows(self, run):
        if self.copies and (rows := run.rows_of(self.inputs[0])) is not None:
            return rows
        plan = None
        if run.maps and not (self.packs and run.share_rows(self.inputs)):
            return self._call({v: run.map(v) for v in self.inputs})
        if self.packs and not (self.paths and self._refuses_parameters()):
            plan, values = run.together(self)
        if plan is None:
            run.recorded.add(self.out)
            return run.masked_as(self, self._call({v: run.as_called(v) for v in self.inputs}))
        values = dict(zip(self.inputs, values, strict=True))
        if not self.cats:
            return Rows(self._call(values, _of_rows), plan)
        order = self.args[0] if self.args else self.kwargs["tensors"]
        return Rows(torch.cat([values[ref.value] for ref in order], 1), plan)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return self._call(dict(zip(self.inputs, inputs, strict=True)))

    def _call(self, values: dict, parameter: Callable | None = None):
        """The call with the values in their places; ``parameter`` is applied to each parameter."""

        args, kwargs = _filled((self.args, self.kwargs), values, self.module, parameter)
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        function = self.function or self.module.get_submodule(self.target)
        return function(*args, **kwargs)


class Outputs(Call):
    """The end of a forward with several outputs."""

    def rows(self, run):
        return self._call({v: run.as_returned(v) for v in self.inputs})


def _filled(value, values: dict, module: nn.Module, parameter: Callable | None):
    """Recorded arguments with values and parameters in their places.

    A function of its own: one that is nested and calls itself is a cycle, which keeps ``values`` until it is collected.
    """
    if type(value) is Ref:
        return values[value.value]
    if type(value) is _Parameter:
        found = attrgetter(value.path)(module)
        return found if parameter is None else parameter(found)
    return mapped(value, lambda inner: _filled(inner, values, module, parameter))


class PerPixel(Call):
    """A call over the channels of each pixel: a Linear, a LayerNorm or a product of a map ``[N, H, W, C]``."""

    def __init__(self, step: Step, module: nn.Module, parameters: dict[int, str]):
        kind = "function" if ":" in step.target else "module"
        super().__init__(step._replace(kind=kind), module, parameters)
        self.refusal = self._refuses_parameters()
        self.packs = self.refusal == ""

    def _refuses_parameters(self) -> str:
        for path in self.paths if self.target in WITH_CHANNELS else ():
            shape = tuple(getattr(attrgetter(path)(self.module), "shape", ()))
            if len(shape) > 1:
                return f"{self.name}: expected {place(path)} of shape [C] or one value, got {shape}"
        return ""

    def macs(self, in_shape: tuple[int, int, int]) -> float:
        inner = self.module.get_submodule(self.target) if self.kind == "module" else None
        return inner.in_features * inner.out_features if type(inner) is nn.Linear else 0.0

    def rows(self, run):
        x = self.inputs[0]
        plan = run.plan_like(x, self.out)
        return Rows(self._call({x: run.at(x, plan)}), plan)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return self._call({self.inputs[0]: inputs[0].permute(0, 2, 3, 1)}).permute(0, 3, 1, 2)


def _of_rows(parameter):
    """A parameter ``[C, 1, 1]`` or of one value, for rows ``[P, C]``."""
    return parameter.reshape(-1) if isinstance(parameter, Tensor) and parameter.dim() > 1 else parameter


def _cats_channels(step: Step) -> bool:
    dim = dict(step.kwargs).get("dim", step.args[1] if len(step.args) > 1 else 0)
    return dim in (1, -3)


def _with_parameters(value, parameters: dict[int, str]):
    """Recorded arguments with parameters named instead of referred to."""
    if type(value) is Ref:
        return _Parameter(parameters[value.value]) if value.value in parameters else value
    return mapped(value, lambda inner: _with_parameters(inner, parameters))
