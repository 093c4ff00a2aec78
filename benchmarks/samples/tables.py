"""The tables of samples: copies, and the rows that are furthest from their targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..harness.rows import Row
from ..harness.text import aligned

GATED = "gated"  # the variant of a block whose gate is computed in the timing
WORST = "every gate open, p50 and p99"
COPY_HEADER = ["op", "samples", "MB", "plain copy GB/s", "best of torch", "its GB/s", "ours GB/s", "speed-up"]


def copy_table(rows: list[Row], text: Callable = aligned) -> str:
    return text(["dtype", *COPY_HEADER], [[row.dtype, *copy_cells(row)] for row in rows])


def copy_cells(row: Row) -> list[str]:
    rates = [row.megabytes / ms for ms in (row.roofline_ms, row.dense_ms, row.ours_ms)]
    copied, best, ours = (f"{rate:.1f}" for rate in rates)
    return [
        row.group,
        row.case,
        f"{row.megabytes:.1f}",
        copied,
        row.dense_name,
        best,
        ours,
        f"{row.speedup:.2f}x",
    ]


# ----------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """The share that rows of some groups are to realise; where every gate is open that is their speed-up."""

    name: str
    groups: tuple[str, ...]
    bound: float
    density: float | None = None  # of these rows only

    def worst(self, rows: list[Row]) -> Row | None:
        own = [row for row in rows if row.group in self.groups and self.density in (None, row.density)]
        return min(own, key=lambda row: row.realised, default=None)


BLOCKS = ("residual block", "replace block")
TARGETS = (
    Target("blocks that half of the samples skip", BLOCKS, 0.9, 0.5),
    Target("every gate open", BLOCKS, 1 / 1.05, 1.0),
    Target("early exit", ("early exit",), 0.9),
    Target("SkipNet of the shape of ResNet-110", ("SkipNet",), 0.9),
)


def target_table(rows: list[Row]) -> str:
    """The row that is furthest from each target."""
    found = [(target, worst) for target in TARGETS if (worst := target.worst(rows))]
    lines = [
        [
            target.name,
            f"{target.bound:.2f}",
            f"{row.realised:.2f}",
            f"{row.case}, {row.variant}",
            "yes" if row.realised >= target.bound else "no",
        ]
        for target, row in found
    ]
    return aligned(["target: realised", "at least", "worst", "the worst row", "reached"], lines)
