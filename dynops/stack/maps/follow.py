"""Runs a module's own forward on maps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from ... import modes
from . import functions  # noqa: F401  (names the functions of maps)
from .custom import replaced
from .errors import check_layout
from .pointwise import masked_input
from .scope import scope
from .value import SparseMap


def may_follow() -> bool:
    """True where a forward may run on maps: not where a compiler or a transform records plain tensors."""
    if is_compiling():
        return modes.runs_python()
    return not (modes.watched() or modes.tracing())


def inside() -> bool:
    """True while a module runs on maps in this thread."""
    return scope.depth > 0


def follow(forward: Callable, args: tuple, kwargs: dict, active, dense=(), part: bool = False):
    """``forward(*args, **kwargs)`` on maps: of the outermost module the maps among the arguments and results are dense.

    Args:
        dense: modules that stay dense.
        part: it is a part of a forward: its results stay maps, for the part that follows.
    """
    if inside():
        maps = (x for x in pytree.tree_leaves((args, kwargs)) if type(x) is SparseMap)
        if all(x.active is active for x in maps):
            return forward(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(SparseMap, lambda x: x.under(active), (args, kwargs))
        return forward(*args, **kwargs)

    def taken(x: Tensor):
        if type(x) is SparseMap:
            return x.under(active)
        return SparseMap.of_input(x, active) if is_map(x) else x

    args, kwargs = pytree.tree_map_only(Tensor, taken, (args, kwargs))
    with entered(dense):
        out = forward(*args, **kwargs)
    return out if part else pytree.tree_map_only(SparseMap, SparseMap.dense, out)


@contextlib.contextmanager
def entered(dense=()):
    """Inside it, converted layers return maps, and the modules of ``dense`` do not."""
    before = scope.keep_dense(dense) if dense else scope.dense
    scope.depth += 1
    try:
        with replaced() if scope.depth == 1 else contextlib.nullcontext():
            yield
    finally:
        scope.depth -= 1
        scope.dense = before


def layer_input(x, active) -> SparseMap | None:
    """The input of a converted layer, called inside a module that runs on maps; None elsewhere."""
    if type(x) is SparseMap:
        return x.under(active)
    if active is not None and isinstance(x, Tensor):
        check_layout(x)
    return SparseMap.of_input(x, active) if inside() and active is not None and is_map(x) else None


def as_map(out, active):
    """What a converted layer made: a map under the mask."""
    if type(out) is SparseMap:
        return masked_input(out)
    return masked_input(SparseMap.of_input(out, active)) if isinstance(out, Tensor) and is_map(out) else out


def is_map(x: Tensor) -> bool:
    return type(x) is not SparseMap and x.dim() == 4 and x.is_floating_point()
