"""The dtypes that a module returns, also where this batch does not run it: a result's dtype does not hang on a gate."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import probing

_NARROW = (torch.bfloat16, torch.float16)


class Returned:
    """Remembers the dtypes that modules return, by their input's and autocast's. A module that has not run yet runs on two samples, once."""

    def __init__(self):
        self._seen: dict[tuple, tuple[Callable, list[torch.dtype | None]]] = {}

    def note(self, module: Callable, x: Any, out: Any) -> None:
        """``module(x)`` returned ``out``."""
        if _matters(x):
            self._seen[_key(module, x)] = _by_id(module), _dtypes(out)

    def widened(self, out: Any, module: Callable, x: Any) -> Any:
        """``out`` in the wider of its dtypes and those that ``module(x)`` would have."""
        if not any(dtype in _NARROW for dtype in _dtypes(out)):
            return out
        if type(module) is nn.Identity:
            others = _dtypes(x)
        else:
            of, others = self._seen.get(_key(module, x), (None, None))
            if of is None or of() is not module:
                others = _dtypes(_probe(module, x))
                self._seen[_key(module, x)] = _by_id(module), others
        leaves, tree = pytree.tree_flatten(out)
        if len(leaves) != len(others):
            return out
        pairs = zip(leaves, others, strict=True)
        return pytree.tree_unflatten([_wider(leaf, other) for leaf, other in pairs], tree)


def _wider(leaf: Any, other: torch.dtype | None) -> Any:
    is_floating = isinstance(leaf, Tensor) and leaf.is_floating_point() and other is not None
    return leaf.to(torch.promote_types(leaf.dtype, other)) if is_floating else leaf


def _dtypes(tree: Any) -> list[torch.dtype | None]:
    leaves = [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)
    return [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]


def _matters(x: Any) -> bool:
    return _autocast(x) is not None or any(dtype in _NARROW for dtype in _dtypes(x))


def _autocast(x: Any) -> torch.dtype | None:
    leaf = x if isinstance(x, Tensor) else next(t for t in pytree.tree_leaves(x) if isinstance(t, Tensor))
    device = leaf.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _by_id(module: Callable) -> Callable:
    """A weak reference, as the id in a key may come to belong to another module."""
    return weakref.ref(module) if isinstance(module, nn.Module) else lambda: module


def _key(module: Callable, x: Any) -> tuple:
    return id(module), getattr(module, "training", None), _autocast(x), *_dtypes(x)


def _probe(module: Callable, x: Any) -> Any:
    """``module`` of two samples, without a trace in buffers, gradients, the random state or a counter."""

    def two(leaf: Tensor) -> Tensor:
        rows = leaf.detach()[:1]
        return torch.cat([rows, rows]) if len(rows) else leaf.new_zeros(2, *leaf.shape[1:])

    rows = two(x) if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, two, x)
    leaf = next(t for t in pytree.tree_leaves(rows) if isinstance(t, Tensor))
    devices = [leaf.device] if leaf.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), probing.probing("dtype"):
        if not isinstance(module, nn.Module):
            return module(rows)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, buffers, (rows,))
