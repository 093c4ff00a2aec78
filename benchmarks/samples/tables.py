"""The table of copies, and the names of groups of rows."""

from __future__ import annotations

from collections.abc import Callable

from ..harness.rows import Row
from ..harness.text import aligned

GATED = "gated"  # the variant of a block whose gate is computed in the timing
WORST = "every gate open, p50 and p99"
BLOCKS = ("residual block", "replace block")
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
