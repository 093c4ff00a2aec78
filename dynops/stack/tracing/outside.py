"""The globals, closures, defaults and attributes of classes that forwards may read or write.

They are found by the names in the code of a function, of the functions that it calls, and of those that they call.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import random
import sys
import types

import torch
from torch import nn

from ..staleness import Opaque, changed, frozen

_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "dynops"}


class Outside:
    """Watches what the forwards of ``module`` may read, while they are recorded.

    Attributes:
        reads: ``{((module,), name): picture}`` of globals.
    """

    def __init__(self, module: nn.Module):
        self.modules = set(map(id, module.modules()))
        self.reads: dict[tuple, object] = {}
        self._seen: set = set()
        self._before: list[tuple] = []  # a value's place, the value, its shallow copy and its picture

    def look(self, function, kind: type) -> None:
        """Notes what ``function``, of a module of class ``kind``, may read.

        Raises:
            Opaque: something that a graph cannot hold.
        """
        compiled = hasattr(function, "_torchdynamo_orig_callable") and not hasattr(
            function, "_torchdynamo_disable"
        )
        if compiled and (function.__module__ or "").partition(".")[0] not in _FOREIGN:
            raise Opaque("calls a compiled function")
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType) or (function.__code__, kind) in self._seen:
            return
        self._seen.add((function.__code__, kind))
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return
        (names, attributes), space = _names(function.__code__), function.__globals__
        if "__class__" in attributes or ("type" in names and "type" not in space):
            raise Opaque("calls type() or reads __class__")
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._note(None, "a default", default)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._value(cell, name, _content(cell), attributes, kind)
        for name in names & space.keys():
            self._value(space, name, space[name], attributes, kind)
        for name in attributes:
            if isinstance(method := inspect.getattr_static(kind, name, None), types.FunctionType):
                self.look(method, kind)

    def _value(self, space, name: str, value, attributes: frozenset[str], kind: type) -> None:
        if isinstance(value, types.FunctionType):
            self.look(value, kind)
        elif isinstance(value, (types.ModuleType, type)):
            root = (value.__name__ if isinstance(value, types.ModuleType) else value.__module__).partition(
                "."
            )[0]
            if root in _FOREIGN:
                return
            for inner in attributes & vars(value).keys():
                attribute = vars(value)[inner]
                if isinstance(attribute, types.FunctionType):
                    self.look(attribute, kind)
                else:
                    self._note(value, inner, attribute)
        else:
            self._note(space, name, value)

    def _note(self, space, name: str, value) -> None:
        if isinstance(value, nn.Module) and any(id(m) in self.modules for m in value.modules()):
            raise Opaque(f"reaches a module by {name!r}, past its parent")
        stateful = hasattr(type(value), "__next__") or type(value).__module__.startswith("numpy.random")
        if stateful or isinstance(value, (random.Random, torch.Generator)):
            raise Opaque(f"reads {name!r}, a {type(value).__name__}")
        try:
            picture = frozen(value)
        except Opaque:
            if isinstance(value, (list, dict, set)):
                self._before.append((space, name, value, copy.copy(value), None))
            return
        mutable = isinstance(picture, tuple)
        self._before.append((space, name, value, copy.deepcopy(value) if mutable else value, picture))
        if isinstance(space, types.ModuleType):
            self.reads[(space.__name__,), name] = picture
        elif isinstance(space, dict) and sys.modules.get(space.get("__name__")) is not None:
            self.reads[(space["__name__"],), name] = picture

    def check(self) -> None:
        """Undoes what a forward has written since :meth:`look`, and raises Opaque for it."""
        written = None
        for space, name, value, before, picture in self._before:
            if _same(value, before, picture) and (space is None or _at(space, name) is value):
                continue
            written = name
            if isinstance(value, (list, set, dict)) and not _same(value, before, picture):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)
            elif hasattr(value, "__dict__") and not isinstance(value, type) and picture is not value:
                vars(value).update(vars(before))
            _put(space, name, value)
        if written is not None:
            raise Opaque(f"writes {written!r}, which lies outside of its module")


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names of globals and of attributes in a function and in those that it defines."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.endswith(("_GLOBAL", "_NAME")):
            names.add(instruction.argval)
        elif instruction.opname.endswith(("_ATTR", "_METHOD")):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_attributes = _names(constant)
            names |= inner_names
            attributes |= inner_attributes
    return frozenset(names), frozenset(attributes)


def _content(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _same(value, before, picture) -> bool:
    if picture is not None or value is None:
        return not changed(value, picture)
    if len(value) != len(before):
        return False
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, before, strict=True))
    return all(key in before for key in value) and (
        isinstance(value, set) or all(before[key] is item for key, item in value.items())
    )


def _at(space, name: str):
    if isinstance(space, types.CellType):
        return _content(space)
    return space.get(name) if isinstance(space, dict) else vars(space).get(name)


def _put(space, name: str, value) -> None:
    if isinstance(space, types.CellType):
        space.cell_contents = value
    elif isinstance(space, dict):
        space[name] = value
    elif space is not None:
        setattr(space, name, value)
