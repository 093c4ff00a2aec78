"""Runs a traced module (``dynops.stack.trace``) on packed rows, inside ``with dynops.active(mask):``.

A value is a dense tensor or :class:`Rows`. Convolutions, norms and pools make rows at the active
plan of their resolution; sums and activations of rows are rows; everything else gets dense tensors,
zero outside the plan. What a module computes is decided once, when a :class:`Program` is bound to
it; a call does the arithmetic and little else.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import active
from ..modes import autocast_dtype
from ..ops.epilogue import ACTIVATIONS
from ..ops.pixels.rows import gather_pixels, in_format, in_format_of, scatter_pixels
from ..plans import PixelPlan
from .module_geometry import conv_geometry, conv_transpose_geometry
from .norm import norm_rows
from .run_rows import FusedConv
from .trace import Ref, Step, Trace, find

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MAX_SIZES = 64  # input sizes whose geometry a step keeps


class Rows(NamedTuple):
    """A map that is zero outside a plan, as its rows there."""

    values: Tensor  # [P, C]
    plan: PixelPlan


def _dense(value):
    return scatter_pixels(value.values, value.plan) if type(value) is Rows else value


def _rows_at(value, plan: PixelPlan, channels: int) -> Tensor | None:
    """``value`` as rows of ``plan``, or None where it is a map of another size (to be broadcast)."""
    if type(value) is Rows:
        return value.values if value.plan is plan and value.values.shape[1] == channels else None
    n, h, w = plan.shape
    if isinstance(value, Tensor) and value.shape == (n, channels, h, w):
        return gather_pixels(value, plan)
    return None


def _add(a, b):
    """The sum of two values: rows where one of them is rows and the other has its size."""
    if type(a) is not Rows and type(b) is not Rows:
        return operator.add(a, b)
    rows, other = (a, b) if type(a) is Rows else (b, a)
    values = _rows_at(other, rows.plan, rows.values.shape[1])
    return _dense(a) + _dense(b) if values is None else Rows(rows.values + values, rows.plan)


# ------------------------------------------------------------------------------------- steps


class _Conv:
    """A convolution with the norm, residual sum and activation after it: one call of the op."""

    def __init__(self, step: Step, module: nn.Module):
        self.x, self.out, self.free = step.inputs[0], step.out, step.free
        self.residual, self.activation = step.residual, step.activation
        self.conv = module.get_submodule(step.target)
        self.norm = None if step.norm is None else module.get_submodule(step.norm)
        self.fused = FusedConv(self.conv, self.norm, step.activation)
        self.pads = None
        if self.conv.padding_mode != "zeros":
            self.pads = self.conv._reversed_padding_repeated_twice
        self.sizes: dict = {}

    def run(self, env: list, active: active, autocast: torch.dtype | None) -> Rows | Tensor:
        values, in_plan, shape = self._input(env)
        geometry, out_shape = self.sizes.get(shape) or self._size(shape)
        plan = active.plan(out_shape, values.device)
        residual = None
        if self.residual is not None:
            residual = _rows_at(env[self.residual], plan, self.conv.out_channels)
            if residual is None:
                plain = FusedConv(self.conv, None, "")
                rows = plain(values, in_plan, plan, geometry, autocast)
                return self._then_broadcast(env, rows, plan)
        return Rows(self.fused(values, in_plan, plan, geometry, autocast, residual), plan)

    def _input(self, env: list) -> tuple[Tensor, PixelPlan | None, tuple[int, int, int]]:
        """The input as rows and their plan, or a dense map and None; and its (N, H, W)."""
        x = env[self.x]
        if type(x) is Rows and self.pads is None:
            values, in_plan = x
            return values, in_plan, in_plan.shape
        values = _dense(x)
        if values.dim() != 4:
            raise ValueError(f"x: expected [N, C, H, W], got shape {tuple(values.shape)}")
        values = env[self.x] = in_format(values, torch.channels_last)  # once for all readers
        if self.pads is not None:
            values = F.pad(values, self.pads, mode=self.conv.padding_mode)
        self.fused.check(values)
        return values, None, (values.shape[0], values.shape[2], values.shape[3])

    def _size(self, shape: tuple[int, int, int]) -> tuple:
        if isinstance(self.conv, nn.ConvTranspose2d):
            geometry = conv_transpose_geometry(self.conv, shape)
        else:
            geometry = conv_geometry(self.conv, shape, padded=self.pads is not None)
        entry = geometry, geometry.out_shape
        if not torch.compiler.is_compiling():
            if len(self.sizes) >= _MAX_SIZES:
                self.sizes.clear()
            self.sizes[shape] = entry
        return entry

    def _then_broadcast(self, env, rows: Tensor, plan: PixelPlan) -> Tensor:
        """The norm, and the sum with a map of another size, which is dense."""
        if self.norm is not None:
            rows = norm_rows(self.norm, rows, plan)
        out = scatter_pixels(rows, plan) + _dense(env[self.residual])
        return ACTIVATIONS[self.activation](out)


class _Norm:
    """A norm that no convolution precedes, with the sum and activation after it."""

    def __init__(self, step: Step, module: nn.Module):
        self.x, self.residual, self.activation = step.inputs[0], step.residual, step.activation
        self.out, self.free = step.out, step.free
        self.norm = module.get_submodule(step.target)

    def run(self, env: list, active: active, autocast) -> Rows | Tensor:
        x = env[self.x]
        if type(x) is not Rows:
            self.norm._check_input_dim(x)
            plan = active.plan((x.shape[0], x.shape[2], x.shape[3]), x.device)
            x = Rows(gather_pixels(x, plan), plan)
        values, plan = x
        if self.residual is None:
            return Rows(norm_rows(self.norm, values, plan, None, self.activation), plan)
        residual = _rows_at(env[self.residual], plan, values.shape[1])
        if residual is not None:
            return Rows(norm_rows(self.norm, values, plan, residual, self.activation), plan)
        out = scatter_pixels(norm_rows(self.norm, values, plan), plan) + _dense(env[self.residual])
        return ACTIVATIONS[self.activation](out)


class _Pool:
    def __init__(self, step: Step, module: nn.Module):
        self.x, self.out, self.free = step.inputs[0], step.out, step.free
        self.pool = module.get_submodule(step.target)
        self.forward = self.pool.pixels_of.forward

    def run(self, env: list, active: active, autocast) -> Rows:
        out = self.forward(self.pool, _dense(env[self.x]))
        plan = active.plan((out.shape[0], out.shape[2], out.shape[3]), out.device)
        return Rows(gather_pixels(out, plan), plan)


class _Activation:
    def __init__(self, step: Step, module: nn.Module):
        self.x, self.out, self.free = step.inputs[0], step.out, step.free
        self.kwargs = dict(step.kwargs)
        self.copies = False
        if step.activation:
            self.function, self.kwargs = ACTIVATIONS[step.activation], {}
        elif step.args == ("module",):
            self.function = module.get_submodule(step.target)
            self.copies = getattr(self.function, "inplace", False)  # the value may have other readers
        else:
            self.function = find(step.target)

    def run(self, env: list, active: active, autocast) -> Rows | Tensor:
        x = env[self.x]
        values = x.values if type(x) is Rows else x
        values = self.function(values.clone() if self.copies else values, **self.kwargs)
        return Rows(values, x.plan) if type(x) is Rows else values


class _Add:
    def __init__(self, step: Step, module: nn.Module):
        self.a, self.b = step.inputs
        self.out, self.free = step.out, step.free

    def run(self, env: list, active: active, autocast) -> Rows | Tensor:
        return _add(env[self.a], env[self.b])


class _Dropout:
    """nn.Dropout on rows; the others (whole channels) only pass through in eval mode, and else run dense."""

    def __init__(self, step: Step, module: nn.Module):
        self.x, self.out, self.free = step.inputs[0], step.out, step.free
        self.dropout = module.get_submodule(step.target)

    def run(self, env: list, active: active, autocast) -> Rows | Tensor:
        x, dropout = env[self.x], self.dropout
        if not dropout.training:
            return x
        if type(x) is Rows and type(dropout) is nn.Dropout:
            return Rows(F.dropout(x.values, dropout.p, True), x.plan)
        function = F.dropout if type(dropout) is nn.Dropout else F.dropout2d
        return function(_dense(x), dropout.p, True)


class _Call:
    """Anything else, on dense tensors."""

    def __init__(self, step: Step, module: nn.Module):
        self.out, self.free = step.out, step.free
        self.kind, self.target, self.module = step.kind, step.target, module
        self.args, self.kwargs = step.args, dict(step.kwargs)
        if step.kind == "function":
            self.function = find(step.target)

    def run(self, env: list, active: active, autocast):
        if self.kind == "attr":
            return operator.attrgetter(self.target)(self.module)
        args = _filled(self.args, env)
        kwargs = _filled(self.kwargs, env)
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        function = self.function if self.kind == "function" else self.module.get_submodule(self.target)
        return function(*args, **kwargs)


def _filled(value, env: list):
    """Recorded arguments with the values in their places."""
    if isinstance(value, Ref):
        return _dense(env[value.value])
    if isinstance(value, tuple):
        return tuple([_filled(v, env) for v in value])
    if isinstance(value, list):
        return [_filled(v, env) for v in value]
    if isinstance(value, dict):
        return {k: _filled(v, env) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_filled(value.start, env), _filled(value.stop, env), _filled(value.step, env))
    return value


_STEPS = {"conv": _Conv, "norm": _Norm, "pool": _Pool, "act": _Activation, "add": _Add, "dropout": _Dropout}

# ----------------------------------------------------------------------------------- program


class Program:
    """A trace bound to one module. In a copy (deepcopy, pickle) it is None, until the copy binds its own."""

    def __init__(self, trace: Trace, module: nn.Module):
        self.module = module
        self.values, self.output = trace.values, trace.output
        self.steps = tuple(_STEPS.get(step.kind, _Call)(step, module) for step in trace.steps)
        self.links, self.hooks = _watch(trace, module)

    def __reduce__(self):
        return _unbound, ()

    def holds(self) -> bool:
        """Whether the steps still say what the module would do: the same modules, and no hooks in them."""
        for modules, name, module in self.links:
            if modules.get(name) is not module:
                return False
        return not any(self.hooks)

    def run(self, x: Tensor, active: active) -> Tensor:
        """``module.forward(x)`` under the mask of ``active``."""
        autocast = autocast_dtype(x)
        env: list = [None] * self.values
        env[0] = x
        for step in self.steps:
            env[step.out] = step.run(env, active, autocast)
            for value in step.free:
                env[value] = None
        out = _dense(env[self.output])
        if isinstance(out, Tensor) and out.dim() == 4:
            return in_format_of(out, x)
        return out


def _unbound() -> None:
    return None


def _watch(trace: Trace, module: nn.Module) -> tuple[tuple, tuple]:
    """The places of the modules that the steps stand for, and the hooks of those that are not called."""
    links, hooks = {}, []
    for step in trace.steps:
        if step.kind in _STEPS and step.kind != "add" and step.args != ("function",):
            paths = [step.target] + ([step.norm] if step.norm else [])
        else:
            paths = [step.target.rpartition(".")[0]] if step.kind == "module" else []
        for path in paths:
            parent = module
            for name in path.split(".") if path else ():
                child = parent._modules[name]
                if (id(parent), name) not in links:
                    links[id(parent), name] = (parent._modules, name, child)
                    hooks.extend(getattr(child, kind) for kind in _HOOKS)
                parent = child
    return tuple(links.values()), tuple(hooks)
