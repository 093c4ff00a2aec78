"""What is predicted: an op on a shape as the work of the dense version and of ours, for every case of the benchmarks.

Densities are shares: of active output pixels, of live channels, of kept samples, of pixels of a block mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from .. import blocks, channels, experts, layers, samples
from ..expert_rows import ExpertRow
from ..report import Row
from . import work, work_blocks, work_channels, work_experts, work_pixels, work_samples
from .work import Step

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of an element
DENSITIES = (0.5, 0.25, 0.1)
BATCHES = (1, 32, 64, 256)
TOKENS = (1, 128, 8192)
SAMPLES = (64, 256)
BLOCK = 16  # pixels on a side, where no mask chose it


@dataclass(frozen=True)
class Problem:
    """One op on one shape.

    Attributes:
        op, kernel: the noun, and what of it is done.
        dense: the dense version's steps, or None where there is nothing to compare with.
        ours: the steps at a density. True as its second argument: with a plan of pixels that never waits for the
            host (the capacity form). Samples, and the rows between a stack's layers, are then as many as there is
            room for, which saves nothing: they stay compact.
        theory: FLOPs of the dense version / FLOPs that must be done, at a density.
        densities: those of the tables.
        continuous: whether ours can be asked for at any density, so that there is a break-even.
    """

    op: str
    kernel: str
    case: str
    mask: str
    dtype: str
    dense: list[Step] | None
    ours: Callable[[float, bool], list[Step]]
    theory: Callable[[float], float] = lambda density: 1.0
    densities: tuple[float, ...] = DENSITIES
    continuous: bool = False


def inverse(density: float) -> float:
    return 1 / density if density else math.inf


# ----------------------------------------------------------------------------------------- pixels


def pixel_cases() -> list[layers.Case]:
    """The layers of the benchmark; ResNet-50's and MobileNetV2's at larger batches; maps of high resolution."""
    cases = layers.all_cases()
    small = [case for case in cases if case.n == 1 and case.group in ("3x3", "1x1", "strided", "depthwise")]
    cases += [replace(case, n=n) for n in BATCHES if n > 1 for case in small]
    large = ((64, 512, 1024), (128, 256, 512), (256, 128, 256))
    return cases + [layers.Case("large", 1, c, c, h, w, k) for c, h, w in large for k in (3, 1)]


def pixel_problem(case: layers.Case, mask: str, dtype: str, variant: str = "plain") -> Problem:
    """A mask and a map to the convolution's output; ``variant`` as the benchmark's rows name it."""
    size, pixels = SIZES[dtype], work_pixels.out_pixels(case)
    packed = {"packed_out": variant.startswith("packed"), "packed_in": variant.startswith("packed in")}

    def ours(density: float, capacity: bool) -> list[Step]:
        active, share = density * pixels, work_pixels.read_share(case, mask, density)
        plan = [] if variant.endswith("plan reused") else work.mask_to_index(pixels, active, capacity)
        return [*plan, *work_pixels.conv(case, active, size, share, capacity=capacity, **packed)]

    kernel = "convolution" if variant == "plain" else f"convolution, {variant}"
    dense, densities = work_pixels.dense(case, size), case.densities or DENSITIES
    return Problem(
        "pixels", kernel, case.name, mask, dtype, dense, ours, inverse, densities, mask == "random"
    )


def gradient_problem(case: layers.Case, mask: str, dtype: str) -> Problem:
    """The gradients of input and weight, the plan being there."""
    size, pixels = SIZES[dtype], work_pixels.out_pixels(case)

    def ours(density: float, capacity: bool) -> list[Step]:
        active, share = density * pixels, work_pixels.read_share(case, mask, density)
        steps = work_pixels.input_gradient(case, active, size)
        return [*steps, *work_pixels.weight_gradient(case, active, size, share)]

    dense, densities = work_pixels.dense_gradients(case, size), case.densities or DENSITIES
    return Problem(
        "pixels", "gradients", case.name, mask, dtype, dense, ours, inverse, densities, mask == "random"
    )


def training_problem(case: layers.Case, mask: str, dtype: str) -> Problem:
    """The convolution and its gradients."""
    forward, gradients = pixel_problem(case, mask, dtype), gradient_problem(case, mask, dtype)

    def ours(density: float, capacity: bool) -> list[Step]:
        return [*forward.ours(density, capacity), *gradients.ours(density, capacity)]

    return replace(forward, kernel="forward+backward", dense=forward.dense + gradients.dense, ours=ours)


def _pixels(dtype: str) -> list[Problem]:
    cases = [case for case in dict.fromkeys(pixel_cases()) if case.n in BATCHES]
    found = []
    for case in cases:
        kinds = [kind for kind in case.mask_kinds if kind != "photo"]
        found += [pixel_problem(case, kind, dtype) for kind in kinds]
    some = [case for case in cases if case.n in (1, 64) and case.group in ("3x3", "1x1")]
    found += [pixel_problem(case, "random", dtype, "packed out") for case in some]
    return found + [gradient_problem(case, "random", dtype) for case in some]


# ----------------------------------------------------------------------------------------- blocks


def block_problem(case: blocks.Case, mask: str, dtype: str, block: int) -> Problem:
    """A mask to the output of a stack: by tiles where the case says so, by packed rows else."""
    size = SIZES[dtype]

    def ours(density: float, capacity: bool) -> list[Step]:
        if case.path == "tiles":
            return work_blocks.tile_path(
                case, block, work_blocks.active_blocks(case, mask, density, block), size
            )
        return work_blocks.row_path(case, mask, density, block, size)

    def theory(density: float) -> float:
        rows = work_blocks.active_rows(case, mask, density, block)
        macs = [layer.macs for layer in work_blocks.stack(case)]
        full = work_blocks.active_rows(case, "top-left", 1.0, block)
        return sum(m * r for m, r in zip(macs, full[1:], strict=True)) / sum(
            m * r for m, r in zip(macs, rows[1:], strict=True)
        )

    kernel = f"{'tiles' if case.path == 'tiles' else 'rows'}, {block}x{block} blocks"
    dense, continuous = work_blocks.dense(case, size), mask == "top-left"
    return Problem("blocks", kernel, case.name, mask, dtype, dense, ours, theory, case.densities, continuous)


def _blocks(dtype: str) -> list[Problem]:
    problems = []
    for case in blocks.all_cases():
        kinds = [kind for kind in case.mask_kinds if kind != "photo"]
        problems += [block_problem(case, kind, dtype, case.block or BLOCK) for kind in kinds]
    return problems


# --------------------------------------------------------------------------------------- channels


def channel_problem(case: channels.Case, dtype: str) -> Problem:
    """Masks, or widths, and a map to the output."""
    size = SIZES[dtype]
    dense = work_pixels.dense(case.conv, size)
    return Problem(
        "channels",
        "packed" if case.packed else "gated" if case.gated else "convolution",
        case.name,
        f"{case.kind}, {case.sides}",
        dtype,
        dense,
        lambda live, capacity: work_channels.conv(case, live, size),
        lambda live: 1 / work_channels.pair_share(case, live),
        case.live,
        case.kind != "widths",  # prefixes of one and a half times a share are no channels from 2/3 on
    )


def _channels(dtype: str) -> list[Problem]:
    cases = channels.all_cases()
    cases += [replace(c, conv=replace(c.conv, n=64)) for c in cases if c.group == "half in, half out"]
    return [channel_problem(case, dtype) for case in dict.fromkeys(cases)]


# ---------------------------------------------------------------------------------------- experts


def expert_problem(layer: experts.Layer, tokens: int, dtype: str, mode: str = "forward") -> Problem:
    """SwiGLU experts, or with ``mode`` "GEMM" one product; "dense" is the same by torch's grouped_mm."""
    size = SIZES[dtype]
    ours, dense = (
        (work_experts.linear, work_experts.grouped_linear)
        if mode == "GEMM"
        else (work_experts.mlp, work_experts.grouped_mlp)
    )
    kernel, case = "GEMM" if mode == "GEMM" else "SwiGLU", f"{layer.name}, {tokens} tokens"
    steps = ours(layer, tokens, size)
    peer = dense(layer, tokens, size)
    return Problem(
        "experts", kernel, case, "uniform routing", dtype, peer, lambda d, c: steps, densities=(1.0,)
    )


def _experts(dtype: str) -> list[Problem]:
    size, problems = SIZES[dtype], []
    for tokens in TOKENS:
        problems += [expert_problem(layer, tokens, dtype) for layer in experts.LAYERS]
        problems.append(expert_problem(experts.GEMM, tokens, dtype, "GEMM"))
    for tokens in TOKENS:
        layer = experts.LAYERS[0]
        moves = {"gather": work_experts.gather, "combine": work_experts.combine}
        problems += [
            _alone("experts", name, f"{layer.name}, {tokens} tokens", dtype, function(layer, tokens, size))
            for name, function in moves.items()
        ]
    return problems


def _alone(op: str, kernel: str, case: str, dtype: str, steps: list[Step], density: float = 1.0) -> Problem:
    """One density, and nothing to compare with."""
    return Problem(op, kernel, case, "", dtype, None, lambda d, capacity: steps, densities=(density,))


# ---------------------------------------------------------------------------------------- samples


def sample_problem(case: samples.Case, dtype: str) -> Problem:
    """A mask of the samples to the block's output."""
    size = SIZES[dtype]

    def ours(share: float, capacity: bool) -> list[Step]:
        return work_samples.skip(case, round(share * case.n), size)

    dense, shares = work_samples.dense(case, size), (0.75, 0.5, 0.25)
    return Problem("samples", "skip", case.name, "random", dtype, dense, ours, inverse, shares)


def _samples(dtype: str) -> list[Problem]:
    size = SIZES[dtype]
    cases = [case for case in samples.all_cases() if not case.p99]
    cases += [replace(case, n=n) for n in SAMPLES for case in cases]
    problems = [sample_problem(case, dtype) for case in dict.fromkeys(cases)]
    for case in dict.fromkeys(replace(case, mode="residual") for case in cases):
        name, kept = case.name.split(", ", 1)[1], case.n // 2
        problems.append(_alone("samples", "gather", name, dtype, work_samples.gather(case, kept, size), 0.5))
        problems.append(
            _alone("samples", "scatter", name, dtype, work_samples.scatter(case, kept, size), 0.5)
        )
    return problems


# ------------------------------------------------------------------------------------------ plans


def _plans(dtype: str) -> list[Problem]:
    """Plans do not depend on the dtype; rows and tiles are of ``dtype`` and 256 channels."""
    row, problems = 256 * SIZES[dtype], []
    for shape in ((1, 56, 56), (64, 56, 56), (256, 56, 56), (1, 512, 1024)):
        n, h, w = shape
        pixels, case = n * h * w, f"{n},{h}x{w}"
        active = pixels / 4
        conv = layers.Case("", n, 1, 1, h, w, 3)
        needed = work_pixels.read_share(conv, "random", 0.25) * pixels
        tiles = pixels / 4 / BLOCK**2
        steps = {
            "mask to index": work.mask_to_index(pixels, active),
            "mask to index, capacity": work.mask_to_index(pixels, active, capacity=True),
            "inverse index": work.inverse_index(pixels, active),
            "needed mask, 3x3": work.needed_mask(pixels, active, needed),
            "gather rows": work.gather_rows(active, row),
            "scatter rows": work.scatter_rows(active, pixels, row),
            "gather tiles, halo 1": [work_blocks.gather_tiles(tiles, 256, BLOCK + 2, pixels, SIZES[dtype])],
            "scatter tiles": work_blocks.scatter_tiles(
                tiles, 256, BLOCK, pixels, pixels // BLOCK**2, SIZES[dtype]
            ),
        }
        problems += [_alone("plans", name, case, dtype, own, 0.25) for name, own in steps.items()]
    for tokens in TOKENS:
        index = work.expert_index(tokens * 8, 64)
        problems.append(_alone("plans", "expert index", f"{tokens} tokens, 64 experts, top-8", dtype, index))
    return problems


OPS: dict[str, Callable[[str], list[Problem]]] = {
    "pixels": _pixels,
    "blocks": _blocks,
    "channels": _channels,
    "experts": _experts,
    "samples": _samples,
    "plans": _plans,
}


# --------------------------------------------------------------------------------- measured rows

_CONV = re.compile(r"(\d+),(\d+),(\d+),(\d+)(?:x(\d+))? (\d+)x\d+(?: s(\d+))?(?: g(\d+))?")
_SAMPLES = re.compile(r"(residual|replace), (\d+),(\d+),(\d+)x\d+")
_VARIANTS = ("plain", "plan reused", "packed out", "packed in and out, plan reused")


def problem_of(row: Row | ExpertRow) -> Problem | None:
    """The problem that a row of a benchmark measured, or None for one that is not predicted (whole models, video,
    weights of samples, int8, gradients other than those of pixels)."""
    if isinstance(row, ExpertRow):
        return _expert_problem_of(row)
    known = {"layers": _pixel_problem_of, "blocks": _block_problem_of, "channels": _channel_problem_of}
    find = {**known, "samples": _sample_problem_of}.get(row.suite)
    if find is None or row.dtype not in SIZES or (row.mode != "forward" and row.suite != "layers"):
        return None
    return find(row)


def conv_case(name: str) -> layers.Case | None:
    """The convolution of a name, ``layers.Case.name``."""
    found = _CONV.fullmatch(name)
    if not found:
        return None
    n, c, o, h, w, kernel, stride, groups = (int(text) if text else 0 for text in found.groups())
    return layers.Case("", n, c, o, h, w or h, kernel, stride or 1, groups or 1)


def _pixel_problem_of(row: Row) -> Problem | None:
    case = conv_case(row.case)
    if case is None or row.variant not in _VARIANTS:
        return None
    if row.mode != "forward":
        return training_problem(case, row.mask, row.dtype)
    return pixel_problem(case, row.mask, row.dtype, row.variant)


def _block_problem_of(row: Row) -> Problem | None:
    cases = (case for case in blocks.all_cases() if (case.group, case.name) == (row.group, row.case))
    case = next(cases, None)
    if case is None or row.variant != "plain" or not row.block:
        return None
    return block_problem(case, row.mask, row.dtype, row.block)


def _channel_problem_of(row: Row) -> Problem | None:
    conv, (kind, _, sides) = conv_case(row.case), row.mask.partition(", ")
    if conv is None or kind not in channels.CHOICES or sides not in ("in and out", "in", "out"):
        return None
    gated, packed = row.group.startswith("FBS"), row.group == "FBS packed"
    return channel_problem(
        channels.Case(row.group, conv, sides, kind, (row.density,), gated, packed), row.dtype
    )


def _sample_problem_of(row: Row) -> Problem | None:
    found = _SAMPLES.fullmatch(row.case)
    if not found or row.variant != "plain":
        return None
    return sample_problem(samples.Case(found[1], *map(int, found.groups()[1:])), row.dtype)


def _expert_problem_of(row: ExpertRow) -> Problem | None:
    layer = next((own for own in (*experts.LAYERS, experts.GEMM) if own.name == row.layer), None)
    if (
        layer is None
        or row.weights != row.dtype
        or row.mode not in ("forward", "GEMM")
        or row.dtype not in SIZES
    ):
        return None
    return expert_problem(layer, row.tokens, row.dtype, row.mode)
