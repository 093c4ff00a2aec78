"""A module's forward recorded as a graph, on stand-ins for its modules.

A stand-in has the class of its module and hands out what the module holds: children as stand-ins, parameters and buffers
as proxies, containers as copies. The module itself is only read, so another thread may run it at the same time.
What a graph cannot hold raises :class:`Untraceable`, with the path of the module whose forward does it.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import inspect
import operator
import sys
import threading
import traceback
from collections import OrderedDict

import torch
from torch import Tensor, fx, nn

from ..staleness import DATA, METHOD, Opaque, changed, frozen, hooked, own_class
from .outputs import parted
from .outside import Outside
from .states import modes_now, modes_of, random_now, set_random

_STATE = "_dynops_stand_in"
_OWN = frozenset(nn.Module().__dict__) | {_STATE, "__dict__", "__class__"}
# of a tensor, but no tensors
_NUMBERS = {"size", "dim", "ndimension", "numel", "stride", "item", "tolist", "element_size", "get_device", "is_contiguous"}  # fmt: skip
_VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Untraceable(Exception):
    """A module cannot run as steps. The text gives the reason, ``path`` the module whose forward is the reason."""

    def __init__(self, reason: str, path: str = ""):
        super().__init__(reason)
        self.path = path
        self.of_forward = False  # whether the forward cannot be traced in any module around it either


class _Value(fx.Proxy):
    """A tensor of the graph, which ``isinstance`` takes for one in a user's code; see :func:`_tensors_seen`."""

    _is_param = False

    def _write(self, other, function):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__ = functools.partialmethod(_write, function=operator.iadd)  # else Python takes x + y for x += y
    __isub__ = functools.partialmethod(_write, function=operator.isub)
    __imul__ = functools.partialmethod(_write, function=operator.imul)
    __itruediv__ = functools.partialmethod(_write, function=operator.itruediv)
    __ipow__ = functools.partialmethod(_write, function=operator.ipow)


_COPIED = (dict, set, OrderedDict)  # hooks are in an OrderedDict
_isinstance = builtins.isinstance
_lock = threading.Lock()
_recordings = 0


def _instance(value, kinds) -> bool:
    """``isinstance``, to which a :class:`_Value` is a tensor, but for torch's own code.

    That would hand it to C++, which reads memory that is not there. So would a ``__class__`` of Tensor, of which C++ asks.
    """
    if type(value) is not _Value:
        return _isinstance(value, kinds)
    caller = sys._getframe(1).f_globals.get("__name__", "")
    return _isinstance(value, kinds) if caller.partition(".")[0] == "torch" else issubclass(Tensor, kinds)


@contextlib.contextmanager
def _tensors_seen():
    """Inside it, in every thread, ``isinstance`` is :func:`_instance`."""
    global _recordings
    with _lock:
        _recordings += 1
        builtins.isinstance = _instance
    try:
        yield
    finally:
        with _lock:
            _recordings -= 1
            if _recordings == 0:
                builtins.isinstance = _isinstance


class _StandIn:
    """A mixin for a module's class: it takes calls and reads to the recorder, and refuses writes.

    One without a state was made by a forward, as a slice of a ModuleList is. It is an ordinary module of stand-ins.
    """

    def __init_subclass__(cls, **options):  # not that of the user's class, which may register what it sees
        pass

    def __call__(self, *args, **kwargs):
        state = self.__dict__.get(_STATE)
        return super().__call__(*args, **kwargs) if state is None else state.call(args, kwargs)

    def __getattribute__(self, name):
        if name in _OWN:
            return super().__getattribute__(name)
        own = object.__getattribute__(self, "__dict__")
        state = own.get(_STATE)
        if name in own:
            return own[name] if state is None else state.read(name, own[name])
        value = super().__getattribute__(name)
        static = inspect.getattr_static(type(self), name, None)
        if state is None:
            return value
        if not hasattr(static, "__get__"):
            return state.read(name, value)
        if not (getattr(static, "__module__", None) or "torch").startswith("torch"):
            state.recorder.reads[state.path, name] = METHOD
        return value

    def __getattr__(self, name):
        value, state = super().__getattr__(name), self.__dict__.get(_STATE)
        return value if state is None or not isinstance(value, Tensor) else state.read(name, value)

    # their dtype, device and sizes would be constants of the graph
    def named_parameters(self, *args, **kwargs):
        self.__dict__[_STATE].fail("its forward goes through its parameters")

    named_buffers = state_dict = named_parameters

    def __setattr__(self, name, value):
        if _STATE not in self.__dict__:
            return super().__setattr__(name, value)
        self.__dict__[_STATE].fail(f"its forward writes its attribute {name!r}")

    def __delattr__(self, name):
        self.__dict__[_STATE].fail(f"its forward deletes its attribute {name!r}")


@functools.lru_cache(maxsize=512)
def _stand_in_class(kind: type[nn.Module]) -> type[nn.Module]:
    kind = own_class(kind)
    return type(kind)(kind.__name__, (_StandIn, kind), {"__module__": kind.__module__})


class _State:
    """The recorder, the module and the path of a stand-in."""

    def __init__(self, recorder: Recorder, module: nn.Module, path: str):
        self.recorder, self.module, self.path = recorder, module, path
        self.stand: nn.Module | None = None

    def call(self, args: tuple, kwargs: dict):
        return self.recorder.call(self, args, kwargs)

    def read(self, name: str, value):
        return self.recorder.read(self.path, name, value)

    def fail(self, reason: str):
        raise self.recorder.failure(reason, self.path)


class Recorder(fx.Tracer):
    """Records ``module.forward`` with one tensor as its argument.

    Args:
        leaves: paths of modules that are not looked into.
        training: the training flag that every module seems to have. In training mode gradients are off and
            autocast is on, in eval mode the other way round, so that a forward that sets either is seen.

    Attributes, after :meth:`record`:
        inlined: paths of the modules whose forward ran.
        reads: ``{(path, name): picture}``, the attributes that forwards read; see ``staleness.frozen``.
    """

    def __init__(self, module: nn.Module, leaves: set[str], training: bool, modes: bool | None = None):
        super().__init__()
        self.module, self.leaves, self.training = module, leaves, training
        self.modes = training if modes is None else modes
        self.graph = fx.Graph()
        self.inlined: list[str] = []
        self.reads: dict[tuple, object] = {}
        self._handed: dict[tuple[str, str], object] = {}
        self._scopes = [""]
        self._failure: Untraceable | None = None
        self._stands: dict[int, nn.Module] = {}
        self._outside = Outside(module)
        self.input_names: tuple[str, ...] = ()
        for path, inner in module.named_modules():
            self._stands[id(inner)] = self._stand_in(inner, path)
        for stand in self._stands.values():
            children = {name: self._stands.get(id(m)) for name, m in stand.__dict__["_modules"].items()}
            stand.__dict__["_modules"] = children
        self._before = [(stand, _flat(stand)) for stand in self._stands.values()]

    def _stand_in(self, module: nn.Module, path: str) -> nn.Module:
        stand = object.__new__(_stand_in_class(type(module)))
        state = dict(module.__dict__)  # at once, as another thread may run the module
        own = {key: copy.copy(value) if type(value) in _COPIED else value for key, value in state.items()}
        stand.__dict__.update(own, training=self.training, **{_STATE: _State(self, module, path)})
        return stand

    def record(self) -> fx.Graph:
        """The graph.

        Raises:
            Untraceable: what the forward does, and where.
        """
        root = self._stands[id(self.module)]
        names, first = self._inputs(root)
        with _tensors_seen(), modes_of(self.modes):
            self._modes, self._random = modes_now(), random_now()
            values = {name: self.create_proxy("placeholder", name, (), {}) for name in names}
            self.input_names = names
            args = (values.pop(names[0]),) if first else ()
            try:
                out = self.call(root.__dict__[_STATE], args, values)
            except Exception as error:
                # torch 2.11's checkpoint is a generator that its frame holds: closed, it takes its hooks back
                traceback.clear_frames(error.__traceback__)
                raise
            finally:  # what the forward wrote before it raised is undone too
                with contextlib.suppress(Opaque):
                    self._outside.check()
                if random_now() != self._random:
                    set_random(self._random)
        if self._failure is not None:  # a forward may have caught it
            raise self._failure
        self._check_writes()
        leaves, spec = parted(out)
        node = self.graph.create_node("output", "output", (self.create_arg(leaves),))
        node.meta.update(spec=spec, scope="")
        return self.graph

    def _inputs(self, root: nn.Module) -> tuple[tuple[str, ...], bool]:
        """The names of the arguments that a forward needs, and whether the first may be given by place."""
        if self.module.__dict__.get("forward") is not None or not _has_plain_call(self.module):
            raise Untraceable("a forward or __call__ of its own is set on it")
        parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
        needed = [
            p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not parameters or parameters[0].kind is parameters[0].VAR_KEYWORD:
            raise Untraceable("it has no input")
        if needed and needed[0] is not parameters[0]:
            raise Untraceable("its input is not its first argument")
        if any(p.kind is p.POSITIONAL_ONLY for p in needed[1:]):
            raise Untraceable("its inputs have no names")
        names = tuple(dict.fromkeys(p.name for p in (parameters[0], *needed)))
        return names, parameters[0].kind is not parameters[0].KEYWORD_ONLY

    # ------------------------------------------------------------------------- what forwards do

    def call(self, state: _State, args: tuple, kwargs: dict):
        self._check_modes()
        if state.path in self.leaves:
            return self.create_proxy("call_module", state.path, args, kwargs)
        stand = self._stands[id(state.module)]
        self._scopes.append(state.path)
        try:
            forward = type(stand).forward
            self._outside.look(forward, type(stand))
            if state.path not in self.inlined:
                self.inlined.append(state.path)
            out = forward(stand, *args, **kwargs)
            self._outside.check()
            self._check_modes()
            if random_now() != self._random:
                raise self.failure("its forward draws random numbers")
            return out
        except Untraceable:
            raise
        except Opaque as reason:
            raise self.failure(f"its forward {reason}") from None
        except Exception as error:  # user code run on proxies may raise anything
            text = str(error).strip()
            reason = text.splitlines()[0].partition(". ")[0] if text else type(error).__name__
            failure = self.failure(f"torch.fx: {reason}")
            # one that loops over its input may get a list, as decoders do
            failure.of_forward = "cannot be iterated" not in str(failure)
            raise failure from error
        finally:
            self._scopes.pop()

    def failure(self, reason: str, path: str | None = None) -> Untraceable:
        failure = Untraceable(reason, self._scopes[-1] if path is None else path)
        failure.of_forward = True
        self._failure = self._failure or failure
        return failure

    def read(self, path: str, name: str, value):
        """An attribute as a forward may have it: a copy of a container, a proxy of a tensor."""
        key = path, name
        if key in self._handed:
            return self._handed[key]
        if isinstance(value, Tensor):
            target = f"{path}.{name}" if path else name
            found = self.create_proxy("get_attr", target, (), {})
        elif isinstance(value, nn.Module):
            found = self._stands.get(id(value))
            if found is None:
                raise self.failure(f"its forward reads {name!r}, a module that is not registered")
        else:
            try:
                picture = frozen(value)
            except Opaque as kind:
                raise self.failure(f"its forward reads its attribute {name!r}, {kind}") from None
            self.reads[key] = picture
            found = value if picture is value else copy.deepcopy(value)
        self._handed[key] = found
        return found

    def _check_modes(self) -> None:
        if modes_now() != self._modes:
            raise self.failure("its forward sets no_grad, autocast, checkpointing or another mode of its own")

    def _check_writes(self) -> None:
        for (path, name), value in self._handed.items():
            if (path, name) in self.reads and changed(value, self.reads[path, name]):
                raise self.failure(f"its forward changes its attribute {name!r}", path)
        for stand, before in self._before:
            now = _flat(stand)
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in now):
                raise self.failure(
                    "its forward changes its modules or attributes", stand.__dict__[_STATE].path
                )
        self.reads.update(self._outside.reads)

    # --------------------------------------------------------------------------------- torch.fx

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None) -> fx.Node:
        if kind not in ("placeholder", "get_attr"):
            self._check_modes()
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["scope"] = self._scopes[-1]
        return node

    def create_arg(self, a):
        if isinstance(type(a), type) and issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, DATA) or a is Ellipsis:
            return a
        if type(a) in (tuple, list, torch.Size):
            items = [self.create_arg(item) for item in a]
            return items if type(a) is list else tuple(items)
        if type(a) is dict:
            return {key: self.create_arg(item) for key, item in a.items()}
        if type(a) is slice:
            return slice(*[self.create_arg(part) for part in (a.start, a.stop, a.step)])
        raise self.failure(
            f"its forward passes on a value of type {type(a).__name__}, which a trace cannot hold"
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self) if _is_tensor(node) else fx.Proxy(node, self)


def _is_tensor(node: fx.Node) -> bool:
    """True for a node that makes a tensor, as far as can be told: sizes and flags are none."""
    first = node.args[0] if node.args else None
    of_tensor = not isinstance(first, fx.Node) or first.meta.get("tensor", False)
    if node.op == "call_method":
        known = of_tensor and node.target not in _NUMBERS
    elif node.op == "call_function" and node.target is getattr:
        known = of_tensor and node.args[1] in _VIEWS
    elif node.op == "call_function" and node.target in (torch.numel, torch.is_floating_point):
        known = False
    elif node.op == "call_function" and not (getattr(node.target, "__module__", None) or "").startswith(
        "torch"
    ):
        known = any(n.meta.get("tensor", False) for n in node.all_input_nodes)
    else:
        known = True
    node.meta["tensor"] = known
    return known


def _flat(stand: nn.Module) -> dict:
    """The attributes of a stand-in, and what its own containers hold."""
    flat = {}
    for name, value in stand.__dict__.items():
        if name == _STATE:
            continue
        flat[name] = value
        if name in _OWN and isinstance(value, dict):
            flat |= {(name, key): item for key, item in value.items()}
    return flat


def _has_plain_call(module: nn.Module) -> bool:
    return type(module).__call__ is nn.Module.__call__ or isinstance(module, fx.GraphModule)


def opaque(module: nn.Module) -> bool:
    """True for a module that has to be called, as its forward is not all that runs."""
    return hooked(module) or not _has_plain_call(module) or isinstance(module, torch.jit.ScriptModule)
