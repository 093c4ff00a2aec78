"""Finds the binary, names the backends, chooses one, and keeps packed weights."""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import modes

NAMES = ("cpp", "triton", "reference")
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if importlib.util.find_spec("dynops._C") is None:  # a source tree that was not built: the reference runs
    _C, _C_ERROR = None, "there is no dynops._C beside dynops/__init__.py"
else:  # a binary that does not load raises here, rather than leave everything slow
    from . import _C

    _C_ERROR = None


def has_binary() -> bool:
    """Whether the binary is built."""
    return _C is not None


def build_info() -> dict:
    """What the binary was built with: versions, instruction sets, CUDA architectures.

    Raises:
        RuntimeError: the package was not built.
    """
    if _C is None:
        raise RuntimeError(f"dynops._C is not built (pip install . builds it): {_C_ERROR}")
    return _C.build_info()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that an op runs on.

    A named one is used or raises; unnamed, the fastest that exists for this device and dtype.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here.
    """
    if not backend:
        if dtype in FAST_DTYPES:
            if device.type == "cpu" and _C is not None:
                return "cpp"
            if device.type == "cuda" and has_triton():
                return "triton"
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, got {backend!r}")
    problem = _problem(backend, device, dtype)
    if problem:
        raise RuntimeError(f"backend={backend!r}: {problem}")
    return backend


def _problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "reference":
        return None
    if dtype not in FAST_DTYPES:
        return f"expected float32, bfloat16 or float16, got {dtype}"
    if backend == "cpp":
        if _C is None:
            return f"the binary is not built: {_C_ERROR}"
        return None if device.type == "cpu" else f"expected CPU tensors, got {device}"
    if not has_triton():
        return "Triton is not installed"
    if device.type == "cuda" or _triton_interprets():
        return None
    return f"expected CUDA tensors, got {device}"


def _triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


class WeightCache:
    """What a kernel makes of a weight (packed, converted), kept while the weight lives unchanged.

    An entry is found by the identity of the weight and is valid for one version of it: an in-place
    operation or ``load_state_dict`` bumps the version, and the next use packs again. So it does after
    the step of a ``torch.optim`` optimiser (the fused ones bump nothing) and where ``weight.data``
    was assigned. Writing through ``weight.data`` bumps nothing and is not seen; call :meth:`clear`
    after it.
    """

    def __init__(self):
        self._entries: dict[int, _Entry] = {}  # by id(weight); an entry goes with its weight

    def get(self, weight: Tensor, key, make):
        """``make()`` for this weight and key, or what it returned last time."""
        if weight.is_inference():  # has no version: a change could not be noticed
            return make()
        storage = weight.untyped_storage()
        version = (weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        entry = self._entries.get(id(weight))
        # the storage too: a freed one's address comes back, as in module.half().float()
        if (
            entry is None
            or entry.weight() is not weight
            or entry.version != version
            or entry.storage.cdata != storage._cdata
        ):
            entry = self._entries[id(weight)] = _Entry(
                self._entries, weight, version, StorageWeakRef(storage)
            )
        packed = entry.made.get(key)
        if packed is None:
            packed = entry.made[key] = make()
        return packed

    def drop(self, weight: Tensor) -> None:
        """Forgets what was made of one weight."""
        self._entries.pop(id(weight), None)

    def clear(self) -> None:
        """Forgets every packed weight."""
        self._entries.clear()


class _Entry:
    """What was made of one version of one weight. Threads may make the same twice; either is right."""

    __slots__ = ("made", "storage", "version", "weight")

    def __init__(self, entries: dict, weight: Tensor, version: tuple, storage: StorageWeakRef):
        key = id(weight)

        def forget(dead, entries=entries):
            entry = entries.get(key)
            if entry is not None and entry.weight is dead:  # not that of a newer tensor at this address
                entries.pop(key, None)

        self.weight = weakref.ref(weight, forget)
        self.version, self.storage, self.made = version, storage, {}


weight_cache = WeightCache()


def kept(weight: Tensor, key: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(weight)``, a view or a function of a weight; where no gradient is needed the same tensor every time.

    What kernels pack is found by the identity of the weight that they get: a new view at each call would be packed
    at each call.
    """
    if not modes.plain(weight):
        return make(weight)

    def detached() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(weight.detach())

    return weight_cache.get(weight, ("kept", key), detached)


@torch._disable_dynamo  # torch.compiler.disable would import the whole compiler here
def _drop_stepped(optimizer, args, kwargs) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight_cache.drop(weight)


register_optimizer_step_post_hook(_drop_stepped)
