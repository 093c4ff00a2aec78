"""Tables of rows and of summaries."""

from __future__ import annotations

from .rows import Row, Summary
from .text import aligned

HEADER = ["layer", "mask", "density", "dense ms", "best dense", "ours ms", "theory", "speed-up", "realised"]
NO_THEORY = 1e3  # from here on next to nothing is left to compute, and the time says what that costs
OPTIONAL = {
    "GFLOP/s": lambda row: f"{row.gflops:.0f}" if row.computed_gmacs else "",
    "roofline": lambda row: f"{row.roofline_share:.2f}" if row.roofline_ms else "",
    "best of ours": lambda row: row.ours_name,
    "gate ms": lambda row: f"{row.gate_ms:.3f}" if row.gate_ms else "",
    "dense p99": lambda row: f"{row.dense_p99_ms:.3f}" if row.dense_p99_ms else "",
    "ours p99": lambda row: f"{row.ours_p99_ms:.3f}" if row.ours_p99_ms else "",
}
SUMMARY_HEADER = ["group", "rows", "realised: median", "worst", "the worst row", "break-even: median"]
SUMMARY_HEADER += ["lowest", "slowest at density 1"]


def table(rows: list[Row]) -> str:
    """Every row, group by group; the row that realised least comes last in its group."""
    blocks = []
    for group, variant in dict.fromkeys((row.group, row.variant) for row in rows):
        own = [row for row in rows if (row.group, row.variant) == (group, variant)]
        own.sort(key=lambda row: -row.realised)
        title = group if variant == "plain" else f"{group} ({variant})"
        blocks.append(f"{title}\n" + aligned(*with_optional(own)))
    return "\n\n".join(blocks)


def row_cells(row: Row) -> list[str]:
    return [
        row.case,
        f"{row.mask}, {row.block}x{row.block} blocks" if row.block else row.mask,
        f"{row.density:.2f}",
        f"{row.dense_ms:.3f}",
        row.dense_name,
        f"{row.ours_ms:.3f}",
        f"{row.theory:.2f}x" if row.theory < NO_THEORY else "-",
        f"{row.speedup:.2f}x",
        f"{row.realised:.2f}" if row.theory < NO_THEORY else "-",
    ]


def with_optional(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of ``rows``, with those of the ``OPTIONAL`` columns that some row fills."""
    cells = {name: [cell(row) for row in rows] for name, cell in OPTIONAL.items()}
    used = {name: column for name, column in cells.items() if any(column)}
    lines = [row_cells(row) + [column[i] for column in used.values()] for i, row in enumerate(rows)]
    return [*HEADER, *used], lines


def summary_cells(s: Summary) -> list[str]:
    worst = f"{s.worst.case}, {s.worst.mask}, {s.worst.density:g}"
    optional = [s.break_even_median, s.break_even_lowest]
    cells = [s.name, str(s.count), f"{s.median:.2f}", f"{s.worst.realised:.2f}", worst]
    cells += ["-" if value is None else f"{value:.2f}" for value in optional]
    return [*cells, "-" if s.full_lowest is None else f"{s.full_lowest:.2f}x"]


def summary_table(found: list[Summary]) -> str:
    return aligned(SUMMARY_HEADER, [summary_cells(s) for s in found])
