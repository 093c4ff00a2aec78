"""Launches recorded instead of made: the launchers of ``dynops/kernels`` run on CPU tensors, and no GPU is needed.

A launch is kept as the things that Triton compiles it from: the kernel, the types of its arguments, which of them are
constants or multiples of 16, and the options. Two launches with equal ones share a binary.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dynops.kernels import configs
from dynops.kernels.triton import gemm, tiling
from dynops.kernels.triton.tiling import Tile

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """Everything that determines a binary but the architecture. It can be sent to another process.

    Attributes:
        module, name: where the kernel is.
        signature: each argument's name and type, "constexpr" where it is a constant.
        constants: names and values.
        aligned: names of the pointers and numbers that are multiples of 16.
        options: the compiler's, ``num_warps`` and ``num_stages`` among them.
    """

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, object], ...]

    @property
    def kernel(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def title(self) -> str:
        """The kernel as tables name it: ``pixels.conv_kernel``."""
        return f"{self.module.rpartition('.')[2]}.{self.name}"

    @property
    def tile(self) -> str:
        """``128x256x64 w8 s3``: what a program computes, its warps, and the stages of its pipeline; ``r128``: at most
        so many registers."""
        values = dict(self.constants) | dict(self.options)
        sizes = "x".join(
            str(values[name])
            for name in ("M", "BOX_H", "BOX_W", "N", "K", "P", "UNIT", "BLOCK")
            if name in values
        )
        most = f" r{values['maxnreg']}" if "maxnreg" in values else ""
        return f"{sizes} w{values.get('num_warps', 4)} s{values.get('num_stages', '-')}{most}"


def describe(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """The launch of a kernel with these arguments, specialised on them as Triton does."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        is_tensor, specialized = isinstance(value, torch.Tensor), not parameter.do_not_specialize
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (specialized and is_number and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, _type(value)))
        address = value.data_ptr() if is_tensor else value if is_number and specialized else 1
        if address % 16 == 0 and not parameter.do_not_specialize_on_alignment:
            aligned.append(name)
    parts = (signature, constants, aligned, sorted(options.items()))
    return Launch(kernel.__module__, kernel.__name__, *map(tuple, parts))


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool):
        return "u1"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def tiles(arch: int) -> list[tuple[str, Tile]]:
    """The kinds of product and the tiles that a launch may take: those of the tables, and those that were measured."""
    config = configs.shipped(f"sm_{arch}")
    measured = (
        [(e["kind"], Tile(**e["tile"])) for e in config.tiles if e["tile"]] if config is not None else []
    )
    kinds = [kind for owner, kind in tiling.TILES if owner == arch]
    table = [(kind, tile) for kind in kinds for tile in tiling.table(arch, kind, "experts")]
    return list(dict.fromkeys(table + measured))


@contextlib.contextmanager
def recorded(
    arch: int, float32: str = "ieee", processors: int = 1, wanted: tuple[str, Tile] | None = None
) -> Iterator[list[Launch]]:
    """Within it, the launches are appended to the list, as a GPU would get them.

    Args:
        arch: the GPU's architecture: 80, 90 or 100.
        float32: how products of float32 are computed, "tf32" or "ieee".
        processors: the GPU's SMs: where there are many, reductions are split.
        wanted: a kind of product and the tile that it takes where it may; others take the largest that they may.
    """
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(describe(self, args, kwargs))

    def precision(dtype: torch.dtype, product: str = "conv") -> str:
        return float32 if dtype == torch.float32 else "half"

    def built_in(device, family: str, kind: str, limits: tiling.Limits, *problem: int) -> Tile:
        some = filter(limits.allow, tiling.table(arch, kind, family))
        tile = max(some, key=lambda tile: tile.m * tile.n)
        others = () if family == "experts" else tiling.EXPERT_TILES[kind]
        if wanted is not None and wanted[0] == kind and limits.allow(wanted[1]) and wanted[1] not in others:
            tile = wanted[1]
        return limits.registers(tile, arch)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiling, "device_facts", lambda device: (arch, processors)),
        mock.patch.object(tiling, "precision", precision),
        mock.patch.object(tiling, "built_in", built_in),
    ):
        yield launches


@dataclass(frozen=True)
class Form:
    """One way of calling launchers: which tensors there are, and what their sizes make of the kernels.

    Attributes:
        name: as the table shows it.
        run: calls the launchers with CPU tensors of a dtype.
        dtypes: those that it is called with.
        every_tile: the dtypes with which launches take every tile that they may, and not only the largest.
        processors: the SMs of the GPU that it is called for.
        vectors: the kernels, by name, that have to move 16 bytes at a time in this form.
    """

    name: str
    run: Callable[[torch.dtype], None]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    every_tile: tuple[torch.dtype, ...] = ()
    processors: int = 1
    vectors: tuple[str, ...] = ()

    def launches(self, arch: int, dtype: torch.dtype) -> list[Launch]:
        """The distinct launches that a GPU of this architecture gets."""
        found: dict[Launch, None] = {}
        for wanted in [None, *tiles(arch)] if dtype in self.every_tile else [None]:
            for float32 in ("tf32", "ieee") if dtype == torch.float32 else ("ieee",):
                with recorded(arch, float32, self.processors, wanted) as launches:
                    self.run(dtype)
                found |= dict.fromkeys(launches)
        return list(found)


def wide(run: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    """Calls like ``run``, with every tensor taken for one whose offsets need 64 bits."""

    def run_wide(dtype: torch.dtype) -> None:
        with mock.patch.object(gemm, "INT32_LIMIT", 1):
            run(dtype)

    return run_wide
