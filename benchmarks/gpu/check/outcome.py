"""The outcome of a check: the rows as they are written, and the report of them, JSON and table, again after each contest."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...experts.tables import tables as expert_tables
from ...harness.machine import machine, slug
from ...harness.report import Report
from ...harness.rows import Row, summaries
from ...harness.tables import summary_table, table
from .stages import Stage

DRY = "dry run on a CPU, not a measurement"
LEFT_OUT = (
    "Of the dense versions only the model's is compiled, in channels_last, which the compiler chooses for convolutions; of a "
    "lone convolution it is the same cuDNN call. Every dense version that can be captured is replayed from a CUDA graph; of "
    "ours the faster counts: called from Python with a compact plan, or replayed with a capacity plan that has room for all. "
    "Every call finds the second-level cache without its data."
)
# what a row measures; one that is measured again, against more dense versions say, takes its place
WHAT = ("suite", "group", "case", "mask", "density", "variant", "mode", "dtype", "tokens", "weights")


@dataclass
class Measured:
    """The rows of the contests, those ``begun`` and ``ended``, ``failed``: {contest: why}, ``left``: those that had no time."""

    found: dict[tuple, Row] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return list(self.found.values())

    def add(self, row: Row) -> None:
        self.found[tuple(getattr(row, name) for name in WHAT)] = row

    def read(self, file: Path) -> bool:
        """Takes what a worker wrote so far in ``file``; True where a contest ended since."""
        before = len(self.ended)
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off with its process
            if "begun" in record:
                self.begun.add(record["begun"])
            elif "row" in record:
                self.add(Row.from_dict(record["row"]))
            elif "note" in record:
                self.notes[record["of"]] = record["note"]
            elif "failed" in record:
                self.failed[record["failed"]] = record["error"]
            else:
                self.ended.add(record["done"])
        return len(self.ended) > before

    def problems(self) -> dict:
        versions = {f"{row.case}: {name}": why for row in self.rows for name, why in row.failed.items()}
        return {"failed": self.failed, "not run": self.left, "versions that could not run": versions}


def facts_line(facts: dict) -> str:
    versions = facts["versions"]
    text = f"torch {versions['torch']}, triton {versions['triton'] or '-'}, nvcc {versions['nvcc'] or '-'}"
    if not facts["gpu"]:
        return f"{DRY}; {text}"
    idle, loaded = facts["idle"], facts["under_load"]
    return (
        f"{facts['gpu']}, {facts['capability']}, driver {idle.get('driver_version', '-')}, {text}; "
        f"under load {loaded.get('clocks.sm', '-')}, {loaded.get('power.draw', '-')}, "
        f"{loaded.get('temperature.gpu', '-')} C"
    )


# -------------------------------------------------------------------------------------------- files


def text(stages: list[Stage], measured: Measured, dry: bool) -> str:
    """The tables of all rows, the stages, and what failed or had no time."""
    label = f"{DRY}\n" if dry else ""
    experts = [row for row in measured.rows if row.suite == "experts"]
    timed = [row for row in measured.rows if row.suite != "experts"]
    timed = [replace(row, group=f"{row.suite}, {row.group}, {row.dtype}") for row in timed]
    parts = [f"{label}{table(timed)}", summary_table(summaries(timed))] if timed else []
    parts += [f"{label}{found}" for found in expert_tables(experts)]
    parts += ["\n".join([LEFT_OUT, *measured.notes.values()])]
    lines = [str(stage) for stage in stages]
    for kind, found in measured.problems().items():
        lines += [
            f"{kind}: {item}" + (f": {found[item]}" if isinstance(found, dict) else "") for item in found
        ]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def write(facts: dict, stages: list[Stage], measured: Measured, out: Path, dry: bool) -> None:
    """Writes the report so far, JSON and table; each takes the place of the one before at once."""
    known = machine(torch.device("cpu"))
    known |= {"device": facts.get("gpu") or known["device"], "versions": facts.get("versions", {})}
    known |= {key: value for key, value in facts.items() if key not in ("gpu", "versions")}
    notes = [LEFT_OUT, *measured.notes.values()]
    if dry:
        known["device"] = f"{known['device']} ({DRY})"
        notes.insert(0, DRY)
    checks = {"stages": [stage.as_dict() for stage in stages], **measured.problems()}
    stem = "dry-run-on-a-cpu" if dry else slug(facts.get("gpu") or "unknown-gpu")
    partial = out / "partial"
    paths = [*Report(known, measured.rows, notes, checks).save(partial, stem), partial / f"{stem}.txt"]
    paths[1].write_text(text(stages, measured, dry))
    for path in paths:
        path.replace(out / path.name)
    partial.rmdir()
