"""Scope: what holds inside a ``with`` block, for the code that the block encloses and for no other.

A thread begins with nothing. An asyncio task begins with what held where it was made, and keeps its own from
there on. A generator keeps its own too: what it entered holds while the generator runs, and not for its caller
while it waits at a ``yield``. The exception are generators that are context managers (``contextlib``, pytest's
fixtures): what they enter is meant for their caller.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

# by this name: Dynamo compiles a frame that names torch itself, and drops what it sets in a threading.local
from torch.compiler import is_compiling

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# modules that drive such generators
_MANAGERS = ("contextlib", "pluggy", "_pytest.", "pytest_asyncio", "anyio.")
_MANAGES = ("__enter__", "__exit__", "__aenter__", "__aexit__")


class _Entry(NamedTuple):
    value: Any
    owner: FrameType | None  # the generator that it belongs to


class _Traced(threading.local):
    def __init__(self):  # runs once in each thread; an attribute (not a class default) is what Dynamo guards
        self.entries: tuple[_Entry, ...] = ()


class Scope:
    """A stack of values. ``enter`` and ``leave`` are what a context manager's methods call."""

    def __init__(self, name: str):
        self._var: ContextVar[tuple[_Entry, ...]] = ContextVar(name)
        # Dynamo guards a property of a C function by its value; a call of ContextVar.get breaks the graph. Where
        # nothing is set, get returns its argument, which is an empty tuple too.
        self._eager = type("_Entries", (tuple,), {"now": property(self._var.get)})()
        self._traced = _Traced()  # what a compiled function entered: setting a ContextVar breaks the graph

    def enter(self, value) -> None:
        if is_compiling():
            self._traced.entries = (*self._traced.entries, _Entry(value, None))
        else:
            self._var.set((*self._eager.now, _Entry(value, _owner())))

    def leave(self, value) -> None:
        """Takes away the last entry of ``value``: of several, one that the generator that runs made itself."""
        traced = _without(self._traced.entries, value)
        if traced is not None:
            self._traced.entries = traced
        elif not is_compiling():
            entries = self._eager.now
            several = sum(entry.value is value for entry in entries) > 1
            left = _without(entries, value, _owner()) if several else None
            left = _without(entries, value) if left is None else left
            if left is not None:  # another task's, where it closes an asynchronous generator
                self._var.set(left)

    def innermost(self):
        """The value that holds here, or None."""
        entries = self._traced.entries or self._eager.now
        if not entries:
            return None
        last = entries[-1]
        if len(entries) == 1 and last.owner is None:
            return last.value
        entries = _running(entries)
        return entries[-1].value if entries else None

    def values(self) -> tuple:
        """Every value that holds here, the innermost last."""
        entries = self._traced.entries or self._eager.now
        return tuple([entry.value for entry in _running(entries)]) if entries else ()

    @contextlib.contextmanager
    def only(self, values: tuple):
        """Inside it ``values`` hold, and what held before does not."""
        traced, self._traced.entries = self._traced.entries, ()
        token = self._var.set(tuple([_Entry(value, None) for value in values]))
        try:
            yield
        finally:
            self._var.reset(token)
            self._traced.entries = traced


def _without(entries: tuple, value, *owner) -> tuple | None:
    """``entries`` less the last one of ``value`` (and of ``owner``), or None where there is none."""
    for i in range(len(entries) - 1, -1, -1):
        if entries[i].value is value and (not owner or entries[i].owner is owner[0]):
            return entries[:i] + entries[i + 1 :]
    return None


def _running(entries: tuple) -> list[_Entry]:
    """The entries that hold: those of no generator, then those of the generators on the call stack, as they called."""
    free = [entry for entry in entries if entry.owner is None]
    # a generator that waits (or is done) has no caller
    owned = [entry for entry in entries if entry.owner is not None and entry.owner.f_back is not None]
    if not is_compiling() and len({id(entry.owner) for entry in owned}) > 1:
        depth = {id(frame): i for i, frame in enumerate(_frames())}
        owned.sort(key=lambda entry: -depth.get(id(entry.owner), -1))
    return free + owned


def _frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner() -> FrameType | None:
    """The innermost generator on the call stack that is no context manager."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_flags & _GENERATOR and not _manages(frame.f_back):
            return frame
        frame = frame.f_back
    return None


def _manages(driver: FrameType | None) -> bool:
    """True if a generator that ``driver`` resumed is a context manager."""
    if driver is None:
        return False
    return driver.f_code.co_name in _MANAGES or driver.f_globals.get("__name__", "").startswith(_MANAGERS)
