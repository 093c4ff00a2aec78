"""Tile sizes and precision of the Triton kernels: the table, and how a launch chooses from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..configs import bucket, precision


class Tile(NamedTuple):
    """The work of one program: m x n outputs, k of the reduction at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Large first. Each is compiled ahead of time for its architecture by make gpu-audit: no spills, and tensor cores
# wherever the precision has them. The rates were not measured.
_SMALL = (Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(32, 16, 64, 4, 3))
_SMALL_TF32 = (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(32, 16, 32, 4, 3))
_IEEE = (Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(32, 16, 16, 4, 2))
TILES = {
    (80, "half"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL),
    (90, "half"): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), *_SMALL),
    (100, "half"): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), *_SMALL),
    (80, "tf32"): _SMALL_TF32,
    (90, "tf32"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL_TF32),
    (100, "tf32"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL_TF32),
    (80, "ieee"): _IEEE,
    (90, "ieee"): _IEEE,
    (100, "ieee"): _IEEE[1:],
}


# Multiply-adds that the tensor cores of an SM do in the time in which L2 gives it one element: 1024, 2048 and 4096
# in a clock by the datasheets of A100, H100 and B200, over 64 bytes; in float32 half as many over elements twice as
# long. Without tensor cores 64 or 128 over 16 elements.
_TENSOR_CORES = {80: 32, 90: 64, 100: 128}
_LOAD = {"half": _TENSOR_CORES, "tf32": _TENSOR_CORES, "ieee": {80: 4, 90: 8, 100: 8}}


def choose(
    x: Tensor, rows: int, n: int, k: int, batch: int, *,
    family: str, indirect: bool, ragged: bool = False, residual: bool = False, largest: dict | None = None,
    tallest: int = 256, product: str = "conv",
) -> tuple[dict, str]:  # fmt: skip
    """The tile and the precision of ``batch`` products ``[rows, k] @ [k, n]``.

    Of the tiles that do not spill and are not wider than ``n``: the one that was measured to be the fastest
    nearest to this problem (``configs``), else the one that :func:`_work` expects to be.

    Args:
        family: the kernel, as :meth:`configs.Config.tile` names it.
        indirect: the addresses of a step are themselves loaded in the step.
        ragged: channels are not a multiple of 16, so that loads are not vectors.
        residual: the epilogue reads one.
        largest: the elements of the largest tile of each kind, where they do not follow from these two.
        tallest: the rows of the tallest tile.
        product: see :func:`precision`.
    """
    kind = precision(x.dtype, product)
    most = _largest(kind, ragged, residual) if largest is None else largest[kind]
    limits = Limits(most, max(16, 1 << bucket(n)), tallest)  # triton.next_power_of_2 costs 2 us
    config = configs.of(x.device)
    tuned = None if config is None else config.tile(family, kind, most, indirect, rows, n, k, batch)
    tile = None if tuned is None else Tile(**tuned)
    if tile is None or not limits.allow(tile):
        tile = built_in(x.device, family, kind, limits, rows, n, k, batch)
    return tile_arguments(tile, k, indirect), "ieee" if kind == "half" else kind


class Limits(NamedTuple):
    """The most elements, columns and rows of a tile."""

    most: int
    widest: int
    tallest: int

    def allow(self, tile: Tile) -> bool:
        return tile.n <= self.widest and tile.m <= self.tallest and tile.m * tile.n <= self.most


def built_in(
    device: torch.device, family: str, kind: str, limits: Limits, rows: int, n: int, k: int, batch: int
) -> Tile:
    """The tile of the table that is expected to be the fastest for a problem; see :func:`choose`."""
    return _fastest(*device_facts(device), kind, limits, rows, n, k, batch, family.endswith("_weight"))


@functools.lru_cache(4096)
def _fastest(
    arch: int, processors: int, kind: str, limits: Limits, rows: int, n: int, k: int, batch: int, slices: bool
) -> Tile:
    problem, load = (rows, n, k, batch, slices), _LOAD[kind][arch]
    return min(filter(limits.allow, TILES[arch, kind]), key=lambda t: _work(t, *problem, processors, load))


def _work(
    tile: Tile, rows: int, n: int, k: int, batch: int, slices: bool, processors: int, load: int
) -> float:
    """The work of the SM with most tiles for one step of the reduction, in multiply-adds.

    A tile multiplies m * n elements and loads m + n. Large ones load less for each product. Small ones leave fewer
    SMs idle in the last wave and fewer rows and columns past the end.

    Args:
        slices: the reduction is cut where programs are too few, as ``pixels_weight_grad.chunk_rows`` does.
        load: the multiply-adds that take as long as one element loaded.
    """
    m, width = tile.m, tile.n
    programs = batch * -(-rows // m) * -(-n // width)  # triton.cdiv costs 3 us
    parts = max(1, min(4 * processors // programs, k // (8 * tile.k))) if slices else 1
    loads = m + width
    if parts > 1:  # each part is a float32 copy, written and read again
        loads += 4 * m * width * parts / k
    waves = -(-programs * parts // processors) / parts
    return waves * (m * width + load * loads)


def _largest(kind: str, ragged: bool, residual: bool) -> int:
    """The elements of the largest tile that has registers for the addresses of single elements."""
    if ragged or residual:
        largest = {"half": 128 * 128, "tf32": 64 * 64, "ieee": 32 * 32}[kind]
        return min(largest, 32 * 32) if ragged else largest
    return 128 * 256


def is_ragged(sizes: dict) -> bool:
    """True if channels are not a multiple of 16, all that Triton takes for a sign of alignment."""
    return any(size % 16 for size in sizes.values())


def tile_arguments(tile: Tile, k: int, indirect: bool) -> dict:
    """The kernel's tile arguments; the block of k is less where the whole reduction is shorter.

    Triton splits the stages between the two levels of an indirect load: 5 for 3 tiles in flight.
    """
    block = min(tile.k, max(16, 1 << bucket(k)))
    stages = 2 * tile.stages - 1 if indirect else tile.stages
    return {"M": tile.m, "N": tile.n, "K": block, "num_warps": tile.warps, "num_stages": stages}


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """The architecture in the table (80, 90 or 100) and the number of SMs; the interpreter has 1."""
    if device.type != "cuda":
        return 80, 1
    major = torch.cuda.get_device_capability(device)[0]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return {9: 90, 10: 100}.get(major, 80), processors


def direct_tile(channels: int) -> dict:
    """The tile of the kernels without a matrix product: 2048 elements."""
    n = min(64, max(16, 1 << bucket(channels)))
    return {"M": 2048 // n, "N": n, "num_warps": 4}


def grid(rows: Tensor, tile: dict) -> tuple[int, int]:
    """The programs of such a kernel over the elements of ``rows`` [R, C]."""
    return -(-rows.shape[0] // tile["M"]), -(-rows.shape[1] // tile["N"])


_MOST_PARTS = 16
_MOST_SUMS = (
    1 << 26
)  # bytes: a capacity may be far more rows than the expected ones that a split was chosen for
_PART_STEPS = 4  # of a part's pipeline of three at least, or filling it costs more than the SMs gained


def parts(device: torch.device, programs: int, steps: int, outputs: int) -> int:
    """Into how many parts, a power of two, a reduction of ``steps`` steps is split (split-K) so that SMs without
    a program of their own get one; each part has sums of its own, added afterwards in a fixed order.

    Few pixels with large weights need it: 12 rows of 512 channels at 7x7 are 32 programs of 72 steps.

    Args:
        outputs: the sums of a part.
    """
    processors = device_facts(device)[1]
    room = _MOST_SUMS // (4 * max(outputs, 1))
    most = min(_MOST_PARTS, processors // max(programs, 1), steps // _PART_STEPS, room)
    return 1 << max(most.bit_length() - 1, 0)


def resident(device: torch.device) -> int:
    """About how many programs run at once: four on each SM, where registers and shared memory allow it."""
    return 4 * device_facts(device)[1]
