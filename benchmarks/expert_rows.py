"""Rows of the benchmark of experts, their table and their plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .text import aligned, rounded


@dataclass
class ExpertRow:
    """One layer at one number of tokens; times in milliseconds, from one run."""

    layer: str
    tokens: int
    dtype: str
    weights: str  # dtype of ours; the built-in ones have `dtype`
    mode: str  # "forward", "forward+backward", "GEMM"; "model": a whole one, where tokens a second count
    gmacs: float
    megabytes: float  # of the weights of the experts that have tokens, mean of the routings
    roofline_ms: float  # the later of: MACs at the machine's peak, those bytes at its memory speed
    built_in_ms: dict[str, float]
    ours_ms: float

    @property
    def best(self) -> str:
        return min(self.built_in_ms, key=self.built_in_ms.get)

    @property
    def speedup(self) -> float:
        """The best built-in time / ours."""
        return self.built_in_ms[self.best] / self.ours_ms

    @property
    def roofline_share(self) -> float:
        return self.roofline_ms / self.ours_ms

    @property
    def gflops(self) -> float:
        """2 x MACs a second of ours, in billions."""
        return 2e3 * self.gmacs / self.ours_ms

    def as_dict(self) -> dict:
        derived = {name: getattr(self, name) for name in ("best", "speedup", "roofline_share", "gflops")}
        return {key: rounded(value) for key, value in {**asdict(self), **derived}.items()}

    @classmethod
    def from_dict(cls, values: dict) -> ExpertRow:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


# -------------------------------------------------------------------------------------------- tables

HEADER = [
    "layer",
    "tokens",
    "weights",
    "pass",
    "best built-in",
    "its ms",
    "ours ms",
    "speed-up",
    "roofline ms",
]
HEADER += ["share of the roofline", "GFLOP/s"]


def row_cells(row: ExpertRow) -> list[str]:
    return [
        row.layer,
        str(row.tokens),
        row.weights,
        row.mode,
        row.best,
        f"{row.built_in_ms[row.best]:.3f}",
        f"{row.ours_ms:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.roofline_ms:.3f}",
        f"{row.roofline_share:.2f}",
        f"{row.gflops:.0f}",
    ]


MODEL_HEADER = ["model", "tokens a call", "best built-in", "its tokens/s", "ours tokens/s", "speed-up"]


def model_cells(row: ExpertRow) -> list[str]:
    rates = [f"{row.tokens * 1e3 / ms:.1f}" for ms in (row.built_in_ms[row.best], row.ours_ms)]
    return [row.layer, str(row.tokens), row.best, *rates, f"{row.speedup:.2f}x"]


def tables(rows: list[ExpertRow], text: Callable = aligned) -> list[str]:
    """One of layers and one of whole models, as far as there are rows; ``text``: aligned or markdown."""
    layers, models = ([r for r in rows if (r.mode == "model") == whole] for whole in (False, True))
    found = []
    if layers:
        found.append(text(["dtype", *HEADER], [[row.dtype, *row_cells(row)] for row in layers]))
    if models:
        found.append(text(["dtype", *MODEL_HEADER], [[row.dtype, *model_cells(row)] for row in models]))
    return found


def plot_experts(rows: list[ExpertRow], title: str, path: Path) -> bool:
    """Tokens on x, the best built-in time / ours on y; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[ExpertRow]] = {}
    for row in rows:
        if row.mode == "forward":
            lines.setdefault(f"{row.layer}, {row.weights} weights", []).append(row)
    for label, own in lines.items():
        axes.plot([row.tokens for row in own], [row.speedup for row in own], marker="o", label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="tokens", ylabel="the best built-in time / ours", ylim=(0, None))
    counts = sorted({row.tokens for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True
