"""The command line of the benchmarks: ``python -m benchmarks headline|layers|…|all|incremental|readme``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from . import front_page, readme, suites
from .experts.tables import tables as expert_tables
from .harness import masks
from .harness.machine import file_stem, machine_line
from .harness.report import Report
from .harness.rows import summaries
from .harness.setting import Setting
from .harness.tables import summary_table, table
from .incremental import __main__ as incremental
from .incremental import tables as incremental_tables
from .pixels import formats, layers, memory
from .samples.tables import copy_table

ROOT = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOUNS = ("pixels", "blocks", "channels", "samples")
OWN_TABLES = {"formats": formats.table, "memory": memory.table, "copies": copy_table}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["incremental"]:  # it has options and rows of its own
        incremental.main(arguments[1:])
        return
    args = _parser().parse_args(arguments)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.op != "pixels" and args.command != "layers":
        raise SystemExit(f"--op {args.op}: expected with the command layers, got {args.command}")
    if args.command == "readme":
        write_readme(ROOT.parent, args.out or ROOT / "results")
        return
    setting, out = _setting(args), args.out or ROOT / "out"
    if args.command == "headline":
        _finish(suites.headline(setting), "headline", setting, out)
        return
    chosen = [args.command if args.op == "pixels" else args.op]
    if args.command == "all":
        chosen = list(suites.SUITES)
    for suite in (suite for suite in chosen if suites.modules_of(suite, setting)):
        _finish(suites.run(suite, setting, args.quick), suite, setting, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    own = ["layers", "formats", "models", "experts", "video", "memory", "exact"]
    parser.add_argument(
        "command",
        choices=["headline", *own, "all", "incremental", "readme"],
        help="incremental has options of its own (incremental -h); readme rewrites README's numbers from results/",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1], metavar="D")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--op", default="pixels", choices=NOUNS, help="the noun that layers skips")
    parser.add_argument("--backward", action="store_true", help="forward and backward, for both")
    parser.add_argument("--quick", action="store_true", help="fewer layers, shorter, no compiled layers")
    parser.add_argument("--out", type=Path, help="folder for JSON, of headline PNG too (benchmarks/out)")
    return parser


def _setting(args: argparse.Namespace) -> Setting:
    setting = Setting(
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        densities=tuple(sorted(args.density, reverse=True)),
        backward=args.backward,
    )
    wrong = [d for d in setting.densities if not 0 < d <= 1]
    if wrong:
        raise SystemExit(f"--density: expected numbers in (0, 1], got {wrong}")
    if not masks.has_photograph():
        setting = dataclasses.replace(setting, mask_kinds=("random", "square"))
    return setting


def _finish(result: Report, suite: str, setting: Setting, out: Path) -> None:
    """Prints everything, the summary last, and writes the files."""
    info = result.machine
    legend = suites.LEGENDS.get(suite, suites.LEGEND)
    print(f"\n{machine_line(info)}\n{setting.dtype}, {setting.mode}\n{legend}\n")
    if not info["build"]:
        print("dynops._C is not built: these are times of the plain-PyTorch reference.\n")
    timed = [row for row in result.rows if row.suite not in (*OWN_TABLES, "experts")]
    if timed:
        print(table(timed), "\n")
        print(summary_table(summaries(timed, layers.TARGET_GROUPS)), "\n")
    for name, own_table in OWN_TABLES.items():
        if rows := result.of(name):
            print(own_table(rows), "\n")
    if rows := result.of("experts"):
        print(*expert_tables(rows), sep="\n\n", end="\n\n")
    for note in result.notes:
        print(f"note: {note}")
    stem = file_stem(info, setting.dtype_name, suite, setting.mode)
    for path in result.save(out, stem, plot=suite == "headline"):
        print(f"wrote {path}")


def write_readme(root: Path, results: Path) -> None:
    """Writes every number of README.md and docs/benchmarks.md, and README's picture, from the files in ``results``."""
    reports = [Report.load(found) for found in sorted(results.glob("*.json"))]
    reports = [found for found in reports if not found.checks]  # of a GPU: their tables are other ones
    if not reports:
        raise SystemExit(f"{results}: there are no results (python -m benchmarks all --out {results})")
    tables = {
        "table": readme.pixels_block(reports, layers.TARGET_GROUPS),
        "blocks": readme.blocks_block(reports),
        "channels": readme.channels_block(reports),
        "samples": readme.samples_block(reports),
        "exact": readme.exact_block(reports),
        "examples": readme.examples_block(results),
        "experts": readme.experts_block(reports),
        "incremental": readme.incremental_block(results),
    }
    for name, table_of in tables.items():
        readme.rewrite(root / "docs" / "benchmarks.md", name, table_of)
    readme.rewrite(root / "README.md", "headline", front_page.headline_block(reports))
    front_page.draw(reports, root / "docs" / "img" / "resnet50.png")
    incremental_tables.draw_results(results, root / "docs" / "img" / "incremental.png")
    print(f"{root}: numbers of {len(reports)} files in {results}")


if __name__ == "__main__":
    main()
