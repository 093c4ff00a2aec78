"""incremental_: a model whose calls inside of a stream keep their values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..scope import Scope
from ..stack import converted
from .holding import WATCH

scope = Scope("dynops.Stream")  # of what holds inside ``with stream:``
_METHODS = ("forward", "encode", "decode")


def incremental_(model: nn.Module) -> None:
    """Lets a model keep its values in a :class:`Stream`, in place. ``dynops.revert_`` undoes it.

    Every parameter, buffer, ``state_dict`` key and hook stays where it is; only the model's class changes. Outside of
    ``with stream:`` the model is what it was. Inside, calls of the model, and of its methods ``encode``, ``decode`` and
    ``forward_*``, run the model's own Python. Each function of torch that it calls computes what changed.

    Args:
        model: in eval mode; any module.

    Raises:
        TypeError: ``model`` is not a module, or is one of TorchScript.
        ValueError: :func:`dynops.convert_` has converted it.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_incremental(model):
        return
    if any("_dynops_converted" in m.__dict__ or converted.is_whole(m) for m in model.modules()):
        raise ValueError(
            "model: expected one that convert_ has not converted; dynops.revert_(model) undoes it"
        )
    model.__class__ = _incremental_class(type(model))


def is_incremental(module: nn.Module) -> bool:
    return any("_dynops_incremental" in vars(kind) for kind in type(module).__mro__)


def undo(module: nn.Module) -> None:
    """Gives a module back the class that it had before :func:`incremental_`."""
    own = next((kind for kind in type(module).__mro__ if "_dynops_incremental" in vars(kind)), None)
    if own is not None:
        module.__dict__.pop(WATCH, None)
        module.__class__ = converted.rebased(type(module), own, vars(own)["_dynops_base"])


@functools.cache
def _incremental_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {name for kind in base.__mro__ for name in vars(kind) if name.startswith("forward_")}
    names |= {name for name in _METHODS if callable(getattr(base, name, None))}
    methods = {name: _method(base, name) for name in names if inspect.isfunction(getattr(base, name))}
    members = {**converted._members(base, methods["forward"], _new), **methods, "_dynops_incremental": True}
    return type(f"Incremental{base.__name__}", (base,), members)


def _new(base: type[nn.Module]) -> nn.Module:
    """An empty module, for pickle and deepcopy to fill."""
    kind = _incremental_class(base)
    return kind.__new__(kind)


def _method(base: type[nn.Module], name: str) -> Callable:
    own = getattr(base, name)

    @functools.wraps(own)
    def method(self, *args, **kwargs):
        entry = None if torch.compiler.is_compiling() else scope.innermost()
        if entry is None or entry.stream._runs_here():
            return own(self, *args, **kwargs)
        return entry.stream._run(entry, self, name, own, args, kwargs)

    return method
