"""Functions of ``torch.autograd.Function`` on maps: they run on dense tensors, and their gradient flows on.

``Function.apply`` asks no tensor subclass. It would see a map as a leaf without a gradient, and cut the graph. So it is
replaced while a module runs on maps. An ``apply`` that was read from its class before (``swish = Swish.apply``) stays
the old one.
"""

from __future__ import annotations

import contextlib
import threading

from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from . import layout
from .functions import compute
from .scope import scope
from .value import SparseMap, dense_tree

_own = Function.__dict__["apply"]
_SAVERS = ("_NoopSaveInputs",)  # keeps the arguments of a checkpoint as they are


def _apply(cls, *args, **kwargs):
    if not any(type(x) is SparseMap for x in (*args, *kwargs.values())) or cls.__name__ in _SAVERS:
        return _own.__get__(None, cls)(*args, **kwargs)
    if cls is checkpoint.CheckpointFunction:
        return _checkpointed(cls, *args)
    return compute(_own.__get__(None, cls), args, kwargs)


def _checkpointed(cls, run, preserve, *args):
    """A reentrant checkpoint, whose function computes on maps in the backward pass too."""

    def as_given(given, x):
        if type(given) is not SparseMap:
            return x
        if given.is_input:
            return SparseMap.of_input(x, given.active)
        rows = layout.gathered(x, given.plan, given.axes)
        return SparseMap.of_rows(rows, given.plan, given.active, given.axes)

    def on_maps(*dense):
        with scope.only((scope.depth + 1, scope.dense)), replaced():
            return dense_tree(run(*map(as_given, args, dense)))

    first = next(x for x in args if type(x) is SparseMap)
    out = _own.__get__(None, cls)(on_maps, preserve, *dense_tree(args))
    return pytree.tree_map_only(Tensor, lambda y: _map_of(y, first), out)


def _map_of(y: Tensor, first: SparseMap):
    """A result that is zero outside of the mask, as a map."""
    n, h, w = shape = (y.shape[0], *y.shape[2:]) if y.dim() == 4 else (0, 0, 0)
    if not y.is_floating_point() or min(n, h, w) < 2:
        return y
    plan = first.active.plan(shape, y.device)
    return SparseMap.of_rows(layout.gathered(y, plan, layout.NCHW), plan, first.active)


_lock = threading.Lock()
_running = 0


@contextlib.contextmanager
def replaced():
    """Inside it, in every thread, ``Function.apply`` takes maps."""
    global _running
    with _lock:
        _running += 1
        if _running == 1:
            Function.apply = classmethod(_apply)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                Function.apply = _own
