"""The state of a thread that runs a module on maps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

from torch import nn
from torch.utils import _pytree as pytree

from ... import context


class _Scope(threading.local):
    """``depth``: of modules that run on maps. ``dense``: the ids of the tensors of layers that stay dense."""

    depth = 0
    dense: frozenset[int] = frozenset()

    def is_dense(self, args: tuple, kwargs: dict) -> bool:
        """True for a call with a parameter or statistic of a layer that stays dense."""
        return any(id(x) in self.dense for x in pytree.tree_leaves((args, kwargs)))

    def keep_dense(self, layers: Iterable[nn.Module]) -> frozenset[int]:
        """Adds layers that stay dense; what was there before."""
        before = self.dense
        tensors = (
            t for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        )
        self.dense = before | {id(t) for t in tensors}
        return before

    def values(self) -> tuple[int, frozenset[int]]:
        return self.depth, self.dense

    @contextlib.contextmanager
    def only(self, values: tuple[int, frozenset[int]]):
        """Inside it the state is ``values``, which :meth:`values` returned."""
        before = self.values()
        self.depth, self.dense = values
        try:
            yield
        finally:
            self.depth, self.dense = before


scope = _Scope()
context.travels(scope)
