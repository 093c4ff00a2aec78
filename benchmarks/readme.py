"""The README's blocks of numbers, written from the committed results."""

from __future__ import annotations

import statistics
from pathlib import Path

from .blocks.stacks import PIXELS
from .experts.tables import tables
from .harness.machine import machine_line
from .harness.report import Report
from .harness.rows import Row, summaries
from .harness.tables import HEADER, SUMMARY_HEADER, row_cells, summary_cells, with_optional
from .harness.text import markdown
from .samples.tables import BLOCKS, copy_table

NO_BLOCKS = "No results of blocks are committed yet: `python -m benchmarks layers --op blocks --out benchmarks/results`."
NO_CHANNELS = "No results of channels are committed yet: `python -m benchmarks layers --op channels --out benchmarks/results`."
NO_SAMPLES = "No results of samples are committed yet: `python -m benchmarks layers --op samples --out benchmarks/results`."
NO_EXACT = (
    "No results of exact masks are committed yet: `python -m benchmarks exact --out benchmarks/results`."
)
NO_EXAMPLES = "No results of the examples are committed yet: `python -m examples.all --out benchmarks/results/examples.md`."
NO_INCREMENTAL = "No results of incremental models are committed yet: `python -m benchmarks incremental --out benchmarks/results`."
NO_EXPERTS = (
    "No results of experts are committed yet: `python -m benchmarks experts --out benchmarks/results`."
)
# Of these the README shows every row; of the other groups a line.
CHANNEL_ROWS = ("FBS", "FBS packed", "widths of samples", "CondConv", "CGNet", "DRConv", "involution")
_ORDER = {"float32": 0, "bfloat16": 1, "float16": 2}


def pixels_block(reports: list[Report], target_groups: tuple[str, ...]) -> str:
    """A summary of every report of layers, the models' rows, the range of the memory."""
    summary_rows, model_rows, memory, used = [], [], [], []
    for report in reports:
        layers, models = report.of("layers"), report.of("models")
        if layers:
            prefix = [layers[0].dtype, layers[0].mode]
            summary_rows += [prefix + summary_cells(s) for s in summaries(layers, target_groups)]
        model_rows += [[row.dtype, *row_cells(row)] for row in models]
        peaks = [row.ratio for row in report.of("memory")]
        memory += peaks
        used += [report] if layers or models or peaks else []
    summary_rows.sort(key=lambda cells: (_ORDER[cells[0]], cells[1] != "forward"))
    model_rows.sort(key=lambda cells: (_ORDER[cells[0]], cells[1], cells[2], -float(cells[3])))
    parts = [_machines(used)]
    if summary_rows:
        parts.append(markdown(["dtype", "pass", *SUMMARY_HEADER], summary_rows))
    if model_rows:
        parts.append(markdown(["dtype", "model", *HEADER[1:]], model_rows))
    if memory:
        parts.append(
            f"One call of a sparse layer holds {min(memory):.2f} to {max(memory):.2f} times the memory that the "
            f"dense layer's call holds at its peak ({len(memory)} rows)."
        )
    return "\n\n".join(parts)


def blocks_block(reports: list[Report]) -> str:
    """SBNet's layers over densities, scattered masks on blocks and on pixels, the video's medians."""
    used = _of_suites(reports, "blocks", "video")
    rows = [row for report in used for row in report.of("blocks")]
    parts = [_machines(used)]
    if regions := [row for row in rows if row.mask == "top-left" and row.variant == "plain"]:
        parts.append(_over_densities([row for row in regions if not row.break_even_only]))
    if scattered := [row for row in rows if row.group == "scattered"]:
        parts.append(_blocks_or_pixels(scattered))
    if frames := [row for report in used for row in report.of("video") if row.variant != "plain"]:
        cells = [[row.dtype, *row_cells(row), row.variant] for row in frames]
        parts.append(markdown(["dtype", "video", *HEADER[1:], "note"], cells))
    return "\n\n".join(parts) if used else NO_BLOCKS


def channels_block(reports: list[Report]) -> str:
    """A line for each group of rows, then the rows that are shaped like a published method."""
    used = _of_suites(reports, "channels")
    if not used:
        return NO_CHANNELS
    lines, rows = [], []
    for report in used:
        prefix = [report.rows[0].dtype, report.rows[0].mode]
        lines += [[*prefix, *summary_cells(s)[:5]] for s in summaries(report.rows)]
        rows += [[row.dtype, row.group, *row_cells(row)] for row in report.rows if row.group in CHANNEL_ROWS]
    groups = markdown(["dtype", "pass", *SUMMARY_HEADER[:5]], lines)
    return "\n\n".join([_machines(used), groups, markdown(["dtype", "method", *HEADER], rows)])


def samples_block(reports: list[Report]) -> str:
    """Blocks over the shares of kept samples, every other row, and the copies."""
    used = _of_suites(reports, "samples")
    if not used:
        return NO_SAMPLES
    rows = [row for report in used for row in report.of("samples")]
    blocks = [row for row in rows if row.group in BLOCKS]
    others = [row for row in rows if row.group not in BLOCKS]
    copies = [row for report in used for row in report.of("copies")]
    parts = [_machines(used), _over_shares(blocks)]
    if others:
        header, cells = with_optional(others)
        lines = [[row.dtype, _title(row), *own] for row, own in zip(others, cells, strict=True)]
        parts.append(markdown(["dtype", "kind", *header], lines))
    return "\n\n".join([*parts, *([copy_table(copies, markdown)] if copies else [])])


def exact_block(reports: list[Report]) -> str:
    """Every row."""
    used = _of_suites(reports, "exact")
    rows = [row for report in used for row in report.rows]
    cells = [[row.dtype, row.mode, _title(row), *row_cells(row)] for row in rows]
    return (
        "\n\n".join([_machines(used), markdown(["dtype", "pass", "kind", *HEADER], cells)])
        if rows
        else NO_EXACT
    )


def examples_block(results: Path) -> str:
    """The table that ``python -m examples.all`` wrote there."""
    path = results / "examples.md"
    return path.read_text().strip() if path.exists() else NO_EXAMPLES


def incremental_block(results: Path) -> str:
    """The tables that ``python -m benchmarks incremental`` wrote there."""
    return (
        "\n\n".join(p.read_text().strip() for p in sorted(results.glob("incremental-*.md"))) or NO_INCREMENTAL
    )


def _of_suites(reports: list[Report], *suites: str) -> list[Report]:
    """The reports of some suites (no headline, which has layers too): float32 and forward first."""
    used = [report for report in reports if report.of(*suites) and not report.of("layers")]
    return sorted(used, key=lambda r: (_ORDER[r.rows[0].dtype], r.rows[0].mode != "forward"))


def _title(row: Row) -> str:
    return row.group if row.variant == "plain" else f"{row.group}, {row.variant}"


def _over_shares(rows: list[Row]) -> str:
    """One line for a block, one column for a share of kept samples; milliseconds where none is kept."""
    shares = sorted({row.density for row in rows}, reverse=True)
    lines: dict[tuple, dict[float, Row]] = {}
    for row in rows:
        lines.setdefault((row.dtype, row.mode, row.case, row.variant), {})[row.density] = row
    header = ["dtype", "pass", "block", "gate", "dense ms", "gate ms", *(f"{share:g}" for share in shares)]
    cells = []
    for key, at in lines.items():
        some = next(iter(at.values()))
        gate = statistics.median(row.gate_ms for row in at.values())
        numbers = [_share_cell(at[share]) if share in at else "-" for share in shares]
        cells.append([*key, f"{some.dense_ms:.2f}", f"{gate:.3f}", *numbers])
    return markdown(header, cells)


def _share_cell(row: Row) -> str:
    if row.density == 0:
        return f"{row.ours_ms:.3f} ms"
    return f"{row.speedup:.2f}x ({row.realised:.2f})"


def experts_block(reports: list[Report]) -> str:
    """Every row of every report of experts, and what the machine reached."""
    used = _of_suites(reports, "experts")
    if not used:
        return NO_EXPERTS
    notes = dict.fromkeys(note for report in used for note in report.notes)
    rows = [row for report in used for row in report.rows]
    return "\n\n".join([_machines(used), *notes, *tables(rows, markdown)])


def _over_densities(rows: list[Row]) -> str:
    """One line for a stack, one column for a density: speed-up, and what was realised of the theory."""
    densities = sorted({row.density for row in rows}, reverse=True)
    lines: dict[tuple, dict[float, str]] = {}
    for row in rows:
        key = (row.dtype, row.mode, row.group, row.case)
        lines.setdefault(key, {})[row.density] = f"{row.speedup:.2f}x ({row.realised:.2f})"
    header = ["dtype", "pass", "group", "stack", *(f"{density:g}" for density in densities)]
    return markdown(header, [[*key, *(at.get(d, "-") for d in densities)] for key, at in lines.items()])


def _blocks_or_pixels(rows: list[Row]) -> str:
    """One line for a stack and mask: the speed-up on blocks, and on the mask's pixels."""
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row.dtype, row.mode, row.case, row.mask, f"{row.density:g}")
        lines.setdefault(key, {})[row.variant] = row
    cells = []
    for key, found in lines.items():
        blocks, pixels = found["plain"], found[PIXELS]
        size = f"{blocks.block}x{blocks.block}"
        numbers = [f"{value:.2f}x" for row in (blocks, pixels) for value in (row.theory, row.speedup)]
        cells.append([*key, size, *numbers])
    header = ["dtype", "pass", "stack", "mask", "density", "block size"]
    header += ["blocks: theory", "speed-up", "pixels: theory", "speed-up"]
    return markdown(header, cells)


def _machines(reports: list[Report]) -> str:
    return "\n".join(dict.fromkeys(machine_line(report.machine) for report in reports))


def rewrite(path: Path, name: str, block: str) -> None:
    """Puts ``block`` between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the file does not have both markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path}: expected the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n{block}\n{end}{after}")
