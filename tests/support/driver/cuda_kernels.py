"""The CUDA C++ kernels on the stand-in: compiled for one architecture, launched through ``libcudart.c``."""

import ctypes
import warnings
from functools import partial

import torch

from . import machine
from .watch import watch

SOURCES = sorted((machine.HERE.parents[2] / "csrc/cuda").glob("*.cu"))
VARIABLE = "DYNOPS_STAND_IN_NVCC"  # asks for them
_libraries = []  # a registration ends with its library


def install() -> None:
    """From now on ``torch.ops.dynops`` has the kernels. Must come before ``import dynops``, which looks for them."""
    source = machine.HERE / "libcudart.c"
    file = machine.built("libcudart.so", "cc", "-O1", "-fPIC", f"-I{machine.cuda_headers()}", source)
    runtime = ctypes.CDLL(file, ctypes.RTLD_GLOBAL)
    runtime.standin_tell(_memory_set, _host_waits)
    options = (
        "-cudart=none",
        "-arch=sm_90",
        "-O1",
        "-std=c++17",
        "-Xcompiler=-fPIC",
        *machine.torch_options("-Xlinker="),
    )
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py
    torch.ops.load_library(
        machine.built("libdynops_cuda.so", "nvcc", *options, target, *SOURCES, "-lc10", "-ltorch_cpu")
    )
    import dynops  # noqa: F401  defines the ops

    library = torch.library.Library("dynops", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced
        for op in _ops():
            kernel = torch.library.get_kernel(op, "CUDA")
            library.impl(op, partial(_noted, op, kernel), "CUDA", with_keyset=True, allow_override=True)


def _ops() -> list[torch._ops.OpOverload]:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dynops::")]
    with_kernel = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
    return [getattr(torch.ops.dynops, name.removeprefix("dynops::")).default for name in with_kernel]


def _noted(op, kernel, keys, *arguments):
    """The kernel, and its launches told to the watch: it reads all tensors, and writes its results."""
    library = machine.driver()
    before = library.standin_launch_count()
    result = kernel.call_boxed(keys, *arguments)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    results = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
    written = [a for a, d in zip(arguments, op._schema.arguments, strict=False) if d.alias_info is not None]
    for i in range(before, library.standin_launch_count()):
        launch = library.standin_launch(i).contents
        watch.operation(launch.kernel.decode(), launch.device, tensors, [*written, *results], kernel=True)
    return result


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
def _memory_set(address: int, size: int, stream: int) -> None:
    watch.counts["kernels"] += 1


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _host_waits(what: bytes) -> None:
    watch.host_reads(what.decode(), watch.device())
