"""The roofline: the least time of every op on a GPU that is known by its datasheet, and where ours breaks even.

    python -m benchmarks.gpu roofline [--sheet H200] [--dtype bfloat16] [--op pixels] [--measured results.json]

A step takes the longer of its FLOPs at the datasheet's rate and its bytes at the datasheet's bandwidth (``work.py``
counts both); steps follow one another, and each of their launches costs its gap. Nothing here was measured: these are
times that these steps can hardly beat, dense or ours, and a measurement's distance from them is what remains to be
won; fewer steps, with fewer bytes, are another prediction. They assume

* every SM at work: where programs are fewer than SMs, neither the idle SMs nor the price of splitting a reduction over
  them (the sums of its parts, and the kernel that adds them) is counted;
* clocks and memory at the datasheet's figures, which a copy or a large product does not quite reach:
  ``Sheet.with_ceilings`` puts what was measured in their place;
* every byte from device memory: a call whose bytes fit in the second-level cache, called again, may be faster
  (marked "L2").
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..expert_rows import ExpertRow
from ..report import Report, Row
from ..text import aligned
from .datasheets import SHEETS, Sheet, sheet_of
from .problems import OPS, SIZES, Problem, problem_of
from .work import Step

# Seconds; assumed, not measured here. Between two kernels of which the second needs the first, in a stream or in a
# CUDA graph, the device idles for about a microsecond, and filling and draining the SMs takes about one more.
GAP = 2e-6
# What driver and runtime spend on the host for one launch (published figures are 4 to 6 us). Python and torch's
# dispatcher come on top without a graph, and are not counted. It matters where the device outruns the host.
HOST_LAUNCH = 5e-6
# Copying a count to the host and waking the thread that waits for it: until then it launches nothing.
HOST_WAIT = 10e-6

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Time:
    """Seconds of some steps, and what they are made of."""

    seconds: float
    work: float  # of these, without launches and waits
    bound: str  # the largest part: "compute", "memory", "launches"
    flops: float
    bytes: float


def time_of(steps: Iterable[Step], sheet: Sheet, dtype: str, graph: bool = True) -> Time:
    """The least time of ``steps``.

    Args:
        dtype: "bfloat16", "float16" or "float32".
        graph: whether a CUDA graph is replayed. Else the host launches and waits; the later of host and device
            counts.
    """
    steps = list(steps)
    parts = {"compute": 0.0, "memory": 0.0}
    for step in steps:
        times = {"compute": step.flops / sheet.rate(dtype, step.unit), "memory": step.bytes / sheet.bandwidth}
        longer = max(times, key=times.get)
        parts[longer] += times[longer]
    launches = sum(step.launches for step in steps)
    work = sum(parts.values())
    seconds = work + launches * GAP
    if not graph:
        seconds = max(seconds, launches * HOST_LAUNCH) + sum(step.waits for step in steps) * HOST_WAIT
    parts["launches"] = seconds - work
    sums = sum(step.flops for step in steps), sum(step.bytes for step in steps)
    return Time(seconds, work, max(parts, key=parts.get), *sums)


@dataclass(frozen=True)
class Prediction:
    """What is predicted of a problem at one density, on one GPU."""

    problem: Problem
    sheet: Sheet
    density: float
    ours: Time
    dense: Time | None
    theory: float

    @property
    def ours_ms(self) -> float:
        return self.ours.seconds * 1e3

    @property
    def dense_ms(self) -> float | None:
        return self.dense.seconds * 1e3 if self.dense else None

    @property
    def speedup(self) -> float | None:
        return self.dense.seconds / self.ours.seconds if self.dense else None

    @property
    def realised(self) -> float | None:
        """speedup / theory, where dense and ours are both as fast as predicted. One that is measured may be higher: where
        the dense version is further from its own prediction than ours."""
        return self.speedup / self.theory if self.dense else None

    @property
    def realised_by_work(self) -> float | None:
        """The same without launches and waits: what the bytes and FLOPs of the steps allow, however few kernels do them."""
        return self.dense.work / self.ours.work / self.theory if self.dense else None

    @property
    def in_cache(self) -> bool:
        """Whether all that ours moves fits in the second-level cache."""
        return self.ours.bytes <= self.sheet.l2


def predicted(problem: Problem, sheet: Sheet, density: float, graph: bool = True) -> Prediction:
    ours = time_of(problem.ours(density, graph), sheet, problem.dtype, graph)
    dense = time_of(problem.dense, sheet, problem.dtype, graph) if problem.dense else None
    return Prediction(problem, sheet, density, ours, dense, problem.theory(density))


def predict(row: Row | ExpertRow, sheet: Sheet, graph: bool = False) -> Prediction | None:
    """The prediction for what a row measured, on the GPU of ``sheet``; None where nothing is predicted.

    Args:
        graph: whether the row's calls were replayed from a CUDA graph; the benchmarks call from Python.
    """
    problem = problem_of(row)
    if problem is None:
        return None
    return predicted(problem, sheet, 1.0 if isinstance(row, ExpertRow) else row.density, graph)


BISECTIONS = 10  # to a thousandth


def break_even(problem: Problem, sheet: Sheet, graph: bool = True) -> float | None:
    """The density below which ours is predicted to win, 0 where it never does; None where there is no such density."""
    if problem.dense is None or not problem.continuous:
        return None
    dense = time_of(problem.dense, sheet, problem.dtype, graph).seconds

    def wins(density: float) -> bool:
        return time_of(problem.ours(density, graph), sheet, problem.dtype, graph).seconds <= dense

    low, high = 2**-BISECTIONS, 1.0
    if wins(high):
        return high
    if not wins(low):
        return 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def predictions(
    op: str, dtype: str, sheet: Sheet, graph: bool = True
) -> Iterator[tuple[Prediction, float | None]]:
    """Every problem of an op at each of its densities, with its break-even."""
    for problem in OPS[op](dtype):
        even = break_even(problem, sheet, graph)
        for density in problem.densities:
            yield predicted(problem, sheet, density, graph), even


# ----------------------------------------------------------------------------------------- tables

HEADER = [
    "kernel",
    "case",
    "mask",
    "density",
    "GFLOP",
    "MB",
    "bound",
    "dense us",
    "ours us",
    "theory",
    "speed-up",
]
HEADER += ["realised", "without launches", "break-even"]
MEASURED_HEADER = [
    "case",
    "mask",
    "density",
    "variant",
    "bound",
    "ours us",
    "measured us",
    "measured / predicted",
]
MEASURED_HEADER += ["dense us", "measured us", "measured / predicted"]


def cells(p: Prediction, even: float | None) -> list[str]:
    bound = p.ours.bound + (", L2" if p.in_cache else "")
    return [
        p.problem.kernel,
        p.problem.case,
        p.problem.mask,
        f"{p.density:.2f}",
        f"{p.ours.flops / 1e9:.4g}",
        f"{p.ours.bytes / 1e6:.4g}",
        bound,
        _number(p.dense_ms and p.dense_ms * 1e3, "{:.1f}"),
        f"{p.ours_ms * 1e3:.1f}",
        _number(p.theory if p.dense else None, "{:.2f}x"),
        _number(p.speedup, "{:.2f}x"),
        _number(p.realised, "{:.2f}"),
        _number(p.realised_by_work, "{:.2f}"),
        _number(even, "{:.2f}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def measured_cells(p: Prediction, row: Row | ExpertRow) -> list[str]:
    """A prediction beside its measurement."""
    expert = isinstance(row, ExpertRow)
    dense = (
        row.built_in_ms.get("torch grouped_mm", row.built_in_ms.get("grouped_mm")) if expert else row.dense_ms
    )
    return [
        p.problem.case,
        p.problem.mask,
        f"{p.density:.2f}",
        p.problem.kernel if expert else row.variant,
        p.ours.bound + (", L2" if p.in_cache else ""),
        f"{p.ours_ms * 1e3:.1f}",
        f"{row.ours_ms * 1e3:.1f}",
        f"{row.ours_ms / p.ours_ms:.2f}",
        _number(p.dense_ms and p.dense_ms * 1e3, "{:.1f}"),
        _number(dense and dense * 1e3, "{:.1f}"),
        _number(dense and p.dense_ms and dense / p.dense_ms, "{:.2f}"),
    ]


def measured_table(report: Report, sheet: Sheet, graph: bool = False) -> str:
    """Every measured row that has a prediction, the furthest from it last."""
    pairs = [(predict(row, sheet, graph), row) for row in (*report.rows, *report.experts)]
    pairs = [(p, row) for p, row in pairs if p is not None]
    pairs.sort(key=lambda pair: pair[1].ours_ms / pair[0].ours_ms)
    return aligned(MEASURED_HEADER, [measured_cells(p, row) for p, row in pairs])


def record(p: Prediction, even: float | None) -> dict:
    """A line of the CSV. Every name says that the number is predicted, and none of it measured."""
    named = {
        "for_gpu": p.sheet.name,
        "for_dtype": p.problem.dtype,
        "for_op": p.problem.op,
        "for_kernel": p.problem.kernel,
        "for_case": p.problem.case,
        "for_mask": p.problem.mask,
        "for_density": p.density,
        "gflop": p.ours.flops / 1e9,
        "megabytes": p.ours.bytes / 1e6,
        "bound": p.ours.bound,
        "bytes_fit_l2": p.in_cache,
        "dense_us": p.dense_ms and p.dense_ms * 1e3,
        "ours_us": p.ours_ms * 1e3,
        "theory": p.theory if p.dense else None,
        "speedup": p.speedup,
        "realised": p.realised,
        "realised_without_launches": p.realised_by_work,
        "break_even_density": even,
    }
    return {f"predicted_{k}": f"{v:.4g}" if isinstance(v, float) else v for k, v in named.items()}


def write_csv(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


# ----------------------------------------------------------------------------------- command line


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    if args.measured:
        _print_measured(args)
        return
    records = []
    for name in [args.sheet] if args.sheet else list(SHEETS):
        for op in OPS if args.op == "all" else [args.op]:
            found = list(predictions(op, args.dtype, SHEETS[name], not args.eager))
            lines = [cells(p, even) for p, even in found]
            print(f"\n{op}, {args.dtype}, predicted for {name}\n" + aligned(HEADER, lines))
            records += [record(p, even) for p, even in found]
    if args.out:
        path = args.out / "gpu-roofline.csv"
        write_csv(path, records)
        print(f"\nwrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu roofline", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--sheet", choices=SHEETS, help="one GPU instead of all; for --measured: not by its name"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=SIZES)
    parser.add_argument("--op", default="all", choices=[*OPS, "all"])
    parser.add_argument(
        "--eager", action="store_true", help="called from the host instead of a CUDA graph replayed"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for gpu-roofline.csv; the committed one is in {RESULTS.name}/"
    )
    parser.add_argument(
        "--measured", type=Path, help="a results file (JSON) of this GPU, to put beside the predictions"
    )
    return parser


def _print_measured(args: argparse.Namespace) -> None:
    """Ceilings that the file's machine names, under "ceilings" as ``Sheet.with_ceilings`` takes them, replace the sheet's."""
    report = Report.load(args.measured)
    device = report.machine["device"]
    sheet = SHEETS[args.sheet] if args.sheet else sheet_of(device)
    if sheet is None:
        raise SystemExit(f"--sheet: expected one of {', '.join(SHEETS)}: there is none for {device!r}")
    sheet = sheet.with_ceilings(**report.machine.get("ceilings", {}))
    ceilings = f", with {', '.join(sheet.measured)} measured" if sheet.measured else ""
    print(f"{device}; predictions of {sheet.name}{ceilings}\n" + measured_table(report, sheet))
