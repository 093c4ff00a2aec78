"""PNG pictures of what a recorder saw; matplotlib is imported here and only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure  # no pyplot: its figures are global, and it asks for a display
    except ImportError as error:
        raise ImportError("matplotlib is needed for pictures: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def maps(path: Path, values: Tensor, title: str) -> Path:
    """One picture for each map of ``[N, H, W]``, in a row and on one scale."""
    values = values.float().cpu().numpy()
    figure = _figure(1.6 * max(len(values), 1) + 1, 2.2)
    figure.suptitle(title)
    top = max(float(values.max()) if values.size else 0.0, 1.0)
    axes = figure.subplots(1, max(len(values), 1), squeeze=False)[0]
    for axis, value in zip(axes, values, strict=False):
        image = axis.imshow(value, vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
        axis.set_axis_off()
    if len(values):
        figure.colorbar(image, ax=list(axes))
    figure.savefig(path)
    return path


def bars(path: Path, counts: list[int], title: str) -> Path:
    figure = _figure(max(3.0, 0.3 * len(counts)), 2.5)
    axis = figure.subplots()
    axis.set_title(title)
    axis.bar(range(len(counts)), counts)
    axis.set_xticks(range(len(counts)) if len(counts) <= 32 else [])
    figure.savefig(path)
    return path


def table(path: Path, rows: Mapping[str, list], title: str) -> Path:
    """A matrix of rates, a row for each layer and a column for each class."""
    values = [[float("nan") if v is None else v for v in row] for row in rows.values()]
    figure = _figure(2.5 + 0.35 * len(values[0]), 1.2 + 0.25 * len(values))
    axis = figure.subplots()
    axis.set_title(title)
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(values)), list(rows))
    axis.set_xlabel("class")
    figure.colorbar(image, ax=axis)
    figure.savefig(path)
    return path
