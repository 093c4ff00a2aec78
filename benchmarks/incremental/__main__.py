"""The command line: rows of models inside a stream, and of videos."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..harness.machine import machine, machine_line, slug
from ..harness.setting import Budget
from . import cases, run, tables, video
from .trial import Trial

FULL, QUICK = Budget(3.0, 3, 15, warmup=0, calls=1), Budget(0.5, 1, 3, warmup=0, calls=1)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks incremental", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="rows whose name holds one of these"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for the dense model too (minutes)"
    )
    parser.add_argument("--list", action="store_true", help="the names of the rows, for --only")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "out",
        help="a folder for CSV, Markdown and PNG",
    )
    options = parser.parse_args(arguments)
    if options.list:
        print(*(name for name, _ in _named(options.quick)), sep="\n")
        return
    info = machine(torch.device("cpu"))
    print(f"{machine_line(info)}\n{tables.LEGEND}\n")
    rows: list[Trial] = []
    try:
        for row in measured(options):
            rows.append(row)
            print(tables.line(row), flush=True)
    finally:  # what was measured before a failure is not lost
        _save(rows, options, info)


def _save(rows: list[Trial], options: argparse.Namespace, info: dict) -> None:
    """Writes the files. With ``--only`` the rows that are there already and were not measured stay."""
    stem = options.out / f"incremental-{slug(info['device'].replace('(R)', '').replace('Processor', ''))}"
    old = Path(f"{stem}.csv")
    if options.only and old.exists():
        rows = tables.merged(tables.load(old), rows)
    print(*(f"wrote {path}" for path in tables.write(rows, machine_line(info), stem)), sep="\n")


def _named(quick: bool) -> Iterator[tuple[str, tuple]]:
    """The name of each row, and what it belongs to."""
    for case in cases.all_cases(quick):
        for variant in case.variants:
            yield f"{case.name}: {variant.label}", (case, variant)
    for point in video.all_points(quick):
        yield f"video: {point.label}", (None, point)


def measured(options: argparse.Namespace) -> Iterator[Trial]:
    """The rows that are asked for and whose libraries are there."""
    chosen: dict = {}
    for name, (case, own) in _named(options.quick):
        if not options.only or any(part in name for part in options.only):
            chosen.setdefault(case.title if case else "", (case, []))[1].append(own)
    budget = QUICK if options.quick else FULL
    for case, own in chosen.values():
        gc.collect()
        if case is None:
            yield from _videos(own)
        elif not case.is_installed:
            print(f"{case.library} is not installed: {case.title} is left out")
        else:
            yield from run.measure(case._replace(variants=own), budget, options.compile)


def _videos(points: list[video.Point]) -> Iterator[Trial]:
    missing = [name for name, there in video.needed().items() if not there]
    if missing:
        print(f"{' and '.join(missing)}: not installed, so the videos are left out")
        return
    sweep = video.Sweep()
    for point in points:
        yield sweep.measure(point)


if __name__ == "__main__":
    main(sys.argv[1:])
