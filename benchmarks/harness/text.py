"""Tables as text, numbers as they are written to files."""

from __future__ import annotations

import math
import re


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no infinity
    return value


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; text to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    number = [all(re.match(r"^-?[\d.]*x?$", row[i]) for row in rows) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        columns = zip(cells, widths, number, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in columns).rstrip()

    return "\n".join([line(header), *map(line, rows)])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
