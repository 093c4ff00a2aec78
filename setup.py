"""Builds dynops._C: CPU kernels always, CUDA kernels where nvcc is found (or FORCE_CUDA=1).

Environment:
    FORCE_CUDA=1 / 0        build the CUDA half, or leave it out, whatever is found
    TORCH_CUDA_ARCH_LIST    its targets (default "8.0;9.0;10.0")
    DYNOPS_SANITIZE=1       AddressSanitizer and UBSan
    MAX_JOBS                compile jobs at a time
"""

import os
import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"dynops cannot be built: {error}. Install what it is built with, and then dynops:\n"
        "    pip install 'torch>=2.11' ninja setuptools wheel\n"
        "    pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).resolve().parent  # pip with setuptools 61 runs this file as a relative one
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "dynops/__init__.py").read_text())[1]


class BuildExtension(cpp_extension.BuildExtension):
    """Names everything that is missing before the first file is compiled."""

    def run(self):
        compiler = os.environ.get("CXX", "c++")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        missing = []
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
            missing.append(f"torch 2.11 or newer; {torch.__version__} is installed")
        if shutil.which(compiler.split()[0]) is None:
            missing.append(f"a C++ compiler; {compiler} was not found (on Debian: apt-get install g++)")
        if not header.exists():
            missing.append(f"{header} (on Debian: apt-get install python3-dev)")
        if missing:
            raise SystemExit("\n    ".join(["dynops cannot be built. It needs:", *missing]))
        super().run()


def wants_cuda() -> bool:
    forced = os.environ.get("FORCE_CUDA")
    if forced is not None:
        return forced not in ("", "0")
    return shutil.which("nvcc") is not None and torch.version.cuda is not None


def cuda_home() -> str:
    """Where nvcc is. torch looks for it only if it was built with CUDA itself; the stable ABI needs no such torch."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", cpp_extension.CUDA_HOME]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, candidates):
        if (Path(home) / "bin" / "nvcc").exists():
            return home
    raise SystemExit("FORCE_CUDA=1: nvcc was not found in CUDA_HOME, /usr/local/cuda or PATH")


def build_header(archs: str) -> Path:
    """Writes what build_info() says where bindings.cpp alone includes it; a new version compiles one file again."""
    names = {"VERSION": VERSION, "TORCH_VERSION": torch.__version__, "CUDA_ARCHS": archs}
    text = "".join(f'#define DYNOPS_{name} "{value}"\n' for name, value in names.items())
    header = ROOT / "build" / "include" / "dynops_build.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def extension():
    cuda = wants_cuda()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
    found = (*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("cpu/**/*.cpp"))
    sources = sorted(str(p.relative_to(ROOT)) for p in found)
    target = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", *target]
    flags += ["-g0"]  # Python's own flags ask for -g: 200 s of compiling and 48 MB, instead of 113 s and 4 MB
    link, library = [], []
    if cuda:
        home = cpp_extension.CUDA_HOME = cuda_home()
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("cuda/**/*.cu"))
        library, link = [f"{home}/lib64"], ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    if os.environ.get("DYNOPS_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        flags, link = [*flags, "-g1", "-O2", *checks], [*link, *checks]
    # CppExtension for both: CUDAExtension links libraries that only a torch built with CUDA has.
    return cpp_extension.CppExtension(
        "dynops._C",
        sources,
        include_dirs=[str(build_header(os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""))],
        library_dirs=library,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++17", *target]},
        extra_link_args=link,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
