"""Calls of a user's modules on tensors that somebody else reads too: what they write in place stays their own.

Some layers hand one tensor to several modules: a branch and a shortcut, a head and the next stage. They take
these modules as functions of values: ``x + F(x)`` is that of ``F(x.clone())``, also where ``F`` begins with
``ReLU(inplace=True)``. A layer of PyTorch or dynops says whether it writes. Of any other module the first
call gets a copy, and tells; a module that did not write gets the tensor itself from then on, and is watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import modes
from ..kept import Mark, can_keep, made_plain

_READS_ONLY = ("torch.nn.modules.", "dynops.")  # where layers come from that write only if they are told to
# may return what they got
_PASSES_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
# Of each module: whether it wrote, in training or not, with gradients or without.
_wrote: weakref.WeakKeyDictionary[Callable, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def apart(module: Callable, value: Any, *rest: Any, options: dict | None = None) -> Any:
    """``module(value, *rest, **options)``, which leaves the tensors of ``value`` as they were.

    Args:
        value: a tensor or a pytree of them. What lies in other objects (a transformer's cache) is the module's to write.

    Raises:
        RuntimeError: a module that had not written into its input did so now; the next call gets a copy.
    """
    return apart_as(module, lambda value: module(value, *rest, **(options or {})), value)


def apart_as(module: Callable, run: Callable[[Any], Any], value: Any) -> Any:
    """``run(value)``, which calls ``module`` and leaves the tensors of ``value`` as they were: see :func:`apart`."""
    if _reads_only(module):
        return run(value)
    leaves = _tensors(value)
    seen = all(type(leaf) in (Tensor, nn.Parameter) for leaf in leaves) and can_keep(*leaves)
    if modes.watched() or not seen:  # a write would not be; Inductor drops a copy that nobody needs
        return run(_copied(value))
    known = _known(module)
    key = getattr(module, "training", None), torch.is_grad_enabled()
    if known.get(key, True):
        value = _copied(value)
        leaves = _tensors(value)
    marks = [Mark(leaf) for leaf in leaves]
    out = run(value)
    writes = not all(mark.holds(leaf) for mark, leaf in zip(marks, leaves, strict=True))
    if writes and known.get(key) is False:
        known[key] = True
        raise RuntimeError(
            f"{type(module).__name__}: expected a module that leaves its input as it is, as it did before, but it wrote "
            "into it; call again with the input made anew: from now on it gets a copy"
        )
    known[key] = writes or known.get(key, False)
    return out


def _known(module: Callable) -> dict[tuple, bool]:
    try:
        return _wrote.setdefault(module, {})
    except TypeError:  # takes no weak reference: never known
        return {}


def _copied(value: Any) -> Any:
    clones: dict[int, Tensor] = {}  # a tensor that stands twice stays one

    def clone(x: Tensor) -> Tensor:
        if id(x) not in clones:
            # in inference mode too a copy that has a version, which tells of writes
            inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            clones[id(x)] = made_plain(x.clone) if inference else x.clone()
        return clones[id(x)]

    return (
        clone(value) if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, clone, value, _is_opaque)
    )


def _tensors(value: Any) -> list[Tensor]:
    leaves = [value] if isinstance(value, Tensor) else pytree.tree_leaves(value, _is_opaque)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _reads_only(module: Callable) -> bool:
    """True if the first layer of a module is one of PyTorch's or dynops' that returns new tensors."""
    while _is_known(module) and isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    if not _is_known(module) or isinstance(module, (nn.Sequential, *_PASSES_ON)):
        return False
    return not getattr(module, "inplace", False)


def _is_known(module: Callable) -> bool:
    """True if a module's forward was written here or in PyTorch, and is all that runs."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    if module._forward_pre_hooks or module._forward_hooks:
        return False
    return (getattr(type(module).forward, "__module__", None) or "").startswith(_READS_ONLY)


def _is_opaque(value: Any) -> bool:
    """A cache, which some versions of transformers register as a tree: it is there to be written into."""
    return hasattr(value, "reorder_cache")
