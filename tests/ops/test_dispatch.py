"""Every kernel that an op names exists in each module of its kernels."""

import importlib
import inspect
import pkgutil

import pytest

import dynops.ops
from dynops.ops.dispatch import Kernels
from dynops.ops.registry import Op


def named_kernels() -> list[tuple[str, Kernels]]:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(dynops.ops.__path__, "dynops.ops.")
    ]
    ops = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    closures = [inspect.getclosurevars(op.implementation).nonlocals for op in ops.values()]
    return [(c["name"], c["self"]) for c in closures if isinstance(c.get("self"), Kernels)]


def test_every_named_kernel_exists():
    found = named_kernels()
    assert len(found) >= 15
    for name, kernels in found:
        assert hasattr(kernels.cpu, name), (kernels.cpu.__name__, name)


def test_every_named_kernel_exists_in_triton():
    pytest.importorskip("triton")
    for name, kernels in named_kernels():
        if kernels.triton:
            module = importlib.import_module(f"dynops.kernels.triton.{kernels.triton}")
            assert hasattr(module, name), (module.__name__, name)
