"""A module's forward as a list of steps on packed rows: traced with torch.fx, fused, plain data.

``trace(module, kinds)`` records what the forward does, as one :class:`Step` for each convolution with
the norm, residual sum and activation that follow it, and one for everything else. Steps name modules
by their path and functions by their qualified name, so that they pickle and hold for any copy of the
module. ``dynops.stack.graph`` makes layers of them.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import ZERO_PRESERVING, fused_name

_ADDS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_DROPOUTS = (nn.Dropout, nn.Dropout2d)

# elementwise, f(0) = 0: they leave a masked map masked
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.leaky_relu: "",
    F.elu: "",
    F.selu: "",
    F.celu: "",
    F.mish: "",
    torch.tanh: "",
    F.tanh: "",
}
_METHODS = {"relu": (torch.relu, False), "relu_": (torch.relu, True), "tanh": (torch.tanh, False)}


def dense_type(module: nn.Module) -> type:
    """The class of the torch layer whose pixels ``module`` computes; of other modules their own."""
    return vars(type(module)).get("pixels_of", type(module))


class Untraceable(Exception):
    """Why a module cannot run as steps."""


@dataclass(frozen=True)
class Ref:
    """A value, where it stands among the arguments of a call."""

    value: int


class Step(NamedTuple):
    """One step. ``inputs`` and ``out`` number values; value 0 is the module's input."""

    kind: str  # conv norm pool act add dropout | module function method attr
    target: str  # the path of a module, the name of a function or method
    inputs: tuple[int, ...]
    out: int
    args: tuple = ()  # of a call, with Ref in the place of values
    kwargs: tuple = ()  # (name, value) pairs
    activation: str = ""  # act: the name an op knows it by; conv, norm: the fused one
    norm: str | None = None  # conv: the path of the norm that follows
    residual: int | None = None  # conv, norm: the value that is added before the activation
    free: tuple[int, ...] = ()  # values that no later step reads
    scope: str = ""  # the path of the module whose forward makes the call


class Trace(NamedTuple):
    input_name: str
    steps: tuple[Step, ...]
    values: int
    output: int


# -------------------------------------------------------------------------------- torch.fx


class _Tracer(fx.Tracer):
    """Looks into modules that hold something to convert; every other one is a leaf."""

    proxy_buffer_attributes = True  # so that a forward that updates a buffer cannot do so while it is traced

    def __init__(self, kinds: dict[nn.Module, str], whole: bool):
        super().__init__()
        self.kinds, self.whole = kinds, whole

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if self.whole:  # all but torch's own
            return module in self.kinds or super().is_leaf_module(module, qualified_name)
        return module in self.kinds or not any(m in self.kinds for m in module.modules())


def trace(module: nn.Module, kinds: dict[nn.Module, str], whole: bool = False) -> Trace:
    """The steps of ``module.forward``.

    Args:
        module: any module; its forward is run on fx proxies, in training and in eval mode.
        kinds: the modules inside it that are converted, each with "conv", "norm" or "pool".
        whole: looks into every module that is not torch's own, also where it holds nothing to convert.

    Raises:
        Untraceable: control flow that depends on the data or on the training flag, more than one
            input or output, in-place changes, or side effects.
    """
    recorded = [_record(module, kinds, training, whole) for training in (False, True)]
    if recorded[0] != recorded[1]:
        raise Untraceable("its forward differs between training and eval mode")
    input_name, steps, values, output = recorded[0]
    if not whole and not any(step.kind == "conv" for step in steps):
        raise Untraceable("its forward calls no converted convolution")
    if any(step.kind == "attr" and step.out == output for step in steps):
        raise Untraceable("its output is a parameter")
    return Trace(input_name, _free(fuse(steps, output), output), values, output)


def _record(module: nn.Module, kinds: dict[nn.Module, str], training: bool, whole: bool) -> tuple:
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        for m, _ in before:
            m.__dict__["training"] = training
        graph = _Tracer(kinds, whole).trace(module)
        changed = [m for m, state in before if _changed(m, {**state, "training": training})]
    except Exception as error:  # user code run on proxies may raise anything
        reason = str(error).strip().splitlines()
        raise Untraceable(f"torch.fx: {reason[0] if reason else type(error).__name__}") from error
    finally:
        for m, state in before:
            m.__dict__.clear()
            m.__dict__.update(state)
    if changed:
        raise Untraceable(f"its forward changes attributes of {type(changed[0]).__name__}")
    return _Recorder(module, kinds).record(graph)


def _changed(module: nn.Module, state: dict) -> bool:
    now = module.__dict__
    return len(now) != len(state) or any(now.get(key) is not value for key, value in state.items())


class _Recorder:
    """Turns fx nodes into steps. A node that changes a value in place gives it a new number."""

    def __init__(self, module: nn.Module, kinds: dict[nn.Module, str]):
        self.module, self.kinds = module, kinds
        self.number: dict[fx.Node, int] = {}
        self.steps: list[Step] = []
        self.values = 0
        self.input_name = ""

    def record(self, graph: fx.Graph) -> tuple[str, tuple[Step, ...], int, int]:
        output = None
        for node in graph.nodes:
            if node.op == "placeholder":
                if self.values:
                    raise Untraceable("it has more than one input")
                self.input_name = str(node.target)
                self.number[node] = self.new()
            elif node.op == "output":
                output = self.operand(node.args[0])
            else:
                getattr(self, "_" + node.op)(node)
        if output is None:
            raise Untraceable("its output is not one tensor")
        return self.input_name, tuple(self.steps), self.values, output

    def new(self) -> int:
        self.values += 1
        return self.values - 1

    def operand(self, argument) -> int | None:
        return self.number[argument] if isinstance(argument, fx.Node) else None

    def emit(self, node: fx.Node, kind: str, target: str, inputs: tuple, inplace=False, **fields) -> None:
        out = self.new()
        stack = list(node.meta.get("nn_module_stack", {}).values())
        scope = stack[-1][0] if stack else ""
        self.steps.append(Step(kind, target, inputs, out, scope=scope, **fields))
        if inplace:
            old = inputs[0]
            for other, value in self.number.items():
                if value == old:
                    self.number[other] = out
        self.number[node] = out

    def emit_call(self, node: fx.Node, kind: str, target: str) -> None:
        """Anything that runs on dense tensors as it stands."""
        inputs: list[int] = []

        def refer(n: fx.Node) -> Ref:
            inputs.append(self.number[n])
            return Ref(self.number[n])

        args = fx.node.map_arg(node.args, refer)
        kwargs = fx.node.map_arg(dict(node.kwargs), refer)
        self.emit(
            node, kind, target, tuple(dict.fromkeys(inputs)), args=tuple(args), kwargs=tuple(kwargs.items())
        )

    def _get_attr(self, node: fx.Node) -> None:
        self.emit(node, "attr", node.target, ())

    def _call_module(self, node: fx.Node) -> None:
        module = self.module.get_submodule(node.target)
        arguments = (*node.args, *node.kwargs.values())
        x = self.operand(arguments[0]) if len(arguments) == 1 else None
        inplace = getattr(module, "inplace", False)
        if x is not None and type(module) is nn.Identity:
            self.number[node] = x
        elif x is not None and module in self.kinds:
            self.emit(node, self.kinds[module], node.target, (x,))
        elif x is not None and type(module) in ZERO_PRESERVING:
            self.emit(
                node, "act", node.target, (x,), inplace, activation=fused_name(module), args=("module",)
            )
        elif x is not None and type(module) in _DROPOUTS:
            self.emit(node, "dropout", node.target, (x,), inplace)
        elif inplace:
            raise Untraceable(f"{node.target} works in place")
        else:
            self.emit_call(node, "module", node.target)

    def _call_function(self, node: fx.Node) -> None:
        function, args = node.target, node.args
        operands = [self.operand(a) for a in args]
        arguments = _bound(function, args, node.kwargs)
        inplace = bool(arguments.pop("inplace", False))
        if function in _ADDS and len(args) == 2 and not node.kwargs and None not in operands:
            self.emit(node, "add", "", tuple(operands), function is operator.iadd)
        elif function in _FUNCTIONS and operands[:1] != [None] and len(operands) >= 1:
            extra = dict(list(arguments.items())[1:]) if arguments else dict(node.kwargs)
            name = _FUNCTIONS[function]
            if function is F.gelu and extra.pop("approximate", "none") == "tanh":
                name = "gelu_tanh"
            fields = {"activation": name, "args": ("function",), "kwargs": tuple(extra.items())}
            self.emit(node, "act", _name_of(function), (operands[0],), inplace, **fields)
        elif inplace or "out" in node.kwargs or _works_in_place(function):
            raise Untraceable(f"{function.__name__} works in place")
        else:
            self.emit_call(node, "function", _name_of(function))

    def _call_method(self, node: fx.Node) -> None:
        name, operands = node.target, [self.operand(a) for a in node.args]
        if name in _ADD_METHODS and len(operands) == 2 and not node.kwargs and None not in operands:
            self.emit(node, "add", "", tuple(operands), name == "add_")
        elif name in _METHODS and len(operands) == 1:
            function, inplace = _METHODS[name]
            fields = {"activation": _FUNCTIONS[function], "args": ("function",)}
            self.emit(node, "act", _name_of(function), (operands[0],), inplace, **fields)
        elif name.endswith("_") and not name.endswith("__"):
            raise Untraceable(f"{name} works in place")
        else:
            self.emit_call(node, "method", name)


def _bound(function: Callable, args: tuple, kwargs: dict) -> dict:
    """The arguments by name; empty where the function has no signature (a builtin)."""
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {}


def _works_in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    if function is getattr(operator, name, None):
        return name == "setitem" or (name.startswith("i") and hasattr(operator, name[1:]))
    return name.endswith("_")


def _name_of(function: Callable) -> str:
    """A name that :func:`find` turns back into the function."""
    short = getattr(function, "__name__", "")
    for module in (
        "torch.nn.functional",
        "torch",
        "operator",
        "builtins",
        getattr(function, "__module__", None),
    ):
        name = f"{module}:{short}"
        if module and find(name) is function:
            return name
    raise Untraceable(f"{function} has no name to find it by")


def find(name: str) -> Callable | None:
    """The function of a ``module:name``."""
    module, _, short = name.partition(":")
    try:
        return getattr(importlib.import_module(module), short, None)
    except ImportError:
        return None


# ------------------------------------------------------------------------------------ fusion


def fuse(steps: tuple[Step, ...], output: int) -> list[Step]:
    """Gives each convolution (and each norm without one) the norm, sum and activation after it.

    A fused step stands where its last part stood, so that a residual is there when it runs.
    """
    readers: dict[int, list[int]] = {output: [-1]}
    for i, step in enumerate(steps):
        for value in step.inputs:
            readers.setdefault(value, []).append(i)
    constants = {step.out for step in steps if step.kind == "attr"}
    taken: set[int] = set()
    fused: dict[int, Step] = {}
    for i, step in enumerate(steps):
        if i in taken:
            continue
        if step.kind in ("conv", "norm"):
            step, i = _absorb(step, i, steps, readers, constants, taken)
        fused[i] = step
    return [fused[i] for i in sorted(fused)]


def _absorb(step: Step, i: int, steps, readers, constants: set[int], taken: set[int]) -> tuple[Step, int]:
    while (
        len(readers.get(step.out, ())) == 1
        and readers[step.out][0] >= 0
        and readers[step.out][0] not in taken
    ):
        j = readers[step.out][0]
        after = steps[j]
        if after.kind == "norm" and step.kind == "conv" and step.norm is None and step.residual is None:
            step = step._replace(norm=after.target, out=after.out)
        elif after.kind == "add" and step.residual is None and len(after.inputs) == 2:
            other = after.inputs[1] if after.inputs[0] == step.out else after.inputs[0]
            if other in constants:
                break
            step = step._replace(residual=other, inputs=(step.inputs[0], other), out=after.out)
        elif after.kind == "act" and after.activation:
            taken.add(j)
            return step._replace(activation=after.activation, out=after.out), j
        else:
            break
        taken.add(j)
        i = j
    return step, i


def _free(steps: list[Step], output: int) -> tuple[Step, ...]:
    """Notes at each step which values nobody reads after it."""
    seen = {output}
    result = []
    for step in reversed(steps):
        last = {v for v in (*step.inputs, step.out) if v not in seen}
        seen |= last
        result.append(step._replace(free=tuple(sorted(last))))
    return tuple(reversed(result))
