"""Launches compiled ahead of time for an architecture, and the needs of their binaries."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from . import sass
from .launches import Launch
from .occupancy import Occupancy, occupancy

WARP = 32


@dataclass(frozen=True)
class Product:
    """The largest matrix product of a kernel: ``tl.dot`` of [m, k] and [k, n] of this type."""

    m: int
    n: int
    k: int
    type: str  # of MLIR: bf16, f16, f32
    precision: str  # of float32: "ieee", "tf32"

    @property
    def on_tensor_cores(self) -> bool:
        """True where it has to run on tensor cores: all but products of float32 as IEEE has them."""
        return self.type != "f32" or self.precision != "ieee"


@dataclass(frozen=True)
class Binary:
    """The needs of one kernel's machine code.

    Attributes:
        registers: of a thread.
        stack, local: bytes of a thread in memory: where registers were not enough, they are spilled here.
        shared: bytes of a block, static and dynamic.
        threads: of a block.
        tensor_columns: of tensor memory (sm_100).
        counts: of the instructions in :data:`sass.INSTRUCTIONS`.
        product: the matrix product, where the kernel has one.
    """

    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    tensor_columns: int
    counts: dict[str, int]
    product: Product | None = None

    @cached_property
    def occupancy(self) -> Occupancy:
        return occupancy(self.arch, self.threads, self.registers, self.shared, self.tensor_columns)


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """Compiles a launch as Triton does, which keeps the result in its cache."""
    kernel = launch.kernel
    constants = {(kernel.arg_names.index(name),): value for name, value in launch.constants}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def binary(launch: Launch, arch: int) -> Binary:
    """Compiles a launch and reads its machine code."""
    compiled = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, usage),), ((_, counts),) = sass.usage(cubin).items(), sass.counts(cubin).items()
    return Binary(
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * WARP,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        counts=counts,
        product=product(compiled.asm["ttir"]),
    )


def product(ttir: str) -> Product | None:
    """The largest matrix product in Triton's IR, by rows and columns."""
    dots = re.findall(r"tt\.dot ([^\n:]*): tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", ttir)
    found = [
        Product(int(m), int(n), int(k), type_, "tf32" if "= tf32" in operands else "ieee")
        for operands, m, k, type_, n in dots
    ]
    return max(found, key=lambda dot: (dot.m, dot.n), default=None)


def compiler(arch: int) -> str:
    """The versions of what compiles for an architecture: ``Triton 3.9.0, ptxas 13.1.80``."""
    return f"Triton {triton.__version__}, ptxas {sass.version(get_ptxas(arch).path)}"
