"""Who wants to know what an op did: :class:`dynops.budget.MacCounter` cannot see it from calls of modules.

An op that matters calls the watchers that were entered around it (:mod:`dynops.scope`: in this thread, task or
generator), of which there are none outside of a counter.
"""

from __future__ import annotations

from ..scope import Scope

_scope = Scope("dynops.watchers")


def watchers() -> tuple:
    """Those that hear this call: with ``gathered(x, plan, rows)`` and ``filled(plan, channels, mode, kernel_size)``.

    They do not change what an op computes: a checkpoint's recomputation is not heard where its counter is closed.
    """
    return _scope.values()


class watching:
    """Context manager: inside it, ``watcher`` is one of those that hear calls."""

    def __init__(self, watcher):
        self.watcher = watcher

    def __enter__(self):
        _scope.enter(self.watcher)
        return self.watcher

    def __exit__(self, *error) -> None:
        _scope.leave(self.watcher)
