"""Measurements of an architecture that ship with the package: the tiles that won, and break-even densities.

``python -m benchmarks.gpu tune`` writes ``configs/<architecture>.json``. Without a file the rules in ``tiling.py``
choose tiles, and the dense layer runs only where a plan is full.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configs"
# How far a measured size may be from the one asked for, in factors of two, added over all sizes of a problem.
_REACH = 3


class Config:
    """The measurements of one architecture. A lookup is one dict access for sizes that were asked for before.

    Args:
        measured_on: the gpu, driver, versions and date, for the reader of the file.
        tiles: the arguments of :meth:`tile` by name and "tile", the one that won; more is for the reader.
        break_even: the arguments of :meth:`shares` by name and "shares", its result.

    Raises:
        ValueError: a tile's limit of registers that no compiler takes.
    """

    def __init__(self, measured_on: dict, tiles: list[dict], break_even: list[dict]):
        for entry in tiles:
            _check_registers((entry["tile"] or {}).get("maxnreg"))
        self.measured_on, self.tiles, self.break_even = measured_on, tiles, break_even
        forms, sizes = ("family", "kind", "most", "indirect"), ("rows", "n", "k", "batch")
        self._tiles = _Nearest(tiles, forms, sizes, "tile")
        self._shares = _Nearest(
            break_even, ("kind", "form"), ("taps", "inputs", "outputs", "pixels"), "shares"
        )

    def tile(
        self, family: str, kind: str, most: int, indirect: bool, rows: int, n: int, k: int, batch: int
    ) -> dict | None:
        """The fields of the tile that won nearest to this problem, or None where nothing near was measured.

        Args:
            family: the kernel: "pixels", "blocks", "channels" or "experts", with "_weight" for its weight gradient.
            kind: the kind of product, as :func:`precision` names it.
            most: the elements of the largest tile that has registers for this form of the kernel.
            indirect: whether the addresses of a step are loaded in the step.
            rows, n, k, batch: ``batch`` products ``[rows, k] @ [k, n]``.
        """
        return self._tiles.get((family, kind, most, indirect), rows, n, k, batch)

    def shares(self, kind: str, form: str, taps: int, inputs: int, outputs: int, pixels: int) -> dict | None:
        """The break-even of each path of a convolution, or None where nothing near was measured.

        Below this share of the output's ``pixels`` (N * H * W, halo included) the path is faster than the dense layer
        and a mask. Paths: "pixels" (the op), "rows" and "tiles" (``nn.SparseBlocks``), and "full": the op on a plan of
        every pixel against the dense layer alone. ``form``: "conv" or "depthwise".
        """
        return self._shares.get((kind, form), taps, inputs, outputs, pixels)

    def as_json(self) -> str:
        """The text that :func:`shipped` reads: an entry to a line."""
        parts = [f'"measured_on": {json.dumps(self.measured_on)}']
        for name, entries in {"tiles": self.tiles, "break_even": self.break_even}.items():
            lines = ",".join(f"\n    {json.dumps(entry)}" for entry in entries)
            parts.append(f'"{name}": [{lines}\n  ]')
        return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def _check_registers(maxnreg: int | None) -> None:
    if maxnreg is not None and not (type(maxnreg) is int and 24 <= maxnreg <= 255):
        raise ValueError(f"maxnreg: expected None or a number of registers from 24 to 255, got {maxnreg!r}")


class _Nearest:
    """Measured values by a form, which must agree, and by sizes, of which the nearest serve."""

    def __init__(self, entries: list[dict], same: tuple[str, ...], sizes: tuple[str, ...], value: str):
        self._measured: dict[tuple, list] = {}
        self._found: dict[tuple, dict | None] = {}
        for entry in entries:
            key = tuple(entry[name] for name in same)
            buckets = tuple(bucket(entry[name]) for name in sizes)
            self._measured.setdefault(key, []).append((buckets, entry[value]))

    def get(self, same: tuple, *sizes: int) -> dict | None:
        key = (same, *map(bucket, sizes))
        if key not in self._found:
            self._found[key] = self._nearest(*key)
        return self._found[key]

    def _nearest(self, same: tuple, *buckets: int) -> dict | None:
        def distance(measured) -> int:
            return sum(abs(a - b) for a, b in zip(measured[0], buckets, strict=True))

        nearest = min(self._measured.get(same, ()), key=distance, default=None)
        return nearest[1] if nearest is not None and distance(nearest) <= _REACH else None


def bucket(size: int) -> int:
    """The power of two that is not below ``size``, as its exponent."""
    return max(size - 1, 0).bit_length()


# ------------------------------------------------------------------------------ which one holds

_in_use: dict[str, Config | None] = {}  # by architecture, in place of the shipped ones


def of(device: torch.device) -> Config | None:
    """The measurements for a device, or None where there are none."""
    name = architecture(device)
    return _in_use[name] if name in _in_use else shipped(name)


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's architecture, such as "sm_90"; "cpu" for other devices than CUDA's."""
    if device.type != "cuda":
        return "cpu"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def shipped(name: str) -> Config | None:
    """The measurements that ship for an architecture, or None."""
    file = FOLDER / f"{name}.json"
    return Config(**json.loads(file.read_text())) if file.exists() else None


@contextlib.contextmanager
def use(name: str, config: Config | None) -> Iterator[None]:
    """Context in which ``config`` holds for an architecture (None: no measurements), in every thread."""
    before = dict(_in_use)
    _in_use[name] = config
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(before)


# ---------------------------------------------------------------------------- kind of product


def precision(dtype: torch.dtype, product: str = "conv") -> str:
    """The kind of product: "half", or for float32 "tf32" or "ieee", as torch's own "conv" or "matmul" takes it."""
    if dtype != torch.float32:
        return "half"
    # allow_tf32 sets this too; reading allow_tf32 itself raises after both ways of setting were used
    setting = torch.backends.cudnn.conv if product == "conv" else torch.backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
