"""The work of residual blocks that some samples skip. See ``work.py``; a shape is a :class:`benchmarks.samples.Case`."""

from __future__ import annotations

from .. import layers
from ..samples import Case
from .work import Step, gather_rows, mask_to_index, merge_rows, scatter_rows
from .work_pixels import dense as dense_conv


def sample_size(case: Case, size: int) -> int:
    """Bytes of a sample."""
    return case.channels * case.h**2 * size


def block(case: Case, samples: float, size: int) -> list[Step]:
    """Two 3x3 convolutions of so many samples; norms and ReLUs are counted as fused, the shortcut as read with the second."""
    if not samples:
        return []
    shape = layers.Case("", 1, case.channels, case.channels, case.h, case.h, 3)
    (one,) = dense_conv(shape, size)
    weight = case.channels**2 * 9 * size
    read = samples * (one.read - weight) + weight
    first = one._replace(flops=samples * one.flops, read=read, written=samples * one.written)
    return [first, first._replace(read=read + samples * sample_size(case, size))]


def dense(case: Case, size: int) -> list[Step]:
    return block(case, case.n, size)


def skip(case: Case, kept: int, size: int) -> list[Step]:
    """From a mask of the samples to the output: plan, gather, the block on what is kept, and back to their slots."""
    row, inner = sample_size(case, size), block(case, kept, size)
    plan = mask_to_index(case.n, kept)
    gathered = gather_rows(kept, row)
    return [*plan, *gathered, *inner, *merge_rows(kept, case.n, row, case.mode == "residual")]


def gather(case: Case, kept: int, size: int) -> list[Step]:
    return gather_rows(kept, sample_size(case, size))


def scatter(case: Case, kept: int, size: int) -> list[Step]:
    """Over a copy of the batch."""
    return scatter_rows(kept, case.n, sample_size(case, size), base=True)
