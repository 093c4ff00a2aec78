"""The outcome of a check: the rows as they were written, one table of them, and the file."""

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
    """The rows that the contests wrote, ``failed``: {contest: why}, ``left``: those that had no time."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def read(self, file: Path, done: Finished, limit: float) -> list[str]:
        """Takes the rows that a worker wrote in ``file``; returns the contests that it began. One that it did not end failed."""
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
            elif "note" in record:
                self.notes.append(record["note"])
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


def finish(facts: dict, stages: list[Stage], measured: Measured, out: Path, dry: bool) -> None:
    """Prints everything, the stages last, and writes the file."""
    label = f"{DRY}\n" if dry else ""
    experts = [row for row in measured.rows if row.suite == "experts"]
    timed = [row for row in measured.rows if row.suite != "experts"]
    timed = [replace(row, group=f"{row.suite}, {row.group}, {row.dtype}") for row in timed]
    if timed:
        print(f"\n{label}{table(timed)}\n\n{summary_table(summaries(timed))}")
    for text in expert_tables(experts):
        print(f"\n{label}{text}")
    print("", LEFT_OUT, *measured.notes, "", sep="\n")
    for stage in stages:
        print(stage)
    for kind, found in measured.problems().items():
        for item in found:
            print(f"{kind}: {item}" + (f": {found[item]}" if isinstance(found, dict) else ""))
    if not any(stage.name == "benchmark" for stage in stages):
        return  # nothing was measured: what an earlier check wrote stays
    print(f"wrote {write(facts, stages, measured, out, dry)}")


def write(facts: dict, stages: list[Stage], measured: Measured, out: Path, dry: bool) -> Path:
    known = machine(torch.device("cpu"))
    known |= {"device": facts.get("gpu") or known["device"], "versions": facts.get("versions", {})}
    known |= {key: value for key, value in facts.items() if key not in ("gpu", "versions")}
    notes = [LEFT_OUT, *measured.notes]
    if dry:
        known["device"] = f"{known['device']} ({DRY})"
        notes.insert(0, DRY)
    checks = {"stages": [stage.as_dict() for stage in stages]}
    stem = "dry-run-on-a-cpu" if dry else slug(facts.get("gpu") or "unknown-gpu")
    return Report(known, measured.rows, notes, checks).save(out, stem)[0]
