"""Every Triton kernel in every configuration that ships, as launches; and the kernels that no form launches."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

import torch
from triton.runtime.jit import JITFunction

from dynops.kernels import triton as kernels

from . import forms_blocks, forms_channels, forms_experts, forms_pixels
from .launches import TYPES, Form, Launch, tiles

FORMS = {
    "pixels": forms_pixels.FORMS,
    "blocks": forms_blocks.FORMS,
    "channels": forms_channels.FORMS,
    "experts": forms_experts.FORMS,
}


@dataclass(frozen=True)
class Configuration:
    """One binary: a launch for an architecture, and the form that it comes from.

    Attributes:
        type: of the form's tensors; of a product in float32, its precision.
        vectors: True where it has to move 16 bytes at a time.
    """

    arch: int
    noun: str
    form: str
    type: str
    launch: Launch
    vectors: bool


def configurations(arch: int, forms: dict[str, tuple[Form, ...]] | None = None) -> list[Configuration]:
    """The distinct binaries of an architecture; one that several forms need is listed with the first.

    ``forms``: those of each noun, by default all.
    """
    found: dict[Launch, Configuration] = {}
    for noun, some in (FORMS if forms is None else forms).items():
        for form in some:
            for dtype in form.dtypes:
                for launch in form.launches(arch, dtype):
                    vectors = launch.name in form.vectors
                    if launch in found and not (vectors and not found[launch].vectors):
                        continue
                    found[launch] = Configuration(
                        arch, noun, form.name, _type(launch, dtype), launch, vectors
                    )
    return list(found.values())


def _type(launch: Launch, dtype: torch.dtype) -> str:
    precision = dict(launch.constants).get("PRECISION")
    return precision if dtype == torch.float32 and precision else TYPES[dtype]


def unlaunched_tiles(arch: int, configurations: list[Configuration]) -> list[str]:
    """The tiles that launches may take on an architecture with which no product is launched."""
    used = set()
    for c in (c for c in configurations if c.arch == arch):
        values = dict(c.launch.constants) | dict(c.launch.options)
        if "PRECISION" in values:
            kind = c.type if c.type in ("tf32", "ieee") else "half"
            used.add((kind, values["M"], values["N"], values["num_warps"]))
    return [
        f"{kind} {t.m}x{t.n} w{t.warps} | sm_{arch}"
        for kind, t in tiles(arch)
        if (kind, t.m, t.n, t.warps) not in used
    ]


def unlaunched(launches: list[Launch], package=kernels) -> list[str]:
    """The kernels of a package, ``@triton.jit`` functions named ``*_kernel``, that are not among the launches."""
    launched = {(launch.module, launch.name) for launch in launches}
    return sorted(f"{module}.{name}" for module, name in _kernels(package) - launched)


def _kernels(package) -> set[tuple[str, str]]:
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    ]
    return {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__
    }
