"""The CUDA C++ kernels compiled by nvcc for an architecture, and the needs of their machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from . import sass
from .compiled import Binary

FOLDER = Path(__file__).parents[3] / "csrc" / "cuda"
_FLAGS = ("-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def find() -> str | None:
    """nvcc in ``CUDA_HOME``, ``/usr/local/cuda`` or PATH."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    found = (shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)
    return next(filter(None, found), None) or shutil.which("nvcc")


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cu"))


def binaries(source: Path, arch: int) -> list[tuple[str, str, Binary]]:
    """The kernels of a file: the name, the template's arguments, and the needs of each."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        needs = entries(_compile(source, arch, cubin))
        threads, counts = sass.bounded_threads(cubin), sass.counts(cubin)
    found = (
        Binary(
            arch=arch,
            threads=threads.get(name, block_threads()),
            tensor_columns=0,
            counts=counts[name],
            **needs[name],
        )
        for name in needs
    )
    return [(*name, binary) for name, binary in zip(demangled(list(needs)), found, strict=True)]


def entries(said: str) -> dict[str, dict[str, int]]:
    """registers, stack, local and shared of each kernel, as ``ptxas -v`` says them; local: spilled bytes."""
    found = {}
    for entry in _ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found[entry["name"]] = {
            "registers": int(entry["registers"]),
            "stack": int(entry["stack"]),
            "local": int(entry["stores"]) + int(entry["loads"]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def block_threads() -> int:
    """The threads of a block of our own kernels, which have no launch bounds."""
    return int(re.search(r"kThreads = (\d+);", (FOLDER / "launch.h").read_text())[1])


def demangled(names: list[str]) -> list[tuple[str, str]]:
    """The kernels' names and their templates' arguments; as they are where there is no c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return [(name, "") for name in names]
    lines = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [parted(line) for line in lines]


def parted(name: str) -> tuple[str, str]:
    """``void a::b<int, c::d>(int*)`` as ``b`` and ``<int, d>``."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\w+::(?=[\w(])", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    plain, bracket, arguments = name.partition("<")
    return plain, bracket + arguments


def _compile(source: Path, arch: int, cubin: Path) -> str:
    """Compiles a file, and returns the words of ptxas."""
    include = [f"-I{path}" for path in include_paths()]
    command = [find(), *_FLAGS, *include, f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip()}")
    return done.stderr


def compiler() -> str:
    """The version that compiles: ``nvcc 13.0.88``."""
    return f"nvcc {sass.version(find())}"
