"""Runs an op by a kernel of the named or fastest backend, or by its reference."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .. import backends
from ..kernels.layout import memory_format_of


class Kernels:
    """The modules that hold the kernels of some ops, by backend.

    Args:
        cpu: the module of C++ kernels; None: the binary registers those that there are under the ops' own names.
        triton: the name of the module of Triton kernels, imported when it is used.
        copies: the kernels move bits of any dtype.
    """

    def __init__(self, cpu: ModuleType | None, triton: str, *, copies: bool = False):
        self.cpu, self.triton, self.copies = cpu, triton, copies

    def of(self, backend: str | None, x: Tensor) -> ModuleType | None:
        """The module for ``x``, or None for the reference.

        Raises:
            RuntimeError: the named backend cannot run here.
        """
        dtype = torch.float32 if self.copies and x.element_size() <= 8 else x.dtype
        name = backends.choose(backend, x.device, dtype)
        if name == "cpp":
            return self.cpu
        return triton_module(self.triton) if name == "triton" else None

    def run(
        self,
        name: str,
        reference: Callable,
        *,
        like_first: bool = False,
        backend: str | None = None,
        pack: Callable | None = None,
    ) -> Callable:
        """The implementation of an op ``(x, …, backend)``: the kernel ``name``, or the reference.

        Args:
            like_first: gives the result the memory format of the first argument.
            backend: that of an op whose schema has none.
            pack: makes the arguments of both out of those of the schema, which has no named tuples.
        """
        named = backend

        def implementation(*arguments):
            backend = named
            if backend is None:
                *arguments, backend = arguments
            if pack is not None:
                arguments = pack(*arguments)
            x = arguments[0]
            kernels = self.of(backend, x)
            run = reference if kernels is None else getattr(kernels, name)
            out = run(*arguments)
            return out.contiguous(memory_format=memory_format_of(x)) if like_first else out

        return self.serve(implementation)

    def serve(self, implementation: Callable) -> Callable:
        """``implementation``, known to run these kernels (``ops.what_runs``)."""
        implementation.kernels = self
        return implementation


@functools.cache
def triton_module(name: str) -> ModuleType:
    """A module of Triton kernels: importing one imports Triton."""
    return importlib.import_module(f"dynops.kernels.triton.{name}")
