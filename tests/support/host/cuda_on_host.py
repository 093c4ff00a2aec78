"""Builds and calls the CUDA C++ kernels on a CPU: a thread of a block is a fiber there (``block_of_threads.h``)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
NARROW = 2**30  # as in csrc/cuda/launch.h: below it offsets are 32-bit


def build(noun: str, folder: Path) -> ctypes.CDLL:
    """The library of ``<noun>_on_host.cpp``."""
    source, built = Path(__file__).parent / f"{noun}_on_host.cpp", folder / f"{noun}.so"
    # nvcc hands C++ to the host compiler, with its own headers
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", "-O1", "-std=c++17", source, "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


def pointer(x: torch.Tensor | None):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def int64(value: int):
    return ctypes.c_int64(value)
