"""The rows as a CSV file, as tables in Markdown and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from ..harness.plots import pyplot
from ..harness.text import markdown
from .cases import EVERYTHING, NOTHING
from .trial import COLUMNS, Trial
from .video import CAMERA_VIDEO, WINDOW_VIDEO

VIDEOS = WINDOW_VIDEO, CAMERA_VIDEO
HEADER = ["model", "edit", "edited", "spread", "statistics, keys", "dense ms", "ours ms", "theory", "speed-up", "realised", "error", "PSNR", "kept MB"]  # fmt: skip
VIDEO_HEADER = ["video", "changed", "threshold", "spread", "dense ms", "ours ms", "theory", "speed-up", "error", "PSNR", "same class"]  # fmt: skip
LEGEND = """\
Batch 1, float32, random weights. dense: the faster of eager NCHW and channels_last, of the row "everything" channels_last. ours: a
call of the model inside a stream, comparison of the input included. Medians, taken in turn; each call has an image that differs from
the last one, and 32 MB were written before it. theory: MACs of everything / MACs of the rows that were computed. error: relative L2
norm against the dense output after the first edit; the PSNR's peak is the dense output's range. nothing: dense ms are the row above's."""


def merged(old: list[Trial], new: list[Trial]) -> list[Trial]:
    """The rows of a file with newer ones in their places."""
    found = {row.key: row for row in old}
    return list((found | {row.key: row for row in new}).values())


def load(path: Path) -> list[Trial]:
    with path.open(newline="") as file:
        return [Trial.from_record(record) for record in csv.DictReader(file)]


def write(rows: list[Trial], heading: str, stem: Path) -> list[Path]:
    """``stem``.csv, .md, and .png where matplotlib is there."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [Path(f"{stem}.{kind}") for kind in ("csv", "md", "png")]
    with paths[0].open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(row.record() for row in rows)
    paths[1].write_text("\n\n".join([heading, *tables(rows)]) + "\n")
    return paths if draw(rows, heading, paths[2]) else paths[:2]


def tables(rows: list[Trial]) -> list[str]:
    """Markdown: the models, and the videos."""
    models = [row for row in rows if row.edit not in VIDEOS]
    videos = [row for row in rows if row.edit in VIDEOS]
    compiled = any(row.compiled_ms for row in models)
    header = [*HEADER[:6], "compiled ms", *HEADER[6:]] if compiled else HEADER
    found = [markdown(header, [_cells(row, compiled) for row in models])] if models else []
    return found + ([markdown(VIDEO_HEADER, [_video_cells(row) for row in videos])] if videos else [])


def line(row: Trial) -> str:
    """A row as text."""
    numbers = (
        f"dense {row.dense_ms:8.1f} ms   ours {row.ours_ms:8.1f}   theory {row.theory:5.2f}   speed-up {row.speedup:5.2f}   "
        f"realised {row.realised:4.2f}   error {row.error:.0e}, last {row.last_error:.0e}   {row.psnr:5.1f} dB   {row.kept_mb:6.0f} MB kept"
    )
    return f"{row.case:<50} {_edit(row)} {row.edited:.1%}, spread {row.spread}, {_kept(row)}, threshold {_threshold(row)}\n    {numbers}"


def _edit(row: Trial) -> str:
    return f"{row.edit}, told" if row.told else row.edit


def _kept(row: Trial) -> str:
    return row.statistics if row.statistics == row.attention else f"{row.statistics}, {row.attention}"


def _threshold(row: Trial) -> str:
    return f"{row.threshold:g} {'relative' if row.relative else 'absolute'}" if row.threshold else "0"


def _cells(row: Trial, compiled: bool) -> list[str]:
    nothing = row.edit == NOTHING
    return [
        row.case,
        _edit(row),
        f"{row.edited:.1%}",
        row.spread,
        _kept(row),
        f"{row.dense_ms:.1f}",
        *([f"{row.compiled_ms:.1f}" if row.compiled_ms else "-"] if compiled else []),
        f"{row.ours_ms:.1f}",
        "-" if nothing else f"{row.theory:.2f}x",
        f"{row.speedup:.2f}x",
        "-" if nothing else f"{row.realised:.2f}",
        f"{row.error:.0e}",
        f"{row.psnr:.0f} dB" if row.error > 1e-5 else "-",
        f"{row.kept_mb:.0f}",
    ]


def _video_cells(row: Trial) -> list[str]:
    return [
        row.edit,
        f"{row.edited:.0%}",
        _threshold(row),
        row.spread,
        f"{row.dense_ms:.0f}",
        f"{row.ours_ms:.0f}",
        f"{row.theory:.2f}x",
        f"{row.speedup:.2f}x",
        f"{row.error:.1e}",
        f"{row.psnr:.0f} dB",
        f"{row.agreement:.1%}",
    ]


def draw_results(results: Path, path: Path) -> None:
    """The picture of the last file of this benchmark in a folder of results, where there is one."""
    found = sorted(results.glob("incremental-*.csv"))
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        heading = found[-1].with_suffix(".md").read_text().partition("\n")[0]
        draw(load(found[-1]), heading, path)


def draw(rows: list[Trial], title: str, path: Path) -> bool:
    """Two pictures: speed-up against the share of MACs computed, and the videos' error against speed-up."""
    plot = pyplot()
    if plot is None:
        return False
    figure, (left, right) = plot.subplots(1, 2, figsize=(13, 5.5))
    edits = [row for row in rows if row.edit not in (*VIDEOS, NOTHING, EVERYTHING)]
    _draw_models(left, edits)
    _draw_videos(right, [row for row in rows if row.edit in VIDEOS])
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plot.close(figure)
    return True


def _draw_models(axes, rows: list[Trial]) -> None:
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        axes.scatter(
            [1 / row.theory for row in own], [row.speedup for row in own], s=18, label=case, alpha=0.8
        )
    lowest = min((1 / row.theory for row in rows), default=0.1)
    axes.plot([lowest, 1], [1 / lowest, 1], color="black", linewidth=1, label="theory: 1 / share computed")
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="share of the dense MACs that is computed",
        ylabel="speed-up over dense",
    )
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1) if t >= lowest * 0.9]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([0.5, 1, 2, 4, 10, 20], ["0.5x", "1x", "2x", "4x", "10x", "20x"])


def _draw_videos(axes, rows: list[Trial]) -> None:
    kinds = {}
    for row in rows:
        kind = (
            f"spread {row.spread} px"
            if row.spread != "exact"
            else "relative threshold"
            if row.relative
            else "absolute threshold"
        )
        if not (row.spread == "exact" and not row.threshold):
            kinds.setdefault(f"{row.edit}: {kind}", []).append(row)
    for name, own in kinds.items():
        own.sort(key=lambda row: row.threshold)
        axes.plot([row.speedup for row in own], [row.error for row in own], "o-", markersize=4, label=name)
    for video in dict.fromkeys(row.edit for row in rows):
        exact = [row for row in rows if row.edit == video and row.spread == "exact" and not row.threshold]
        for row in exact:
            axes.axvline(row.speedup, linestyle=":", linewidth=0.8, color="gray", label=f"{video}: exact")
    axes.set(
        yscale="log", xlabel="speed-up over dense, FCN on a video", ylabel="relative error of the logits"
    )
