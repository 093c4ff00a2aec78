"""What a check found: rows as they were written, one table with the predictions beside, and the files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import report
from ..expert_rows import ExpertRow
from ..report import Report, Row
from ..text import aligned
from . import reach
from .contests import BATCH_1
from .datasheets import Sheet, sheet_of
from .roofline import predict
from .stages import Finished, Stage

START = 15.0  # seconds that a process needs before its first contest, and that none begins before its end
DRY = "dry run on a CPU, not a measurement"
LEFT_OUT = (
    "Lone convolutions have no compiled dense version (it is the same cuDNN call); stacks and models are compiled in "
    "channels_last, which the compiler chooses for convolutions. Every dense version is replayed from a CUDA graph; of "
    "ours the faster counts: called from Python with a compact plan, or replayed with a capacity plan that has room for all. "
    "Every call finds the second-level cache without its data. float32 rows are tf32 on both sides."
)


@dataclass
class Measured:
    """What the contests wrote, ``failed``: {contest: why}, ``left``: those that had no time."""

    rows: list[Row] = field(default_factory=list)
    experts: list[ExpertRow] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def read(self, file: Path, done: Finished, limit: float) -> list[str]:
        """Takes what a worker wrote in ``file``; the contests that it began. One that it did not end is a failed one."""
        begun: list[str] = []
        ended = set()
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off with its process
            if "begun" in record:
                begun.append(record["begun"])
            elif "row" in record:
                self.rows.append(Row.from_dict(record["row"]))
            elif "expert" in record:
                self.experts.append(ExpertRow.from_dict(record["expert"]))
            elif "failed" in record:
                self.failed[record["failed"]] = record["error"]
            else:
                ended.add(record["done"])
        for title in begun:
            if title not in ended:
                self.failed[title] = done.why(limit)
        return begun

    def problems(self) -> dict:
        versions = {f"{row.case}: {name}": why for row in self.rows for name, why in row.failed.items()}
        return {"failed": self.failed, "not run": self.left, "versions that could not run": versions}


# ------------------------------------------------------------------------------------------- tables

HEADER = [
    "kind",
    "case",
    "mask",
    "density",
    "dtype",
    "best dense",
    "its ms",
    "ours",
    "ours ms",
    "theory",
    "speed-up",
    "realised",
]
HEADER += ["predicted ms", "predicted realised", "measured / predicted"]


def table(rows: list[Row], experts: list[ExpertRow], sheet: Sheet | None) -> str:
    """Every row; the predictions are those of ``sheet``, "-" where there is none."""
    ordered = sorted(
        rows, key=lambda row: (row.suite, row.group, row.dtype, row.case, row.mask, -row.density)
    )
    lines = [_cells(row, sheet) for row in ordered] + [_expert_cells(row, sheet) for row in experts]
    return aligned(HEADER, lines)


def _cells(row: Row, sheet: Sheet | None) -> list[str]:
    kind = f"{row.suite}, {row.group}" if row.group not in ("", row.suite) else row.suite
    numbers = [f"{row.dense_ms:.3f}", row.ours_name or row.variant, f"{row.ours_ms:.3f}"]
    ratios = [f"{row.theory:.2f}x", f"{row.speedup:.2f}x", f"{row.realised:.2f}"]
    labels = [kind, row.case, row.mask, f"{row.density:.2f}", row.dtype, row.dense_name]
    return [*labels, *numbers, *ratios, *_predicted(row, sheet)]


def _expert_cells(row: ExpertRow, sheet: Sheet | None) -> list[str]:
    labels = [f"experts, {row.mode}", row.layer, f"{row.tokens} tokens", "-", row.dtype, row.best]
    numbers = [f"{row.built_in_ms[row.best]:.3f}", "dynops", f"{row.ours_ms:.3f}"]
    return [*labels, *numbers, "-", f"{row.speedup:.2f}x", "-", *_predicted(row, sheet)]


def _predicted(row: Row | ExpertRow, sheet: Sheet | None) -> list[str]:
    found = predict(row, sheet, graph=True) if sheet else None
    if found is None:
        return ["-", "-", "-"]
    realised = found.realised if isinstance(row, Row) else None
    share = f"{row.ours_ms / found.ours_ms:.2f}"
    return [f"{found.ours_ms:.3f}", "-" if realised is None else f"{realised:.2f}", share]


def facts_line(facts: dict) -> str:
    versions = facts["versions"]
    text = f"torch {versions['torch']}, triton {versions['triton'] or '-'}, nvcc {versions['nvcc'] or '-'}"
    if not facts["gpu"]:
        return f"{DRY}; {text}"
    found = facts["ceilings"]
    idle, loaded = facts["idle"], facts["under_load"]
    return (
        f"{facts['gpu']}, {facts['capability']}, driver {idle.get('driver_version', '-')}, {text}; copies at "
        f"{found['bandwidth'] / 1e12:.2f} TB/s, products at {found['half'] / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{found['tf32'] / 1e12:.0f} in tf32; under load {loaded.get('clocks.sm', '-')}, {loaded.get('power.draw', '-')}, "
        f"{loaded.get('temperature.gpu', '-')} C"
    )


# -------------------------------------------------------------------------------------------- files


def finish(facts: dict, stages: list[Stage], measured: Measured, out: Path, dry: bool) -> None:
    """Prints everything, what was wanted and the stages last, and writes the files."""
    ceilings = facts.get("ceilings", {})
    sheet = sheet_of(facts.get("gpu", ""))
    sheet = sheet.with_ceilings(**ceilings) if sheet else None
    reached = reach.reach(measured.rows, measured.experts, ceilings)
    if dry:
        reached = [replace(r, verdict="dry run") for r in reached]
    label = f"{DRY}\n" if dry else ""
    if measured.rows or measured.experts:
        print(f"\n{label}{table(measured.rows, measured.experts, sheet)}\n\n{LEFT_OUT}")
    print(
        f"\n{label}wanted of an H200 in bfloat16 (worst row against it; large maps are the group {BATCH_1!r})"
    )
    print(reach.table(reached), "\n")
    for stage in stages:
        print(stage)
    for what, found in measured.problems().items():
        for item in found:
            print(f"{what}: {item}" + (f": {found[item]}" if isinstance(found, dict) else ""))
    if not any(stage.name == "benchmark" for stage in stages):
        return  # nothing was measured: what an earlier check wrote stays
    for path in write(facts, stages, measured, reached, out, dry):
        print(f"wrote {path}")


def write(facts: dict, stages: list[Stage], measured: Measured, reached, out: Path, dry: bool) -> list[Path]:
    machine = report.machine(torch.device("cpu"))
    machine |= {"device": facts.get("gpu") or machine["device"], "versions": facts.get("versions", {})}
    machine |= {key: value for key, value in facts.items() if key not in ("gpu", "versions")}
    notes = [LEFT_OUT]
    if dry:
        machine["device"] = f"{machine['device']} ({DRY})"
        notes.insert(0, DRY)
    checks = {"stages": [stage.as_dict() for stage in stages], "reach": [r.as_dict() for r in reached]}
    result = Report(machine, measured.rows, experts=measured.experts, notes=notes, checks=checks)
    stem = "dry-run-on-a-cpu" if dry else _slug(facts.get("gpu") or "unknown-gpu")
    paths = result.save(out, stem)
    if measured.rows and measured.experts:
        paths.append(out / f"{stem}-experts.csv")
        report.write_csv(paths[-1], measured.experts)
    return paths


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
