"""One rule for staleness: whether a traced module still does what its trace says.

A trace holds for the modules that it went through, the values that their forwards read, and the layers that it stands
for. It is stale as soon as one of these changes: a child or class that is replaced, a hook, a parametrisation, a
forward that is set on an instance or a class, an attribute or global that a forward read, a stride. The training flag
is one only where a forward reads it, in a trace of eval mode alone: layers look at theirs in each call.
"""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as _module

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(_module).items()
    if name.startswith("_global_")
    and name.endswith("_hooks")
    # called where a parameter or module is set; an export has one
    and "registration" not in name
)
DATA = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_SCALARS = (
    *(*DATA, bytes, type, enum.Enum, range, slice),
    *(types.BuiltinFunctionType, types.ModuleType, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)
_DICTS = (dict, OrderedDict, defaultdict, types.MappingProxyType)
METHOD = "a method of its class"  # in the place of a picture
_MOST_ITEMS = 1000
_BASE = frozenset(nn.Module().__dict__)  # what every module has
# Of a layer: what its parameters say too, and what it looks at in each call.
_LIVE = {
    "num_features",
    "affine",
    "momentum",
    "track_running_stats",
    "transposed",
}


class Opaque(Exception):
    """A value whose changes cannot be seen; the text says what it is."""


def frozen(value: Any, room: list[int] | None = None) -> Any:
    """A picture of ``value`` that equals a later one if nothing in it changed. A scalar is its own picture.

    Raises:
        Opaque: a value with state that cannot be compared: a tensor, a random generator, an iterator.
    """
    room = [_MOST_ITEMS] if room is None else room
    room[0] -= 1
    if room[0] < 0:
        raise Opaque(f"more than {_MOST_ITEMS} values")
    kind = type(value)
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, types.FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        if value.__closure__ or not all(isinstance(default, _SCALARS) for default in defaults):
            raise Opaque("a function that holds values")
        return value
    if isinstance(value, tuple) or kind in (list, set, frozenset, deque):
        return (kind, *[frozen(item, room) for item in value])
    if kind in _DICTS:
        return (kind, *[(frozen(key, room), frozen(item, room)) for key, item in value.items()])
    if kind is functools.partial:
        return (kind, *[frozen(part, room) for part in (value.func, value.args, value.keywords)])
    plain = kind.__new__ is object.__new__ and not any(vars(base).get("__slots__") for base in kind.__mro__)
    if isinstance(value, (torch.Tensor, nn.Module)) or not (plain or kind is types.SimpleNamespace):
        raise Opaque(f"a {kind.__name__}")
    return (kind, frozen(vars(value), room))


def changed(value: Any, picture: Any) -> bool:
    """True for a ``value`` that is no longer what :func:`frozen` made ``picture`` of."""
    try:
        return frozen(value) != picture
    except Opaque:  # something else was put into it
        return True


def is_scalar(picture: Any) -> bool:
    """True for a picture that is the value itself."""
    return not isinstance(picture, tuple)


def hooked(module: nn.Module) -> bool:
    """True for a module whose call does more than the forward of its class, or something else."""
    state = module.__dict__
    return (
        any(state[kind] for kind in HOOKS)
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
        or "parametrizations" in state["_modules"]
    )


def signature(module: nn.Module, path: str) -> tuple:
    """``(path, name of the class, names of the children)``, which a copy of a traced module must have too."""
    inner = module.get_submodule(path)
    # copies have classes of other names, and the same code
    is_graph = isinstance(inner, torch.fx.GraphModule)
    return path, inner.code if is_graph else own_class(type(inner)).__name__, tuple(inner._modules)


def signatures(module: nn.Module) -> tuple[tuple, ...]:
    """The signature of every module inside of ``module``."""
    return tuple(signature(module, path) for path, _ in module.named_modules())


def own_class(kind: type) -> type:
    """The class that a converted module had, or ``kind`` itself."""
    return vars(kind).get("_dynops_base", kind)


class Watch:
    """A picture of all that the trace of ``module`` depends on.

    Args:
        trace: a :class:`~dynops.stack.trace.Trace`.
        hooks: whether a hook of an inner module makes it stale.
    """

    def __init__(self, module: nn.Module, trace, hooks: bool = True):
        self.methods, self.pictures, self.inherited = {"forward"}, [], []
        try:  # a copy may have become another module than the one that was traced
            self.valid = all(signature(module, known[0]) == known for known in trace.modules)
            every = list(dict.fromkeys(module.get_submodule(path) for path, *_ in trace.modules))
            watched = self._forwards(module, trace, every) + self._reads(module, trace.reads)
        except (AttributeError, KeyError, StopIteration):
            self.valid, every, watched = False, [], []
        self.modules, self.classes = every, [type(m) for m in every]
        self.states = [m.__dict__ for m in every]
        self.sizes = [len(state) for state in self.states]
        self.children = [m._modules for m in every]
        self.then = [dict(children) for children in self.children]
        self.hooks = _GLOBAL_HOOKS if hooks else ()
        self.hooks += tuple(m.__dict__[kind] for m in every if hooks and m is not module for kind in HOOKS)
        self.watched, self.checks = watched, by_space(watched)

    def _forwards(self, module: nn.Module, trace, every: list[nn.Module]) -> list[tuple]:
        """The forwards that were traced, and the settings of the layers that were not: ``(dict, name, value)``."""
        inner = {module.get_submodule(path) for path in trace.inlined}
        kinds = dict.fromkeys(_defining(type(m), "forward") for m in every if m in inner)
        watched = [(vars(kind), "forward", vars(kind)["forward"]) for kind in kinds]
        if trace.only_eval:
            watched += [(m.__dict__, "training", False) for m in every if m in inner]
        for m in every:
            if m not in inner:
                watched += [(m.__dict__, name, value) for name, value in settings_of(m)]
        return watched

    def _reads(self, module: nn.Module, reads: tuple) -> list[tuple]:
        """As :meth:`_forwards`, of what forwards read. Containers and attributes of classes are kept apart."""
        watched = []
        for where, name, picture in reads:
            of_module = not isinstance(where, tuple)
            space = module.get_submodule(where) if of_module else sys.modules[where[0]].__dict__
            if picture == METHOD:
                kind = _defining(type(space), name)
                watched.append((vars(kind), name, vars(kind)[name]))
                self.methods.add(name)
            elif not is_scalar(picture):
                self.pictures.append((space, name, picture))
            elif of_module and name not in space.__dict__:
                self.inherited.append((space, name, picture))
            else:
                watched.append((space.__dict__ if of_module else space, name, picture))
        return watched

    def holds(self) -> bool:
        """True as long as nothing has changed."""
        if not self.valid or any(self.hooks):
            return False
        if is_compiling():
            return self._holds_in_a_graph()
        try:
            return (
                self.children == self.then
                and [*map(type, self.modules)] == self.classes
                and ([*map(len, self.states)] == self.sizes or self._has_no_forward())
                and self._has_its_settings()
                and all(getattr(space, name) == value for space, name, value in self.inherited)
                and all(_picture(space, name) == picture for space, name, picture in self.pictures)
            )
        except Exception:  # an attribute that is gone, or is a tensor now
            return False

    def _holds_in_a_graph(self) -> bool:
        """:meth:`holds` in terms that Dynamo traces, and so guards: a change compiles anew."""
        for children, then in zip(self.children, self.then, strict=True):
            for name, child in then.items():
                if children.get(name) is not child:
                    return False
        for state in self.states:
            for name in self.methods:
                if name in state:
                    return False
        for space, name, value in self.watched:
            if name not in space or space[name] != value:
                return False
        for space, name, value in self.inherited:
            if getattr(space, name) != value:
                return False
        for space, name, picture in self.pictures:
            if not _is_flat(picture):  # Dynamo does not trace what makes a picture
                return False
            if [type(value := _value(space, name)), *value] != [*picture]:
                return False
        return True

    def _has_its_settings(self) -> bool:
        for get, space, value in self.checks:  # noqa: SIM110  (all() takes half as long again)
            if get(space) != value:
                return False
        return True

    def _has_no_forward(self) -> bool:
        """True where the attributes that came since the last look are no methods."""
        if any(name in state for state in self.states for name in self.methods):
            return False
        self.sizes = [len(state) for state in self.states]
        return True


def by_space(watched: list[tuple]) -> list[tuple]:
    """``(getter, space, value or values)`` for each dict in which something is watched: one call for all its names."""
    names: dict[int, tuple] = {}
    for space, name, value in watched:
        _, found = names.setdefault(id(space), (space, {}))
        found[name] = value
    return [
        (
            operator.itemgetter(*found),
            space,
            tuple(found.values()) if len(found) > 1 else next(iter(found.values())),
        )
        for space, found in names.values()
    ]


def _defining(kind: type, name: str) -> type:
    """The class that defines a method of modules of class ``kind``."""
    return next(base for base in own_class(kind).__mro__ if name in vars(base))


def settings_of(layer: nn.Module):
    """The attributes of a layer that its steps were made for."""
    for name, value in layer.__dict__.items():
        seen = name not in _BASE and name not in _LIVE and not name.startswith("_")
        if seen and isinstance(value, (*_SCALARS, tuple)):
            yield name, value


def _value(space: Any, name: str) -> Any:
    return space[name] if isinstance(space, dict) else getattr(space, name)


def _picture(space: Any, name: str) -> Any:
    return frozen(_value(space, name))


def _is_flat(picture: tuple) -> bool:
    """True for the picture of a list or tuple of scalars."""
    return picture[0] in (list, tuple) and all(map(is_scalar, picture[1:]))
