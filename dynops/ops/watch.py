"""Who wants to know what an op did: :class:`dynops.budget.MacCounter` cannot see it from calls of modules.

An op that matters calls the watchers of its thread, of which there are none outside of a counter.
"""

from __future__ import annotations

import threading


class _Local(threading.local):
    def __init__(self):  # runs once in each thread; an attribute (not a class default) is what Dynamo guards
        self.watchers: tuple = ()


_local = _Local()


def watchers() -> tuple:
    """This thread's: with ``gathered(x, plan, rows)`` and ``filled(plan, channels, mode, kernel_size)``."""
    return _local.watchers


class watching:
    """Context manager: inside it, ``watcher`` is one of this thread's watchers."""

    def __init__(self, watcher):
        self.watcher = watcher

    def __enter__(self):
        _local.watchers = (*_local.watchers, self.watcher)
        return self.watcher

    def __exit__(self, *error) -> None:
        left = list(_local.watchers)
        left.reverse()
        left.remove(self.watcher)
        left.reverse()
        _local.watchers = tuple(left)
