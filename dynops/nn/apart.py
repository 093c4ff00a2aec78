"""Calls of a user's modules on tensors that somebody else reads too: what they write in place stays their own.

Every layer here that hands one tensor to several modules (a branch and a shortcut, a head and the next stage) takes them as
functions of values. A copy is made only for a module that may write into its input: one whose first layer works in place, or
one whose Python code has anything in it that may (``relu_``, ``+=``, ``x[...] =``, ``inplace=True``, ``out=``).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PASSES_ON = (nn.Identity, nn.Flatten, nn.Unflatten)  # and dropout: what they return may be what they got
_FRESH = ("torch.nn.modules.", "torch.ao.nn.")  # where modules come from that write only if they are told to
_OWN = "dynops."
_FUNCTIONS = (FunctionType, BuiltinFunctionType, functools.partial)
_DEPTH = 4  # of helper functions that are looked into


def apart(
    module: Callable,
    value: Any,
    *rest: Any,
    held: Any = None,
    options: dict | None = None,
    name: str = "module",
) -> Any:
    """``module(value, *rest, **options)``, which leaves the tensors of ``value`` as they were.

    Args:
        value: a tensor or a pytree of them. What lies in other objects (a transformer's cache) is the module's to write.
        held: a tree of the tensors that somebody else reads; None: all of ``value``.
        name: of the module, for the error.

    Raises:
        RuntimeError: the module wrote into a tensor although nothing in its code says so (a kernel of its own).
    """
    options = options or {}
    if (
        torch.compiler.is_compiling()
    ):  # code is not looked into there, and Inductor drops a copy that is not needed
        return module(value if _is_plain(module) else _copied(value, None), *rest, **options)
    if may_write(module):
        return module(_copied(value, held), *rest, **options)
    leaves = [leaf for leaf in _tensors(value) if not leaf.is_inference()]
    versions = [leaf._version for leaf in leaves]
    out = module(value, *rest, **options)
    if any(leaf._version != version for leaf, version in zip(leaves, versions, strict=True)):
        raise RuntimeError(
            f"{name}: expected a module that leaves its input as it is, or whose code shows that it writes into it "
            f"(relu_, +=, inplace=True, …); {type(module).__name__} wrote into it unseen: give it a clone"
        )
    return out


def _is_plain(module: Callable) -> bool:
    """Whether a module is one of PyTorch's or dynops' layers, that does not write."""
    known = type(module).__module__.startswith((*_FRESH, _OWN)) and not isinstance(module, nn.Sequential)
    return known and not getattr(module, "inplace", False)


def own(module: Callable, value: Any) -> Any:
    """``value``, or a copy of it for a module that may write into it."""
    return _copied(value, None) if torch.compiler.is_compiling() or may_write(module) else value


def _copied(value: Any, held: Any) -> Any:
    others = None if held is None else _tensors(held)

    def copy(leaf: Tensor) -> Tensor:
        return leaf.clone() if others is None or any(_share(leaf, other) for other in others) else leaf

    return copy(value) if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, copy, value, _is_opaque)


def _share(a: Tensor, b: Tensor) -> bool:
    if (
        a is b
        or torch._C._are_functorch_transforms_active()
        or type(a) is not Tensor
        or type(b) is not Tensor
    ):
        return True  # a copy too many is right as well
    return torch._C._is_alias_of(a, b)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree, _is_opaque) if isinstance(leaf, Tensor)]


def _is_opaque(value: Any) -> bool:
    """A cache, which some versions of transformers register as a tree: it is there to be written into."""
    return hasattr(value, "reorder_cache")


# ------------------------------------------------------------------------------------- who may write


def may_write(module: Callable) -> bool:
    """Whether calling ``module`` may change its input; True where nobody can tell."""
    return _first_write(module) is not False if isinstance(module, nn.Module) else _function_writes(module)


def _first_write(module: nn.Module) -> bool | None:
    """Whether a module writes into its input. None: it does not, but what it returns may be its input."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    fields = vars(module)
    if "_orig_mod" in fields["_modules"]:  # torch.compile's
        return _first_write(module._orig_mod)
    if "forward" in fields:
        return _function_writes(module.forward)
    kind = type(module)
    if isinstance(module, nn.Sequential) and (
        kind.forward is nn.Sequential.forward or kind.__module__.startswith(_OWN)
    ):
        found = (_first_write(child) for child in module)
        return next((writes for writes in found if writes is not None), None)
    if _home(kind).startswith(_FRESH):
        passes = isinstance(module, (*_PASSES_ON, nn.modules.dropout._DropoutNd))
        return bool(fields.get("inplace")) or (None if passes else False)
    if kind.__module__.startswith(_OWN):
        return False
    return any(_writes_inside(each) for each in module.modules())


def _writes_inside(module: nn.Module) -> bool:
    fields = vars(module)
    if "forward" in fields and not fields.get("inplace"):
        return _function_writes(module.forward)
    return _kind_writes(module)


def _kind_writes(module: nn.Module, depth: int = _DEPTH) -> bool:
    """Whether a module that has its class's forward may write."""
    fields, kind = vars(module), type(module)
    if fields.get("inplace") or isinstance(module, torch.jit.ScriptModule):
        return True
    if kind.__module__.startswith(_OWN) or _home(kind).startswith(_FRESH):
        return False
    if _method_writes(kind.forward, kind):
        return True
    kept = (value for name, value in fields.items() if name != "forward" and isinstance(value, _FUNCTIONS))
    return any(depth == 0 or _function_writes(value, depth - 1) for value in kept)


def _any_writes(module: nn.Module, depth: int) -> bool:
    return depth == 0 or any(_kind_writes(each, depth - 1) for each in module.modules())


def _home(kind: type[nn.Module]) -> str:
    """Where a class's forward was written."""
    return getattr(kind.forward, "__module__", None) or ""


@functools.lru_cache(maxsize=4096)
def _method_writes(method: Callable, owner: type) -> bool:
    return _scan(inspect.unwrap(method), owner, _DEPTH)


def _function_writes(function: Callable, depth: int = _DEPTH) -> bool:
    function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        told = "out" in function.keywords or function.keywords.get("inplace")
        return bool(told) or _function_writes(function.func, depth)
    if isinstance(function, MethodType):
        owner, function = function.__self__, function.__func__
        if isinstance(owner, nn.Module):
            # not may_write, as its own forward attribute may call this one (torch.compile's does)
            return _any_writes(owner, depth) or _scan(function, type(owner), depth)
    if isinstance(function, nn.Module):
        return may_write(function)
    if isinstance(function, FunctionType):
        if (function.__module__ or "").startswith(("torch.", _OWN)):
            return _names_a_write(function.__name__)
        return _scan(function, None, depth)
    called = getattr(type(function), "__call__", None)  # noqa: B004 - its code is wanted
    if isinstance(called, FunctionType):
        return _scan(called, type(function), depth)
    return _names_a_write(getattr(function, "__name__", ""))


def _scan(function: Callable, owner: type | None, depth: int) -> bool:
    """Whether a function of the user's, or another one of theirs that it names, may write into a tensor."""
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    if _code_writes(code):
        return True
    found = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # not filled yet
            found[name] = cell.cell_contents
    for name in (*code.co_names, *found):
        helper = found.get(name, function.__globals__.get(name, getattr(owner, name, None)))
        if isinstance(helper, nn.Module) and _any_writes(helper, depth):
            return True
        is_new = isinstance(helper, FunctionType) and helper is not function and depth > 0
        if is_new and (helper.__module__ or "").startswith(("torch.", _OWN)):
            continue  # its name was looked at
        if is_new and _scan(helper, owner if getattr(owner, name, None) is helper else None, depth - 1):
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _code_writes(code: CodeType) -> bool:
    """Whether anything in a function's code may write into a tensor: too often rather than never."""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_SUBSCR", "STORE_SLICE") or step.opname.startswith("INPLACE_"):
            return True
        if step.opname == "BINARY_OP" and step.argrepr.endswith("="):
            return True
        if step.opname == "STORE_ATTR" and step.argval == "data":
            return True
        if isinstance(step.argval, str) and _names_a_write(step.argval):
            return True
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and _code_writes(constant):
            return True
        names = constant if isinstance(constant, tuple) else (constant,)
        if any(name in ("inplace", "out") for name in names if isinstance(name, str)):
            return True
    return False


def _names_a_write(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")
