"""Tile sizes and precision of the Triton kernels: the table, and how a launch chooses from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """What one program computes: m x n outputs, k of the reduction at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Large first. Each was compiled ahead of time for its architecture: no spills, and tensor cores
# wherever the precision has them (tests/test_triton_aot.py). The rates were not measured.
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


def choose(
    x: Tensor, rows: int, n: int, k: int, batch: int, *,
    indirect: bool, ragged: bool = False, residual: bool = False, largest: dict | None = None,
    tallest: int = 256, product: str = "conv",
) -> tuple[dict, str]:  # fmt: skip
    """The tile and the precision of ``batch`` products ``[rows, k] @ [k, n]``.

    The largest tile that is not wider than ``n``, does not spill and still gives every SM one;
    failing that, the smallest.

    Args:
        indirect: the addresses of a step are themselves loaded in the step.
        ragged: channels are not a multiple of 16, so that loads are not vectors.
        residual: the epilogue reads one.
        largest: the elements of the largest tile of each kind, where they do not follow from these two.
        tallest: the rows of the tallest tile.
        product: see :func:`precision`.
    """
    kind = precision(x.dtype, product)
    arch, processors = device_facts(x.device)
    widest = max(16, triton.next_power_of_2(n))
    most = _largest(kind, ragged, residual) if largest is None else largest[kind]
    tiles = [t for t in TILES[arch, kind] if t.n <= widest and t.m <= tallest and t.m * t.n <= most]
    fills = (t for t in tiles if batch * triton.cdiv(rows, t.m) * triton.cdiv(n, t.n) >= processors)
    return tile_arguments(next(fills, tiles[-1]), k, indirect), "ieee" if kind == "half" else kind


def _largest(kind: str, ragged: bool, residual: bool) -> int:
    """The elements of the largest tile that has registers for the addresses of single elements."""
    if ragged or residual:
        largest = {"half": 128 * 128, "tf32": 64 * 64, "ieee": 32 * 32}[kind]
        return min(largest, 32 * 32) if ragged else largest
    return 128 * 256


def is_ragged(sizes: dict) -> bool:
    """Whether channels are not a multiple of 16, all that Triton takes for a sign of alignment."""
    return any(size % 16 for size in sizes.values())


def tile_arguments(tile: Tile, k: int, indirect: bool) -> dict:
    """The kernel's tile arguments; the block of k is less where the whole reduction is shorter.

    Triton splits the stages between the two levels of an indirect load: 5 for 3 tiles in flight.
    """
    block = min(tile.k, max(16, triton.next_power_of_2(k)))
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


def precision(dtype: torch.dtype, product: str = "conv") -> str:
    """The kind of product: "half", or for float32 "tf32" or "ieee", as torch's own "conv" or "matmul" takes it."""
    if dtype != torch.float32:
        return "half"
    # what allow_tf32 sets too, and reading that one raises where both ways of setting it were used
    setting = torch.backends.cudnn.conv if product == "conv" else torch.backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"


def direct_tile(channels: int) -> dict:
    """The tile of the kernels without a matrix product: 2048 elements."""
    n = min(64, max(16, triton.next_power_of_2(channels)))
    return {"M": 2048 // n, "N": n, "num_warps": 4}


_MOST_PARTS = 16
_PART_STEPS = 4  # of a part's pipeline of three at least, or filling it costs more than the SMs gained


def parts(device: torch.device, programs: int, steps: int) -> int:
    """Into how many parts, a power of two, a reduction of ``steps`` steps is split (split-K) so that SMs without
    a program of their own get one; each part has sums of its own, added afterwards in a fixed order.

    Few pixels with large weights need it: 12 rows of 512 channels at 7x7 are 32 programs of 72 steps.
    """
    processors = device_facts(device)[1]
    most = min(_MOST_PARTS, processors // max(programs, 1), steps // _PART_STEPS)
    return 1 << max(most.bit_length() - 1, 0)


def resident(device: torch.device) -> int:
    """About how many programs run at once: four on each SM, where registers and shared memory allow it."""
    return 4 * device_facts(device)[1]
