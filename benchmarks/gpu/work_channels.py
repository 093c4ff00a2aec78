"""The work of convolutions on the live channels of each sample. See ``work.py``; shapes and size as in ``work_pixels.py``."""

from __future__ import annotations

from ..channels import Case
from .work import INDEX, Step, channel_lists, prefix_lists
from .work_pixels import in_pixels, out_pixels, unit, weights

PAD = 16  # compacted channels of a sample are a multiple (kernels.channel_lists.PAD)
SECTOR = 32  # bytes that memory is read in: of single channels in a row the neighbours come along


def pair_share(case: Case, live: float) -> float:
    """The share of the (input, output) pairs of channels that are live in both, expected; depthwise: of the outputs."""
    return live if case.conv.groups == case.conv.c else live ** len(_sides(case))


def conv(case: Case, live: float, size: int) -> list[Step]:
    """From masks, or widths, to a dense output (packed: packed maps, the input's lists given).

    As ``kernels/channels.py`` does it: several taps read a compacted copy of the input, and the weight is compacted for each
    sample where that takes no more than twice the memory of the maps. What is not live is written as zeros.
    """
    shape, sides = case.conv, _sides(case)
    jobs = 1 if case.kind == "one width" else shape.n
    ins, outs = (live if side in sides else 1.0 for side in ("in", "out"))
    lists = prefix_lists if "width" in case.kind else channel_lists
    listed = [shape.c] * ("in" in sides and not case.packed) + [shape.o] * ("out" in sides)
    steps = [step for channels in listed for step in lists(jobs, channels)]
    x, copied = _input(case, ins, size)
    w, packed = _weight(case, jobs, ins, outs, size)
    scale = shape.n * shape.o * size if case.gated else 0
    written = out_pixels(shape) * shape.o * size * (outs if case.packed else 1)
    product = 2 * shape.dense_macs * pair_share(case, live)
    return [*steps, *copied, *packed, Step("product", product, x + w + scale, written, unit(shape))]


def _sides(case: Case) -> list[str]:
    return [side for side in ("in", "out") if side in case.sides]


def _input(case: Case, ins: float, size: int) -> tuple[float, list[Step]]:
    """Bytes that the product reads of the input, and the steps that compact it."""
    shape = case.conv
    if "in" not in case.sides:
        return in_pixels(shape) * shape.c * size, []
    live = in_pixels(shape) * shape.c * ins * size
    if case.packed:
        touched = live
    else:
        touched = in_pixels(shape) * shape.c * size * _sectors(case.kind, ins, size)
    if shape.kernel == 1 or unit(shape) == "vector":
        return touched, []
    compact = in_pixels(shape) * _padded(shape.c * ins) * size
    return compact, [Step("compact input", read=touched, written=compact)]


def _sectors(kind: str, live: float, size: int) -> float:
    """The share of a row's sectors that have a live channel: prefixes have them side by side, others scattered."""
    if "width" in kind:
        return live
    together = 8 if kind == "groups of 8" else 1
    return 1 - (1 - live) ** max(1, SECTOR // size // together)


def _weight(case: Case, jobs: int, ins: float, outs: float, size: int) -> tuple[float, list[Step]]:
    """Bytes that the product reads of the weight, and the steps that compact it."""
    shape = case.conv
    maps = in_pixels(shape) * shape.c * (ins if case.packed else 1)
    maps += out_pixels(shape) * shape.o * (outs if case.packed else 1)
    if "in" not in case.sides or unit(shape) == "vector" or jobs * weights(shape) > 2 * maps:
        return weights(shape) * size, []
    packed = jobs * shape.o * outs * shape.kernel**2 * _padded(shape.c * ins / shape.groups) * size
    lists = INDEX * jobs * (shape.c * ins + shape.o * outs)
    return packed, [Step("compact weight", read=weights(shape) * size + lists, written=packed)]


def _padded(channels: float) -> int:
    return -(-round(channels) // PAD) * PAD
