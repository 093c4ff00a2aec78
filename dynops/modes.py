"""The modes that a computation runs in: compilers, transforms of ``torch.func``, derivatives, dispatch modes, autocast.

Every short cut that goes past PyTorch's dispatcher asks :func:`route` first.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .scripting import refuse_tracing

_PLAIN = (Tensor, torch.nn.Parameter)
_transforms = torch._C._are_functorch_transforms_active
_has_key = torch._C._dispatch_tls_is_dispatch_key_included
# of the vmap inside of torch.autograd: is_grads_batched
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
_HAVE_AUTOCAST = ("cpu", "cuda")
_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch._C._autograd._profiler_enabled
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_BATCHED = torch._C._dispatch_key_parse("Batched")


def transformed() -> bool:
    """True if any transform of ``torch.func``, batched gradients or forward-mode AD is active."""
    if _transforms() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and _has_key(_VMAP_MODE)


def watched() -> bool:
    """True if a compiler or a transform is active."""
    if torch.compiler.is_compiling():
        return True
    return _transforms() or forward_ad._current_level >= 0 or _has_key(_VMAP_MODE)


def differentiated(*values) -> bool:
    """True if a derivative, or another transform, of a function of these tensors may be asked for.

    Then the function is composed of ops that have derivatives; a fused one would have none. Values that are no
    tensors do not count.
    """
    if transformed():
        return True
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def observed() -> bool:
    """True if a dispatch mode or a profiler must see a call: 0.1 us.

    Raises:
        RuntimeError: TorchScript's tracer looks on.
    """
    if _tracing():
        refuse_tracing()
    return _dispatch_modes() > 0 or _profiled()


@torch._disable_dynamo  # torch.compiler.disable would import the whole compiler here
def outside_graph(run, *arguments):
    """``run(*arguments)`` as it is: the graph of a model that is compiled around it breaks here."""
    return run(*arguments)


# The ways to call an op, see :func:`route`.
DIRECT, DIFFERENTIATED, DISPATCHED = range(3)


def route(*values) -> int:
    """The shortest way to call an op on these values.

    DISPATCHED: by PyTorch's dispatcher, which a compiler, a transform, forward-mode AD, a dispatch mode, a profiler, a
    tensor subclass and a meta tensor need. DIFFERENTIATED: only a gradient is needed. DIRECT: a kernel may be called
    by itself.
    """
    first = values[0]
    if watched() or observed() or (first is not None and first.is_meta):
        return DISPATCHED
    found, grad = DIRECT, torch.is_grad_enabled()
    for value in values:
        if value is None:
            continue
        if type(value) in _PLAIN:
            if grad and value.requires_grad:
                found = DIFFERENTIATED
        elif isinstance(value, Tensor):
            return DISPATCHED
    return found


def plain(*values) -> bool:
    """True if a kernel may be called by itself on these values."""
    return route(*values) == DIRECT


def tracing() -> bool:
    """True if a compiler, or ``make_fx`` (``torch.func.linearize`` is made of it), records the computation."""
    if torch.compiler.is_compiling():
        return True
    return _dispatch_modes() > 0 and torch._C._get_dispatch_mode(_PROXY) is not None


def runs_python() -> bool:
    """True in an export that runs Python as it is and records the ops (``strict=False``, the default)."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def sizes_are_fixed(x: Tensor) -> bool:
    """True if sizes must not depend on the values of ``x``: while tracing, of meta tensors, in a ``vmap`` over it."""
    if torch.compiler.is_compiling() or x.is_meta:
        return True
    if (_transforms() or _has_key(_VMAP_MODE)) and is_batched(x):
        return True
    return tracing()


def sizes_stay(tree) -> bool:
    """True if sizes must not depend on the values of a tree of tensors, and the graph cannot be left.

    So it is in an export, ``make_fx`` and a ``vmap``, and of meta tensors. A compiler leaves its graph where a layer
    makes a batch smaller.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if not (_transforms() or _has_key(_VMAP_MODE) or tracing()):
        return isinstance(tree, Tensor) and tree.is_meta
    return any(sizes_are_fixed(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def refuse_fixed_sizes(tree, name: str) -> None:
    """Raises RuntimeError where a layer that makes a batch smaller is to have sizes that do not depend on values."""
    if sizes_stay(tree):
        raise RuntimeError(
            f"{name}: expected a call whose sizes may depend on values, got torch.export, make_fx, vmap or meta tensors"
        )


def may_look(x: Tensor) -> bool:
    """True if reading a value of ``x`` costs nothing: on a CPU, where it has one (a fake tensor has none)."""
    return x.device.type == "cpu" and type(x) in _PLAIN and not tracing() and not is_batched(x)


def is_batched(x: Tensor) -> bool:
    """True if a ``torch.func.vmap`` (or that of batched gradients) is over ``x``."""
    if not _transforms():
        if torch.compiler.is_compiling() or not _has_key(_VMAP_MODE):
            return False
        return torch._C._dispatch_keys(x).has(_BATCHED)
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def vmapped() -> bool:
    """True if any vmap is active: the tangent of a tensor that is not batched may be."""
    if torch.compiler.is_compiling():
        return False
    if _has_key(_VMAP_MODE):
        return True
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() if _transforms() else None
    return any(level.key() == functorch.TransformType.Vmap for level in levels or ())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast makes of ``x``, or None: outside it, for float64, on a device without autocast."""
    device = x.device.type
    if device not in _HAVE_AUTOCAST and not torch.amp.is_autocast_available(device):  # asking takes 0.3 us
        return None
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor):
    """A context without autocast on the device of ``x``, where there is such a thing."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
