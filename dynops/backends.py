"""Finds the binary, names the backends, and chooses one."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path

import torch

NAMES = ("cpp", "triton", "reference")
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if importlib.util.find_spec("dynops._C") is None:  # a source tree that was not built: the reference runs
    _C, _C_ERROR = (
        None,
        f"{Path(__file__).parent} holds no dynops._C; `make build` in {Path(__file__).parents[1]} makes it",
    )
    warnings.warn(
        f"dynops was not built, so that the reference in plain PyTorch runs, no faster than dense layers: {_C_ERROR}. "
        "A dynops that pip installed is found from outside a source tree",
        stacklevel=1,
    )
else:  # a binary that does not load raises here, rather than leave everything slow
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"dynops._C needs torch 2.11 or newer and does not load with {torch.__version__}: {error}"
        ) from error
    _C_ERROR = None


def has_binary() -> bool:
    """True if the binary is built."""
    return _C is not None


def build_info() -> dict:
    """Returns what the binary was built with: versions, instruction sets, CUDA architectures.

    Raises:
        RuntimeError: the package was not built.
    """
    if _C is None:
        raise RuntimeError(
            f"the binary is not built: {_C_ERROR}. A dynops that pip installed is found from outside a source tree"
        )
    return _C.build_info()


@functools.cache
def has_triton() -> bool:
    """True if Triton is installed."""
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
