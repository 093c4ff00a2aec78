"""Tile sizes and precision of the Triton kernels: the table, and how a launch chooses from it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..configs import bucket, precision


class Tile(NamedTuple):
    """The work of one program: m x n outputs, k of the reduction at a time.

    ``maxnreg``: the most registers that the compiler may give a thread, so that more programs fit an SM; None: any.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    maxnreg: int | None = None


# Large first. Each is compiled ahead of time for its architecture by make gpu-audit: no spills, and tensor cores
# wherever the precision has them. The rates were not measured.
_SMALL = (Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(32, 16, 64, 4, 3))
_SMALL_TF32 = (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(32, 16, 32, 4, 3))
_IEEE = (Tile(64, 64, 16, 4, 2), Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(32, 16, 16, 4, 2))
TILES = {
    (80, "half"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL),
    (90, "half"): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), *_SMALL),
    (100, "half"): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), *_SMALL),
    (80, "tf32"): _SMALL_TF32,
    (90, "tf32"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL_TF32),
    (100, "tf32"): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), *_SMALL_TF32),
    (80, "ieee"): _IEEE,
    (90, "ieee"): _IEEE,
    (100, "ieee"): _IEEE[1:],
}
# Of experts too. Where they have few rows each, the time is that of reading their weights: blocks of 16 KB, of which
# three are on their way while a fourth is multiplied. The four warps of 16x64 issue 128 instructions for one (sm_90,
# ptxas 12.8), 15 % of an H200's clocks in which its memory delivers it; those of 32x32x64 issue 130 for 4 KB.
EXPERT_TILES = {
    "half": (Tile(64, 128, 64, 4, 4), Tile(32, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4), Tile(16, 32, 128, 4, 4), Tile(16, 16, 256, 2, 4)),
    "tf32": (Tile(32, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4), Tile(16, 32, 64, 4, 4), Tile(16, 16, 128, 2, 4)),
    "ieee": (Tile(16, 64, 32, 4, 4), Tile(16, 32, 32, 4, 4), Tile(16, 16, 64, 2, 4)),
}  # fmt: skip


# With 128 registers two programs of this tile fit an SM of sm_90, and no epilogue of a pixels' convolution spills. Left
# alone it takes 129, or up to 179 where programs walk over tiles, and then one fits.
_PAIRED = Tile(128, 128, 64, 8, 3)
# Of a reduction of so few channels in all (1x1 layers) the loads and stores around it are the most, and programs overlap.
SHORT = 512
# Multiply-adds of an SM in a clock, dense, by the datasheets of A100, H100 and B200; without tensor cores for "ieee".
_RATE = {"half": {80: 1024, 90: 2048, 100: 4096}, "tf32": {80: 512, 90: 1024, 100: 2048}, "ieee": {80: 64, 90: 128, 100: 128}}  # fmt: skip
# Bytes in a clock that one SM can take from L2 (CUDA's tuning guides), and that L2 gives to each SM where all of them
# take: an A100's datasheet has 5120 for 108 SMs; the others are guesses, on sm_90 from 6 TB/s for 132 SMs at 1.7 GHz.
_PORT = 64
_L2 = {80: 47, 90: 27, 100: 32}
_CLOCK = {80: 1410, 90: 1755, 100: 1850}  # MHz, the boost clocks of those datasheets


def choose(
    x: Tensor, rows: int, n: int, k: int, batch: int, *,
    family: str, indirect: bool, ragged: bool = False, residual: bool = False, short: bool = False,
    largest: dict | None = None, tallest: int = 256, product: str = "conv",
) -> tuple[dict, str]:  # fmt: skip
    """The tile and the precision of ``batch`` products ``[rows, k] @ [k, n]``.

    Of the tiles that do not spill and are not wider than ``n``: the one that was measured to be the fastest
    nearest to this problem (``configs``), else the one that :func:`_work` expects to be.

    Args:
        family: the kernel, as :meth:`configs.Config.tile` names it.
        indirect: the addresses of a step are themselves loaded in the step.
        ragged: channels are not a multiple of 16, so that loads are not vectors.
        residual: the epilogue reads one.
        short: the whole reduction is so few steps that programs have to overlap on an SM, :data:`SHORT` at most.
        largest: the elements of the largest tile of each kind, where they do not follow from these two.
        tallest: the rows of the tallest tile.
        product: see :func:`precision`.
    """
    kind = precision(x.dtype, product)
    most = _largest(kind, ragged, residual, short) if largest is None else largest[kind]
    widest = max(16, 1 << bucket(n))  # triton.next_power_of_2 costs 2 us
    limits = Limits(most, widest, tallest, family == "pixels")
    config = configs.of(x.device)
    tuned = None if config is None else config.tile(family, kind, most, indirect, rows, n, k, batch)
    tile = None if tuned is None else Tile(**tuned)
    if tile is None or not limits.allow(tile):
        tile = built_in(x.device, family, kind, limits, rows, n, k, batch)
    return tile_arguments(tile, k, indirect), "ieee" if kind == "half" else kind


class Limits(NamedTuple):
    """The most elements, columns and rows of a tile, and whether two of :data:`_PAIRED` fit an SM."""

    most: int
    widest: int
    tallest: int
    paired: bool = False

    def allow(self, tile: Tile) -> bool:
        return tile.n <= self.widest and tile.m <= self.tallest and tile.m * tile.n <= self.most

    def registers(self, tile: Tile, arch: int) -> Tile:
        """A tile of the table with so few registers that two programs fit an SM, where nothing spills."""
        return tile._replace(maxnreg=128) if self.paired and arch == 90 and tile == _PAIRED else tile


def built_in(
    device: torch.device, family: str, kind: str, limits: Limits, rows: int, n: int, k: int, batch: int
) -> Tile:
    """The tile of the table that is expected to be the fastest for a problem; see :func:`choose`."""
    return _fastest(*device_facts(device), kind, limits, rows, n, k, batch, family)


@functools.lru_cache(4096)
def _fastest(
    arch: int, processors: int, kind: str, limits: Limits, rows: int, n: int, k: int, batch: int, family: str
) -> Tile:
    problem, costs = (rows, n, k, batch, family.endswith("_weight")), (processors, *_loads(kind, arch))
    some = filter(limits.allow, table(arch, kind, family))
    return limits.registers(min(some, key=lambda t: _work(t, *problem, *costs)), arch)


def table(arch: int, kind: str, family: str) -> tuple[Tile, ...]:
    """The tiles that a kernel may take on an architecture."""
    return TILES[arch, kind] + (EXPERT_TILES[kind] if family == "experts" else ())


def expected_us(device: torch.device, tile: Tile, rows: int, n: int, k: int) -> float:
    """The time of a product ``[rows, k] @ [k, n]`` of half precision by :func:`_work`, if nothing else takes longer."""
    arch, processors = device_facts(device)
    work = _work(tile, rows, n, k, 1, False, processors, *_loads("half", arch))
    return k * work / (_RATE["half"][arch] * _CLOCK[arch])


def _loads(kind: str, arch: int) -> tuple[float, float]:
    """The multiply-adds of an SM that take as long as one element through its port, and from the L2 of all."""
    width = 2 if kind == "half" else 4  # bytes
    return _RATE[kind][arch] * width / _PORT, _RATE[kind][arch] * width / _L2[arch]


def _work(
    tile: Tile,
    rows: int,
    n: int,
    k: int,
    batch: int,
    slices: bool,
    processors: int,
    port: float,
    shared: float,
) -> float:
    """The time of a problem for one step of the reduction, in multiply-adds of one SM.

    A tile multiplies m * n elements and loads m + n. Large ones load less for each product. Small ones leave fewer
    SMs idle in the last wave and fewer rows and columns past the end. Products, what an SM loads and what all load
    go on at the same time: the longest of them counts.

    Args:
        slices: the reduction is cut where programs are too few, as ``pixels_weight_grad.chunk_rows`` does.
        port: the multiply-adds that take as long as an SM takes to load one element alone.
        shared: the same where all SMs load.
    """
    m, width = tile.m, tile.n
    programs = batch * -(-rows // m) * -(-n // width)  # triton.cdiv costs 3 us
    parts = max(1, min(4 * processors // programs, k // (8 * tile.k))) if slices else 1
    loads = m + width
    if parts > 1:  # each part is a float32 copy, written and read again
        loads += 4 * m * width * parts / k
    waves = -(-programs * parts // processors) / parts
    return max(waves * m * width, waves * loads * port, programs * loads * shared / processors)


def _largest(kind: str, ragged: bool, residual: bool, short: bool) -> int:
    """The elements of the largest tile that has registers for the addresses of single elements."""
    if ragged:
        return 32 * 32
    if kind == "half":  # a residual is read in pieces
        return 128 * 128 if short else 128 * 256
    return {"tf32": 64 * 64, "ieee": 32 * 32}[kind] if residual else 128 * 256


def is_ragged(sizes: dict) -> bool:
    """True if channels are not a multiple of 16, all that Triton takes for a sign of alignment."""
    return any(size % 16 for size in sizes.values())


def tile_arguments(tile: Tile, k: int, indirect: bool) -> dict:
    """The kernel's tile arguments; the block of k is less where the whole reduction is shorter.

    Triton splits the stages between the two levels of an indirect load: 5 for 3 tiles in flight.
    """
    block = min(tile.k, max(16, 1 << bucket(k)))
    stages = 2 * tile.stages - 1 if indirect else tile.stages
    arguments = {"M": tile.m, "N": tile.n, "K": block, "num_warps": tile.warps, "num_stages": stages}
    return arguments if tile.maxnreg is None else {**arguments, "maxnreg": tile.maxnreg}


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
# bytes: a capacity may be far more rows than the expected ones that a split was chosen for
_MOST_SUMS = 1 << 26
# Steps of a part at least. Not measured: a step of 128x128x64 takes 0.3 to 0.6 us by its products and bytes, and the
# kernel that adds the parts about 3 us.
_PART_STEPS = 10


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


_BOXES = (128, 64)  # pixels, as many as tiles for wgmma have rows


@functools.cache
def box_of(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The box of so many pixels, a power of two, of which the fewest cover a block; of several the squarest."""
    shapes = [(1 << i, pixels >> i) for i in range(pixels.bit_length())]
    return min(shapes, key=lambda box: (boxes_in(size, box), abs(math.log2(box[0] / box[1])), box[0]))


def boxes_in(size: tuple[int, int], box: tuple[int, int]) -> int:
    """The boxes that cover a block."""
    return -(-size[0] // box[0]) * -(-size[1] // box[1])


@functools.cache
def tallest_box(size: tuple[int, int]) -> int:
    """The pixels of the largest box of which a quarter at most lies outside of the block; else of the best one."""
    computed = {m: boxes_in(size, box_of(size, m)) * m for m in _BOXES}
    least = max(4 / 3 * size[0] * size[1], min(computed.values()))
    return next(m for m, pixels in computed.items() if pixels <= least)
