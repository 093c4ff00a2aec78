"""The command line: a table of models, and 1 as the exit status where one of them is wrong."""

from __future__ import annotations

import argparse
import csv
import pathlib
import statistics
import sys

import torch

from ..harness.machine import machine, machine_line
from . import trial, zoo


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the long list")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="models whose name holds one of these"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for a model")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for the dense baseline too (minutes)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="a folder for models.csv and models.md")
    options = parser.parse_args(arguments)
    print(machine_line(machine(torch.device("cpu"))))
    rows, missing = [], set()
    for entry in zoo.entries(options.all):
        if options.only and not any(part in entry.name for part in options.only):
            continue
        if not zoo.is_installed(entry):
            missing.add(entry.library)
            continue
        rows.append(trial.run(entry, options.batch, options.seconds, options.compile))
        print(line(rows[-1]), flush=True)
    for library in sorted(missing):
        print(f"{library} is not installed: its models are left out")
    good = [row for row in rows if not row.fault]
    if good:
        print(f"{len(good)} of {len(rows)} right; realised: median {statistics.median(r.realised for r in good):.2f}, worst {min(r.realised for r in good):.2f}")  # fmt: skip
    if options.out:
        write(rows, options.out)
    return 0 if len(good) == len(rows) > 0 else 1


def line(row: trial.Trial) -> str:
    """A row as text."""
    if not row.convs or (row.fault and not row.ours_ms):
        return f"{row.model:<42} {row.fault}"
    compiled = f"   {row.compiled_ms:.1f} ms compiled" if row.compiled_ms else ""
    numbers = (
        f"{row.convs:>4} convs {row.from_rows:>4.0%} from rows   theory {row.theory:5.2f}   "
        f"{row.dense_ms:7.1f} ms dense {row.ours_ms:7.1f} ours   speed-up {row.speedup:5.2f}   realised {row.realised:4.2f}   full {row.full:4.2f}{compiled}   "
        f"error {row.error:.0e}, full mask {row.full_error:.0e}, hooked {row.hooked_error:.0e}"
    )
    return f"{row.model:<42} {numbers} {row.fault}".rstrip()


def write(rows: list[trial.Trial], folder: pathlib.Path) -> None:
    """``models.csv`` and a table for the documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "models.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, trial.COLUMNS)
        table.writeheader()
        table.writerows(row.record() for row in rows)
    lines = [
        machine_line(machine(torch.device("cpu"))),
        "",
        "| model | convolutions | from rows | theory | speed-up | realised | full mask / dense | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row.model, row.convs, f"{row.from_rows:.0%}", f"{row.theory:.2f}", f"{row.speedup:.2f}", f"{row.realised:.2f}", f"{row.full:.2f}", row.fault or f"{row.error:.0e}")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "models.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
