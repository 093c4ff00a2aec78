"""The machine that the stand-in pretends to be: its GPUs, and the two libraries that speak for them."""

import ctypes
import functools
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FOLDER = "DYNOPS_STAND_IN"  # the variable that names the folder of the libraries and of Triton's cache


class Gpu(NamedTuple):
    """The facts that decide a launch. Shared memory in bytes, as the CUDA programming guide lists it."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_per_block: int
    shared_per_processor: int


GPUS = (
    Gpu("H200", (9, 0), 132, 227 << 10, 228 << 10),
    Gpu("A100", (8, 0), 108, 163 << 10, 164 << 10),
    Gpu("B200", (10, 0), 148, 227 << 10, 228 << 10),
)


class Launch(ctypes.Structure):
    """A launch as ``libcuda.c`` recorded it."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("device", ctypes.c_int),
    )


def folder() -> Path:
    return Path(os.environ[FOLDER])


@functools.cache
def driver() -> ctypes.CDLL:
    """``libcuda.c``, with :data:`GPUS` as its devices."""
    options = ("-O1", "-fPIC", f"-I{cuda_headers()}", "-Wl,-soname,libcuda.so.1")
    library = ctypes.CDLL(built("libcuda.so.1", "cc", *options, HERE / "libcuda.c"), ctypes.RTLD_GLOBAL)
    library.standin_launch_count.restype = ctypes.c_size_t
    library.standin_launch.restype = ctypes.POINTER(Launch)
    library.standin_launch.argtypes = [ctypes.c_size_t]
    library.standin_fault.restype = ctypes.c_char_p
    library.standin_allocated.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    library.standin_freed.argtypes = [ctypes.c_uint64]
    for gpu in GPUS:
        library.standin_add_device(*gpu.capability, *gpu[2:])
    return library


@functools.cache
def guard() -> ctypes.CDLL:
    """``device_guard.cpp``. The first call must come before ``import torch``, which looks for hooks once."""
    options = ("-std=c++20", "-fPIC", *torch_options("-Wl,"), "-Wl,-soname,libtorch_cuda.so")
    source = HERE / "device_guard.cpp"
    library = ctypes.CDLL(built("libtorch_cuda.so", "c++", *options, source, "-lc10", "-ltorch_cpu"))
    library.guard_stream.restype = ctypes.c_int64
    library.guard_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.guard_set_device_count(len(GPUS))
    return library


def cuda_headers() -> Path:
    """Those that Triton ships."""
    return _home("triton") / "backends/nvidia/include"


def torch_options(to_linker: str) -> list[str]:
    """What a compiler needs to use PyTorch's libraries; ``to_linker``: its prefix of options for the linker."""
    home = _home("torch")
    return [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"{to_linker}-rpath,{home / 'lib'}"]


def _home(package: str) -> Path:
    """The folder of a package, which is not imported."""
    return Path(importlib.util.find_spec(package).origin).parent


def built(name: str, *command) -> str:
    """A library in the folder, compiled unless it is there."""
    file = folder() / name
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}")  # another process may compile it at the same time
        subprocess.run([*command, "-shared", "-o", part], check=True)
        part.replace(file)
    return str(file)
