"""All examples, one after the other: ``python -m examples.all --out rows.csv`` (or .json, or .md)."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
from pathlib import Path

from .common import Result, run

NAMES = (
    "skipnet", "convnet_aig", "blockdrop", "branchynet", "msdnet", "sact", "act",
    "dynconv", "fbs", "cgnet", "condconv", "moe", "hydranet", "skip_rnn",
)  # fmt: skip


def markdown(results: list[Result]) -> str:
    """The table of the README."""
    names = ("example", "accuracy", "kMACs dense", "dynamic", "theory", "dense ms", "dynamic ms", "speed-up", "realised")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    for r in results:
        cells = (
            f"`{r.example}`", f"{100 * r.accuracy:.1f} %", f"{r.macs_dense / 1e3:.0f}", f"{r.macs_dynamic / 1e3:.0f}",
            f"{r.theory:.2f}x", f"{r.dense_ms:.2f}", f"{r.dynamic_ms:.2f}", f"{r.speedup:.2f}x", f"{r.realised:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(results: list[Result], path: Path) -> None:
    """As CSV, JSON or Markdown, by the end of the path's name."""
    rows = [result.row() for result in results]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n")
    else:
        path.write_text(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.all", description=__doc__)
    parser.add_argument("--seconds", type=float, help="train each for so long instead of its number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, action="append", default=[], help="a .csv, .json or .md; repeatable"
    )
    parser.add_argument("names", nargs="*", help="some of them; none: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"names: expected some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if odd := [path for path in arguments.out if path.suffix not in (".csv", ".json", ".md")]:
        parser.error(f"--out: expected a name that ends in .csv, .json or .md, got {odd[0]}")
    results = []
    for name in arguments.names or NAMES:
        results.append(run(importlib.import_module(f"examples.{name}"), arguments.seconds, arguments.seed))
        for path in arguments.out:  # after each: a run that is stopped leaves what it has
            write(results, path)


if __name__ == "__main__":
    main()
