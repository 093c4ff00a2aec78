"""``python -m benchmarks.gpu audit``: every kernel compiled for sm_80, sm_90 and sm_100, and its needs.

Each kernel is compiled once in each type; ``--all`` adds every form and tile, 4 times as many. No GPU is needed, and none
is used. Triton's kernels are those that the launchers launch; nvcc compiles csrc/cuda where it is installed. The exit
status is 1 where a kernel has a problem (``rules.py``).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...harness.text import aligned
from . import compiled, forms, nvcc, rules

ARCHS = (80, 90, 100)
LEGEND = """\
One line for each kernel and architecture: its worst binary, the one with the fewest warps on an SM; --kernel shows all.
regs: of a thread. stack: bytes of a thread in memory. shared: bytes of a block. warps: the most that an SM holds, of 64,
and what sets it. product: its tensor-core instructions, else FFMA. async: copies to shared memory, LDGSTS or TMA, and how
many of them move 16 bytes. LDG, STG: loads and stores, and how many of them move 16 bytes."""


@dataclass(frozen=True)
class Row:
    """One binary: its source, its needs and its problems. No binary: it did not compile."""

    kernel: str
    arch: int
    compiler: str
    binary: compiled.Binary | None
    problems: tuple[str, ...]
    form: str = ""
    type: str = ""
    tile: str = ""

    @property
    def title(self) -> str:
        return " | ".join(filter(None, (self.kernel, self.form, self.type, self.tile, f"sm_{self.arch}")))

    @property
    def badness(self) -> tuple:
        """Sorts the worst first: problems, then few warps, then many registers."""
        if self.binary is None:
            return (0,)
        return (0 if self.problems else 1, self.binary.occupancy.warps, -self.binary.registers, self.title)

    def record(self) -> dict:
        """The record that is written to files."""
        named = {name: getattr(self, name) for name in ("kernel", "form", "type", "arch", "tile")}
        if self.binary is None:
            return named | {"problems": "; ".join(self.problems), "compiler": self.compiler}
        needs = dataclasses.asdict(self.binary)
        counts, _ = needs.pop("counts"), (needs.pop("arch"), needs.pop("product"))
        occupancy = self.binary.occupancy
        bound = {"warps": occupancy.warps, "occupancy": occupancy.share, "limited_by": occupancy.limited_by}
        return (
            named | needs | bound | counts | {"problems": "; ".join(self.problems), "compiler": self.compiler}
        )


# ---------------------------------------------------------------------------------- what is compiled


def triton_rows(configuration: forms.Configuration) -> list[Row]:
    """Compiles one launch of Triton's; runs in a process of its own."""
    c = configuration
    where = {"kernel": c.launch.title, "form": f"{c.noun}: {c.form}", "type": c.type, "tile": c.launch.tile}
    where |= {"arch": c.arch, "compiler": compiled.compiler(c.arch)}
    try:
        binary = compiled.binary(c.launch, c.arch)
    except Exception as error:  # every error of the compiler is a finding about this kernel
        return [Row(**where, binary=None, problems=(_does_not_compile(error),))]
    return [Row(**where, binary=binary, problems=tuple(rules.problems(binary, c.vectors)))]


def cuda_rows(source: Path, arch: int) -> list[Row]:
    """Compiles one file of CUDA C++; runs in a process of its own."""
    compiler = nvcc.compiler()
    try:
        binaries = nvcc.binaries(source, arch)
    except RuntimeError as error:
        return [Row(source.name, arch, compiler, None, (_does_not_compile(error),))]
    return [
        Row(f"{source.name}: {name}", arch, compiler, binary, tuple(rules.problems(binary)), form=arguments)
        for name, arguments, binary in binaries
    ]


def _does_not_compile(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"does not compile: {type(error).__name__}: {lines[-1]}"


def run_all(tasks: list[tuple[Callable, tuple]], processes: int) -> Iterable[Row]:
    """The rows of all tasks, as they are done, with a count of them on stderr."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            yield from future.result()
            _progress(done, len(tasks))


def _progress(done: int, total: int) -> None:
    """A count on stderr: one line on a terminal, else one for every hundred."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} compiled", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 100 == 0 or done == total:
        print(f"{done} of {total} compiled", file=sys.stderr, flush=True)


def sample(configurations: list[forms.Configuration]) -> list[forms.Configuration]:
    """The first configuration of each kernel and type on each architecture, at the largest tile."""
    first: dict = {}
    for c in configurations:
        first.setdefault((c.arch, c.launch.title, c.type), c)
    return list(first.values())


# ------------------------------------------------------------------------------------ what is shown


HEADER = ["kernel", "form", "type", "sm", "tile", "regs", "stack", "shared", "warps", "set by", "product", "async", "LDG", "STG"]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    named = [row.kernel, row.form[:40], row.type, str(row.arch), row.tile]
    if row.binary is None:
        return named + ["-"] * (len(HEADER) - len(named))
    binary, counts, occupancy = row.binary, row.binary.counts, row.binary.occupancy
    products = ("HGMMA", "UTCMMA", "HMMA", "FFMA")
    product = next((f"{counts[name]} {name}" for name in products if counts[name]), "")
    copies = f"{counts['TMA']} TMA" if counts["TMA"] else _of(counts, "LDGSTS") if counts["LDGSTS"] else ""
    needs = [str(n) for n in (binary.registers, binary.stack, binary.shared, occupancy.warps)]
    return [*named, *needs, occupancy.limited_by, product, copies, _of(counts, "LDG"), _of(counts, "STG")]


def _of(counts: dict, name: str) -> str:
    return f"{counts[name]} ({counts[f'{name}.128']})"


def worst(rows: list[Row]) -> list[Row]:
    """The worst row of each kernel and architecture."""
    found: dict = {}
    for row in sorted(rows, key=lambda row: row.badness):
        found.setdefault((row.kernel, row.arch), row)
    return list(found.values())


def table(rows: list[Row]) -> str:
    """Kernel by kernel, the worst first in each."""
    ordered = sorted(rows, key=lambda row: (row.kernel, row.arch, row.badness))
    return aligned(HEADER, [cells(row) for row in ordered])


def summary(rows: list[Row], arch: int) -> str:
    """One line about an architecture."""
    some = [row for row in rows if row.arch == arch and row.binary is not None]
    wrong = sum(1 for row in rows if row.arch == arch and row.problems)
    kernels = len({row.kernel for row in some})
    most = max((row.binary.registers for row in some), default=0)
    shared = max((row.binary.shared for row in some), default=0)
    words = sum(1 for row in some if row.binary.stack and not row.problems)
    return (
        f"sm_{arch}: {len(some)} binaries of {kernels} kernels; {wrong} with a problem; registers to {most}, shared "
        f"memory to {shared} bytes; {words} keep one word on the stack"
    )


def write(rows: list[Row], folder: Path) -> None:
    """gpu-audit.csv: every row."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [row.record() for row in sorted(rows, key=lambda row: (row.kernel, row.arch, row.badness))]
    names = max(records, key=len, default={}).keys()
    with (folder / "gpu-audit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


# --------------------------------------------------------------------------------- the command line


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu audit", description=__doc__.partition("\n\n")[2]
    )
    add = parser.add_argument
    add("--arch", type=int, action="append", choices=ARCHS, help="only this one; may be repeated")
    add(
        "--kernel",
        default="",
        help="only kernels with this in their names, Triton's first; shows all their binaries",
    )
    add("--all", action="store_true", help="every form and tile of Triton's kernels, not one of each type")
    add("--out", type=Path, help="folder for gpu-audit.csv")
    add("--processes", type=int, default=os.cpu_count(), help="that compile at a time")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit(
            "TRITON_INTERPRET is set: kernels are made for the interpreter and cannot be compiled"
        )
    archs = options.arch or ARCHS
    every = [configuration for arch in archs for configuration in forms.configurations(arch)]
    failures = []
    if max(archs) > 80:  # some kernels need TMA
        failures += [f"{name} | no form launches it" for name in forms.unlaunched([c.launch for c in every])]
    for arch in archs:
        failures += [f"{tile} | no form launches this tile" for tile in forms.unlaunched_tiles(arch, every)]
    chosen = [c for c in every if options.kernel in c.launch.title]
    tasks = [(triton_rows, (c,)) for c in (chosen if options.all or options.kernel else sample(chosen))]
    if nvcc.find() is None:
        print("csrc/cuda: skipped, there is no nvcc")
    elif not (options.kernel and chosen):
        tasks = [(cuda_rows, (source, arch)) for source in nvcc.sources() for arch in archs] + tasks
    rows = [row for row in run_all(tasks, options.processes) if options.kernel in row.kernel]
    if not rows:
        raise SystemExit(f"--kernel: no kernel has {options.kernel} in its name")
    failures += [f"{row.title} | {problem}" for row in rows for problem in row.problems]
    print(table(rows if options.kernel else worst(rows)), LEGEND, sep="\n")
    print(*(summary(rows, arch) for arch in archs), sep="\n")
    for failure in sorted(failures):
        print(f"FAILED {failure}")
    if options.out:
        write(rows, options.out)
    return 1 if failures else 0
