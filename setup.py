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
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "dynops/__init__.py").read_text())[1]


def wants_cuda() -> bool:
    forced = os.environ.get("FORCE_CUDA")
    if forced is not None:
        return forced not in ("", "0")
    return shutil.which("nvcc") is not None and torch.version.cuda is not None


def extension():
    cuda = wants_cuda()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("cpu/*.cpp"))
    sources += ["csrc/bindings.cpp"]
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("cuda/*.cu")) if cuda else []
    target = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", *target]
    link = []
    if os.environ.get("DYNOPS_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        flags, link = [*flags, "-g1", "-O2", *checks], checks
    names = [
        f'-DDYNOPS_VERSION="{VERSION}"',
        f'-DDYNOPS_TORCH_VERSION="{torch.__version__}"',
        f'-DDYNOPS_CUDA_ARCHS="{archs}"',
    ]
    return (CUDAExtension if cuda else CppExtension)(
        "dynops._C",
        sources,
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": flags + names, "nvcc": ["-O3", "-std=c++17", *target]},
        extra_link_args=link,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
