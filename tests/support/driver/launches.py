"""Triton's own way to a launch, on the stand-in: its binder, compiler, descriptors and launcher, and what they forget."""

import os
import re
from pathlib import Path

import triton
from torch import Tensor
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
from triton.runtime import driver as active
from triton.tools.tensor_descriptor import TensorDescriptor

from . import machine
from .kernels import Parameter, parameters
from .watch import watch


class Illegal(AssertionError):
    """A launch that a GPU would not survive, or that would not happen."""


class Launcher(CudaLauncher):
    """Triton's launcher, and what no driver can see: arguments against what the code was made for."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.kernel, self.names = src.fn.__name__, list(src.signature)

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        library = machine.driver()
        given = dict(zip(self.names, arguments, strict=True))
        known = {name: p for name, p in _loaded[function].items() if name in given}
        self._check(x * y * z, given, known)
        before = library.standin_launch_count()
        super().__call__(x, y, z, stream, function, packed, metadata, enter, leave, *arguments)
        assert library.standin_launch_count() == before + 1
        reads, writes = (
            [_tensor(given[name]) for name, p in known.items() if p.is_memory and getattr(p, use)]
            for use in ("read", "written")
        )
        watch.operation(self.kernel, watch.device(), reads, writes, kernel=True)

    def _check(self, programs: int, given: dict, known: dict[str, Parameter]) -> None:
        # Triton multiplies in 32 bits, and launches nothing where the product is not positive
        if not 0 < programs < 2**31:
            raise Illegal(f"{self.kernel}: a grid of {programs} programs, which Triton skips")
        for name, parameter in known.items():
            value = given[name]
            at = _tensor(value).data_ptr() if parameter.is_memory else value
            if parameter.aligned and at % 16:
                raise Illegal(f"{self.kernel}: {name} = {at:#x}, and its code is for multiples of 16")


def _tensor(value) -> Tensor:
    return value.base if isinstance(value, TensorDescriptor) else value


_loaded: dict[int, dict[str, Parameter]] = {}  # by the driver's handle of a kernel


def _note_loaded(module, function, name, metadata_group, hash) -> None:
    file = next(path for file, path in metadata_group.items() if file.endswith(".ttir"))
    _loaded[function] = parameters(Path(file).read_text())


class Driver(CudaDriver):
    """Triton's driver of NVIDIA GPUs with the launcher above."""

    def __init__(self):
        super().__init__()
        self.launcher_cls = Launcher


def _no_ptx(self, llir: str, metadata: dict, *options) -> str:
    """A launch is settled before LLVM's passes, PTX and machine code, which are half of the time: `make gpu-audit` has them."""
    metadata["name"] = re.search(r"define .*ptx_kernel .*@(\w+)\(", llir)[1]
    return " "


def _no_code(self, ptx: str, metadata: dict, *options) -> bytes:
    return b" "


def install() -> None:
    """From now on Triton compiles for the current device of the stand-in and launches there."""
    machine.driver()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody says
    triton.knobs.nvidia.libcuda_path = str(machine.folder())
    triton.knobs.cache.dir = str(machine.folder() / "triton")
    triton.knobs.runtime.kernel_load_end_hook.add(_note_loaded)
    CUDABackend.make_ptx, CUDABackend.make_cubin = _no_ptx, _no_code
    llvm.optimize_module = lambda *module, **options: None
    active.set_active(Driver())
