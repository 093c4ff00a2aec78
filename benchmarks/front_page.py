"""The README's three numbers and its picture, from the committed results."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

from .experts.layers import ONE_GEMM
from .harness.machine import machine_line
from .harness.plots import pyplot
from .harness.report import Report
from .harness.rows import Row
from .harness.text import markdown
from .pixels import model as models

HEADER = ["what is skipped", "rows", "median speed-up", "the worst row"]
HALF = (0.45, 0.55)  # shares of samples and steps that count as half
PICTURE_SIZE, PICTURE_DENSITIES = models.SIZES[1], (0.5, 0.25, 0.1)
OURS, DENSE, LIMIT = "#00796b", "#9e9e9e", "#d84315"


def headline_block(reports: list[Report]) -> str:
    """One line for each kind of skipping: the median speed-up, and the row that gained least."""
    rows = [row for report in reports for row in report.rows if row.mode == "forward"]
    experts = [row for row in rows if row.suite == "experts"]
    quarter = [
        row for row in rows if row.suite == "layers" and row.variant == "plain" and row.density == 0.25
    ]
    half = [row for row in rows if row.suite == "samples" and HALF[0] <= row.density <= HALF[1]]
    mixtures = [row for row in experts if row.group != ONE_GEMM and row.weights == row.dtype]
    lines = [
        _line("convolutions that compute 25 % of their pixels (limit: 4x)", quarter),
        _line("experts that a token did not choose, against the fastest in transformers", mixtures),
        _line("layers and steps that half of a batch skips (limit: 2x)", half),
    ]
    used = [r for r in reports if r.of("experts", "layers", "samples")]
    machines = sorted((report.machine for report in used), key=lambda info: info["date"])
    parts = [markdown(HEADER, [line for line in lines if line])]
    if machines:
        dates = dict.fromkeys((machines[0]["date"], machines[-1]["date"]))
        parts.append(machine_line({**machines[-1], "date": " to ".join(dates)}))
    return "\n\n".join(parts)


def _line(name: str, rows: list[Row]) -> list[str] | None:
    if not rows:
        return None
    worst = min(rows, key=lambda row: row.speedup)
    median = statistics.median(row.speedup for row in rows)
    return [name, str(len(rows)), f"{median:.2f}x", f"{worst.speedup:.2f}x: {_named(worst)}"]


def _named(row: Row) -> str:
    if row.suite == "experts":
        return f"{row.case}, {row.tokens} tokens, {row.dtype}"
    name = row.case if row.suite == "layers" else f"{row.group}, {row.case}"
    return f"{name}, {row.mask} mask, {row.dtype}" if row.suite == "layers" else f"{name}, {row.dtype}"


# ----------------------------------------------------------------------------------------- the picture


def _model_rows(report: Report) -> list[Row]:
    """ResNet-50's float32 rows at the picture's size, one for each density, the fullest first."""
    case = f"ResNet-50, {PICTURE_SIZE[0]}x{PICTURE_SIZE[1]}"
    wanted = {
        row.density: row
        for row in report.rows
        if (row.suite, row.case, row.dtype, row.mode) == ("models", case, "float32", "forward")
        and row.mask == f"photo, {models.CELL}x{models.CELL} cells"
    }
    return [wanted[density] for density in PICTURE_DENSITIES if density in wanted]


def draw(reports: list[Report], path: Path) -> bool:
    """Writes the photograph, its mask and the times as a PNG; False without rows or matplotlib."""
    found = [report for report in reports if _model_rows(report)]
    plot = pyplot()
    if not found or plot is None:
        return False
    from PIL import Image  # which comes with matplotlib

    figure, (left, middle, right) = plot.subplots(
        1, 3, figsize=(10.5, 3.6), width_ratios=(1, 1, 1.75), layout="constrained"
    )
    _draw_photograph(left, middle)
    _draw_times(right, _model_rows(found[-1]), found[-1].machine)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    return True


def _draw_photograph(left, middle) -> None:
    """The photograph, and beside it the quarter of its cells that is computed."""
    image = models.photo_input(PICTURE_SIZE)
    mask = models.gate(image, 0.25, models.CELL)
    cells = mask[0].repeat_interleave(models.CELL, 0).repeat_interleave(models.CELL, 1)
    left.imshow(image[0].permute(1, 2, 0))
    left.set_title("the input", fontsize=10)
    middle.imshow((image[0] * cells + 0.93 * ~cells).permute(1, 2, 0))
    middle.set_title("what is computed: 25 %", fontsize=10)
    for axes in (left, middle):
        axes.set_axis_off()


def _draw_times(axes, rows: list[Row], machine: dict) -> None:
    """A bar for the best dense version and for each density, and a tick where the theory ends."""
    names = ["all pixels"] + [f"{100 * row.density:.0f} %" for row in rows]
    times = [rows[0].dense_ms] + [row.ours_ms for row in rows]
    bars = axes.barh(names, times, color=[DENSE] + [OURS] * len(rows), height=0.62)
    labels = [f"{times[0]:.0f} ms, PyTorch"]
    labels += [f"{row.ours_ms:.0f} ms, {row.speedup:.1f}x" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    ideal = [row.dense_ms / row.theory for row in rows]
    axes.vlines(ideal, [i + 0.6 for i in range(len(rows))], [i + 1.4 for i in range(len(rows))], color=LIMIT)
    axes.plot([], [], color=LIMIT, label="if each skipped product saved its time")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * times[0])
    axes.set_title(f"{rows[0].case}, float32, {machine['device']}, {machine['threads']} threads", fontsize=10)
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlabel("milliseconds, mask and plan included", fontsize=9)
