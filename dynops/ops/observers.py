"""Observers of ops, for :class:`dynops.budget.MacCounter`: it sees calls of modules, but not how many rows an op ran.

An op that matters calls the observers that were entered around it (:mod:`dynops.scope`: in this thread, task or
generator), of which there are none outside of a counter.
"""

from __future__ import annotations

from ..scope import Scope

_scope = Scope("dynops.observers")


def observers() -> tuple:
    """The observers of this call: with ``gathered(x, plan, rows)`` and ``filled(plan, channels, mode, kernel_size)``.

    They do not change what an op computes. They do not hear a checkpoint's recomputation after their counter is closed.
    """
    return _scope.values()


class observing:
    """Context manager: inside it, ``observer`` hears calls."""

    def __init__(self, observer):
        self.observer = observer

    def __enter__(self):
        _scope.enter(self.observer)
        return self.observer

    def __exit__(self, *error) -> None:
        _scope.leave(self.observer)
