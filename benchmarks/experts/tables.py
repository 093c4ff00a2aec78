"""The tables of experts: layers, and whole models."""

from __future__ import annotations

from collections.abc import Callable

from ..harness.rows import Row
from ..harness.text import aligned
from .layers import MODEL, ONE_GEMM

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
MODEL_HEADER = ["model", "tokens a call", "best built-in", "its tokens/s", "ours tokens/s", "speed-up"]


def row_cells(row: Row) -> list[str]:
    return [
        row.case,
        str(row.tokens),
        row.weights,
        "GEMM" if row.group == ONE_GEMM else row.mode,
        row.dense_name,
        f"{row.dense_ms:.3f}",
        f"{row.ours_ms:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.roofline_ms:.3f}",
        f"{row.roofline_share:.2f}",
        f"{row.gflops:.0f}",
    ]


def model_cells(row: Row) -> list[str]:
    rates = [f"{row.tokens * 1e3 / ms:.1f}" for ms in (row.dense_ms, row.ours_ms)]
    return [row.case, str(row.tokens), row.dense_name, *rates, f"{row.speedup:.2f}x"]


def tables(rows: list[Row], text: Callable = aligned) -> list[str]:
    """A table of layers and one of whole models, as far as there are rows; ``text``: aligned or markdown."""
    layers, models = ([r for r in rows if (r.group == MODEL) == whole] for whole in (False, True))
    found = []
    if layers:
        found.append(text(["dtype", *HEADER], [[row.dtype, *row_cells(row)] for row in layers]))
    if models:
        found.append(text(["dtype", *MODEL_HEADER], [[row.dtype, *model_cells(row)] for row in models]))
    return found
