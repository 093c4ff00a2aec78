"""A module's forward as a list of steps on packed rows: traced with torch.fx, fused, plain data.

``trace(module, kinds)`` records what the forward does, as one :class:`Step` for each convolution with
the norm, residual sum and activation that follow it, and one for everything else. Steps name modules
by their path and functions by their qualified name, so that they pickle and hold for any copy of the
module. ``dynops.stack.graph`` makes layers of them; ``dynops.stack.staleness`` tells until when they hold.
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

from .activations import ZERO_PRESERVING, activation_type, fused_name, is_norm_act
from .staleness import signature
from .tracing import outputs
from .tracing.fusion import fuse
from .tracing.leaves import DROPOUTS, leaves_of, outside_of
from .tracing.recording import Recorder, Untraceable, opaque

_ADDS = (operator.add, operator.iadd, torch.add)
_INPLACE = {operator.imul: operator.mul, operator.isub: operator.sub, operator.itruediv: operator.truediv}
_ADD_METHODS = ("add", "add_")
_DROPS_OF_PATHS = ("StochasticDepth", "DropPath")  # torchvision's, timm's: nothing in eval mode

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
_FRESH = (
    "conv",
    "norm",
    "pool",
    "layer",
    "act",
    "add",
)  # steps whose result shares no memory with another value
_FRESH_MODULES = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
)
_FRESH_CALLS = {
    "add",
    "sub",
    "mul",
    "truediv",
    "cat",
    "concat",
    "matmul",
    "linear",
    "conv2d",
    "batch_norm",
    "interpolate",
    "clone",
}
_METHODS = {"relu": (torch.relu, False), "relu_": (torch.relu, True), "tanh": (torch.tanh, False)}


def dense_type(module: nn.Module) -> type:
    """The class of the torch layer whose pixels ``module`` computes; of other modules their own."""
    return vars(type(module)).get("pixels_of", type(module))


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
    scope: str = ""  # the path of the module whose forward makes the call


class Trace(NamedTuple):
    """The steps of a forward, and what they hold for: see ``staleness.Watch``."""

    input_names: tuple[str, ...]  # values 0, 1, ... are these
    steps: tuple[Step, ...]
    values: int
    output: int
    inlined: tuple[str, ...] = ()  # the paths of the modules whose forwards ran
    modules: tuple[tuple, ...] = ()  # the signatures of these and of the layers that steps stand for
    reads: tuple[tuple, ...] = ()  # (path, name, picture) of each attribute that a forward read
    called: tuple[str, ...] = ()  # the paths of modules that are called, as their forwards cannot be traced
    only_eval: bool = False  # it holds in eval mode alone


# -------------------------------------------------------------------------------- torch.fx


def trace(
    module: nn.Module, kinds: dict[nn.Module, str], whole: bool = False, known: frozenset | set = frozenset()
) -> Trace:
    """The steps of ``module.forward``.

    Args:
        module: any module; its forward is run on stand-ins, in training and in eval mode.
        kinds: the modules inside it that are converted, each with "conv", "norm" or "pool".
        whole: looks into every module that is not torch's own, also where it holds nothing to convert.
        known: modules inside it whose forwards cannot be traced.

    A module inside it whose forward cannot be traced, or that has hooks, is one step, which calls it. With ``whole``
    it is an error, and hooks are left to who runs the steps.

    Raises:
        Untraceable: control flow that depends on the data, in-place changes, modes of its own, random numbers, or side
            effects; with ``whole`` more than one input or output. Where the training flag makes the difference, the
            trace holds in eval mode alone.
    """
    leaves, called = leaves_of(module, kinds, whole), set()
    if not whole:
        called |= {path for path, m in module.named_modules() if path and (m in known or opaque(m))}
    while True:
        try:
            return _trace(module, kinds, whole, leaves, called)
        except Untraceable as reason:
            if whole or not reason.path or reason.path in called:
                raise
            called.add(reason.path)


def _trace(module: nn.Module, kinds, whole: bool, leaves: set[str], called: set[str]) -> Trace:
    def make(recorder: Recorder) -> tuple:
        return _Steps(module, kinds, called, whole).make(recorder)

    recorders = [Recorder(module, leaves | called, training) for training in (False, True)]
    made, only_eval = make(recorders[0]), False
    try:
        only_eval = make(recorders[1]) != made
    except Untraceable:
        if whole:
            raise
        only_eval = True
    if only_eval:  # does its caller's mode make the difference?
        recorders[1] = Recorder(module, leaves | called, False, modes=True)
        if whole or make(recorders[1]) != made:
            raise Untraceable(
                "its forward differs between training and eval mode, or by the mode of its caller"
            )
    input_names, steps, values, output = made
    if not whole and not any(step.kind == "conv" or _is_call_of(step, module, kinds) for step in steps):
        raise Untraceable("its forward calls no converted convolution outside of unfused modules")
    if any(step.kind == "attr" and step.out == output for step in steps):
        raise Untraceable("its output is a parameter")
    inlined = tuple(dict.fromkeys(path for recorder in recorders for path in recorder.inlined))
    layers = dict.fromkeys(path for step in steps for path in _layers_of(step, module))
    outer = outside_of(module, leaves | called)  # lists of modules too
    modules = tuple(signature(module, path) for path in dict.fromkeys((*inlined, *outer, *layers)))
    reads = {key: picture for recorder in recorders for key, picture in recorder.reads.items()}
    return Trace(
        input_names,
        tuple(fuse(steps, output)),
        values,
        output,
        inlined,
        modules,
        tuple((*key, picture) for key, picture in reads.items()),
        tuple(sorted(called)),
        only_eval,
    )


def _is_call_of(step: Step, module: nn.Module, kinds: dict[nn.Module, str]) -> bool:
    """True for a call of a convolution that makes its own weight."""
    return step.kind == "module" and kinds.get(module.get_submodule(step.target)) == "call"


def _layers_of(step: Step, module: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that a step stands for, rather than calls."""
    if step.kind not in ("conv", "norm", "pool", "layer", "act", "dropout") or step.args == ("function",):
        return ()
    inner = module.get_submodule(step.target)
    if step.kind == "norm" and is_norm_act(inner):
        return (step.target, *(f"{step.target}.{name}" for name in inner._modules))
    return (step.target,)


class _Steps:
    """Turns fx nodes into steps. A node that changes a value in place gives it a new number."""

    def __init__(self, module: nn.Module, kinds: dict[nn.Module, str], called: set[str], whole: bool):
        self.module, self.kinds, self.called, self.whole = module, kinds, called, whole
        self.groups: dict[int, set[int]] = {}  # of each value: those that may share memory with it
        self.order: dict[fx.Node, int] = {}
        self.number: dict[fx.Node, int] = {}
        self.steps: list[Step] = []
        self.inputs: set[int] = set()
        self.values = 0

    def make(self, recorder: Recorder) -> tuple[tuple[str, ...], tuple[Step, ...], int, int]:
        output, nodes = None, list(recorder.record().nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        for node in nodes:
            try:
                if node.op == "placeholder":
                    self.number[node] = self.new()
                    self.inputs.add(self.number[node])
                elif node.op == "output":
                    output = self._output(node)
                else:
                    getattr(self, "_" + node.op)(node)
            except Untraceable as reason:
                reason.path = node.meta["scope"]
                raise
        if output is None:
            raise Untraceable("its output is not one tensor")
        return recorder.input_names, tuple(self.steps), self.values, output

    def _output(self, node: fx.Node) -> int | None:
        """The number of the output; a last step joins several."""
        leaves, spec = node.args[0], node.meta["spec"]
        if spec is None or self.whole:
            return self.operand(leaves)
        refs = tuple(Ref(self.number[leaf]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
        inputs = dict.fromkeys(ref.value for ref in refs if type(ref) is Ref)
        self.emit(node, "function", outputs.NAME, tuple(inputs), args=(refs, spec))
        return self.number[node]

    def new(self) -> int:
        self.values += 1
        return self.values - 1

    def operand(self, argument) -> int | None:
        return self.number[argument] if isinstance(argument, fx.Node) else None

    def map_of(self, argument) -> int | None:
        """As :meth:`operand`; None for a parameter too, which no layer reads as its map."""
        of_parameter = isinstance(argument, fx.Node) and argument.op == "get_attr"
        return None if of_parameter else self.operand(argument)

    def emit(self, node: fx.Node, kind: str, target: str, inputs: tuple, inplace=False, **fields) -> None:
        out = self.new()
        self.steps.append(Step(kind, target, inputs, out, scope=node.meta["scope"], **fields))
        new = not inplace and (kind in _FRESH or self._makes_new(kind, target))
        group = (
            {out}
            if new
            else {out}.union(*[self.groups.get(v, {v}) for v in (inputs[:1] if inplace else inputs)])
        )
        self.groups.update(dict.fromkeys(group, group))
        if inplace:
            old = inputs[0]
            self._check_unseen(node, old, group)
            for other, value in self.number.items():
                if value == old:
                    self.number[other] = out
        self.number[node] = out

    def _check_unseen(self, node: fx.Node, old: int, group: set[int]) -> None:
        """Raises Untraceable where another value than ``old`` shows what ``node`` writes into it."""
        if not self.inputs.isdisjoint(group) and not self.whole:
            raise Untraceable("it changes its input in place")
        for other, value in self.number.items():
            seen = (
                value in group
                and value != old
                and any(self.order[user] > self.order[node] for user in other.users)
            )
            if seen or (value in group and other.op == "get_attr"):
                raise Untraceable(f"{node} works in place")

    def _makes_new(self, kind: str, target: str) -> bool:
        """True for a call whose result shares no memory with another value."""
        if kind == "module":
            return isinstance(self.module.get_submodule(target), _FRESH_MODULES)
        return kind in ("function", "method") and target.rpartition(":")[2] in _FRESH_CALLS

    def emit_call(self, node: fx.Node, kind: str, target: str, inplace: bool = False) -> None:
        """Anything that runs on dense tensors as it stands."""
        inputs: list[int] = []

        def refer(n: fx.Node) -> Ref:
            inputs.append(self.number[n])
            return Ref(self.number[n])

        args = fx.node.map_arg(node.args, refer)
        kwargs = fx.node.map_arg(dict(node.kwargs), refer)
        numbers = tuple(dict.fromkeys(inputs))
        self.emit(node, kind, target, numbers, inplace, args=tuple(args), kwargs=tuple(kwargs.items()))

    def _get_attr(self, node: fx.Node) -> None:
        self.emit(node, "attr", node.target, ())

    def _call_module(self, node: fx.Node) -> None:
        module = self.module.get_submodule(node.target)
        arguments = (*node.args, *node.kwargs.values())
        x = self.map_of(arguments[0]) if len(arguments) == 1 else None
        inplace = getattr(module, "inplace", False)
        if node.target in self.called or self.kinds.get(module) == "call":
            self.emit_call(node, "module", node.target)
        elif x is not None and type(module) is nn.Identity:
            self.number[node] = x
        elif x is not None and module in self.kinds:
            self.emit(node, self.kinds[module], node.target, (x,))
            if is_norm_act(module):
                self._act(node, module.act, f"{node.target}.act")
        elif x is not None and activation_type(module) in ZERO_PRESERVING:
            self._act(node, module, node.target, x, inplace)
        elif x is not None and (type(module) in DROPOUTS or type(module).__name__ in _DROPS_OF_PATHS):
            self.emit(node, "dropout", node.target, (x,), inplace)
        elif inplace:
            raise Untraceable(f"{node.target} works in place")
        else:
            self.emit_call(node, "module", node.target)

    def _act(self, node: fx.Node, module: nn.Module, path: str, x: int | None = None, inplace=False) -> None:
        """An activation of a value, or of what the node has made so far."""
        x = self.number[node] if x is None else x
        if type(module) is not nn.Identity:
            fused = fused_name(module)
            self.emit(node, "act", path, (x,), inplace, activation=fused, args=("module",))

    def _call_function(self, node: fx.Node) -> None:
        function, args = node.target, node.args
        operands = [self.operand(a) for a in args]
        arguments = _bound(function, args, node.kwargs)
        inplace = bool(arguments.pop("inplace", False))
        if function in _ADDS and len(args) == 2 and not node.kwargs and None not in operands:
            self.emit(node, "add", "", tuple(operands), function is operator.iadd)
        elif function in _FUNCTIONS and args and self.map_of(args[0]) is not None:
            extra = dict(list(arguments.items())[1:]) if arguments else dict(node.kwargs)
            name = _FUNCTIONS[function]
            if function is F.gelu and extra.pop("approximate", "none") == "tanh":
                name = "gelu_tanh"
            fields = {"activation": name, "args": ("function",), "kwargs": tuple(extra.items())}
            self.emit(node, "act", _name_of(function), (operands[0],), inplace, **fields)
        elif function in _INPLACE and operands[0] is not None and isinstance(args[1], (int, float)):
            self.emit_call(node, "function", _name_of(_INPLACE[function]), inplace=True)
        elif inplace or node.kwargs.get("out") is not None or _works_in_place(function):
            raise Untraceable(f"{function.__name__} works in place")
        else:
            self.emit_call(node, "function", _name_of(function))

    def _call_method(self, node: fx.Node) -> None:
        name, operands = node.target, [self.operand(a) for a in node.args]
        if name in _ADD_METHODS and len(operands) == 2 and not node.kwargs and None not in operands:
            self.emit(node, "add", "", tuple(operands), name == "add_")
        elif name in _METHODS and len(operands) == 1 and self.map_of(node.args[0]) is not None:
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
