"""The plot of a report."""

from __future__ import annotations

from pathlib import Path

from .rows import Row
from .tables import NO_THEORY


def pyplot():
    """matplotlib's pyplot, without a display; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(rows: list[Row], title: str, path: Path) -> bool:
    """Draws the speed-up against the share computed; False without matplotlib, or without a row that has one."""
    timed = [row for row in rows if row.ours_ms and row.theory < NO_THEORY]
    plain = [row for row in timed if row.variant == "plain" and row.suite not in ("experts", "copies")]
    plot = pyplot()
    if not plain or plot is None:
        return False
    figure, axes = plot.subplots(figsize=(8, 5.5))
    _shares(axes, plain)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plot.close(figure)
    return True


def _shares(axes, rows: list[Row]) -> None:
    """The speed-up against the share of MACs computed, with the theoretical line."""
    for kind in dict.fromkeys((row.suite, row.mask) for row in rows):
        own = [row for row in rows if (row.suite, row.mask) == kind]
        size = 60 if kind[0] == "models" else 14
        shares, speedups = [1 / row.theory for row in own], [row.speedup for row in own]
        axes.scatter(shares, speedups, s=size, label=f"{kind[0]}: {kind[1]}", alpha=0.7)
    lowest = min(1 / row.theory for row in rows)
    axes.plot([lowest, 1], [1 / lowest, 1], color="black", linewidth=1, label="theory: 1 / share computed")
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":", label="the best dense version")
    axes.set(xscale="log", yscale="log", xlabel="share of the dense MACs that is computed", ylabel="speed-up")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1) if t >= lowest * 0.9]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([0.5, 1, 2, 4, 10], ["0.5x", "1x", "2x", "4x", "10x"])
