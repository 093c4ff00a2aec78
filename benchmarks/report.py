"""Rows, and what is made of them: tables, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dynops

from .expert_rows import ExpertRow, plot_experts
from .sample_rows import CopyRow
from .text import aligned, rounded


@dataclass
class Row:
    """One measurement of ours against the best dense version, both in milliseconds, from one run."""

    suite: str  # "layers", "blocks", "channels", "samples", "models" or "video"
    group: str
    case: str
    mask: str
    density: float  # asked for; what was computed is computed_gmacs
    variant: str  # "plain": a mask and a dense map in, a dense map out. Others never enter a summary
    mode: str  # "forward" or "forward+backward"
    dtype: str
    gmacs: float  # of the dense layer's forward; FLOPs are 2 x MACs
    computed_gmacs: float
    dense_ms: float
    dense_name: str
    ours_ms: float
    dense_all: dict[str, float] = field(default_factory=dict)  # ms of every dense version
    break_even_only: bool = False  # a density measured to find the break-even, not the saving
    block: int = 0  # pixels on a side of the blocks that were computed; 0 where pixels were
    ours_name: str = ""  # of the version of ours that was the fastest, where several were measured
    ours_all: dict[str, float] = field(default_factory=dict)  # ms of each of them
    gate_ms: float = 0.0  # of the gate called by itself; variant "gated": ours_ms has it too
    dense_p99_ms: float = 0.0  # 0 where it was not asked for
    ours_p99_ms: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)  # {version of either: why it could not run}

    @property
    def theory(self) -> float:
        """MACs of the dense layer / MACs that must be computed; inf where there is nothing to compute."""
        return self.gmacs / self.computed_gmacs if self.computed_gmacs else math.inf

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ours_ms

    @property
    def realised(self) -> float:
        """The share of the theoretical saving that became time saved: speedup / theory."""
        return self.speedup / self.theory

    def as_dict(self) -> dict:
        derived = {name: getattr(self, name) for name in ("theory", "speedup", "realised")}
        return {k: rounded(v) for k, v in {**dataclasses.asdict(self), **derived}.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Row:
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


@dataclass
class MemoryRow:
    """Peak memory above what was held before the call, in MB (2**20 bytes)."""

    case: str
    mask: str
    density: float
    dtype: str
    dense_mb: float
    ours_mb: float
    dense_name: str

    @property
    def ratio(self) -> float:
        return self.ours_mb / self.dense_mb

    def as_dict(self) -> dict:
        return {k: rounded(v) for k, v in {**dataclasses.asdict(self), "ratio": self.ratio}.items()}

    @classmethod
    def from_dict(cls, values: dict) -> MemoryRow:
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


@dataclass
class Report:
    machine: dict
    rows: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    experts: list[ExpertRow] = field(default_factory=list)
    copies: list[CopyRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: dict = field(default_factory=dict)  # what came of the stages of ``benchmarks.gpu check``

    def save(self, folder: Path, stem: str, plot: bool = False) -> list[Path]:
        """Writes ``stem``.json and .csv, and .png if asked and matplotlib is there; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}.json", folder / f"{stem}.csv"]
        content = {
            "machine": self.machine,
            "notes": self.notes,
            "rows": [row.as_dict() for row in self.rows],
            "memory": [row.as_dict() for row in self.memory],
            "experts": [row.as_dict() for row in self.experts],
            "copies": [row.as_dict() for row in self.copies],
        }
        if self.checks:
            content["checks"] = self.checks
        paths[0].write_text(json.dumps(content, indent=1) + "\n")
        write_csv(paths[1], self.rows or self.memory or self.experts)
        image = folder / f"{stem}.png"
        draw = _plot if self.rows else plot_experts
        if plot and (self.rows or self.experts) and draw(self.rows or self.experts, self.title(), image):
            paths.append(image)
        return paths

    def title(self) -> str:
        """Of a plot: the machine, the dtype, the pass."""
        row = (self.rows or self.experts)[0]
        return f"{self.machine['device']}, {self.machine['threads']} threads, {row.dtype}, {row.mode}"

    @classmethod
    def load(cls, path: Path) -> Report:
        content = json.loads(path.read_text())
        rows = [Row.from_dict(r) for r in content["rows"]]
        memory = [MemoryRow.from_dict(r) for r in content["memory"]]
        experts = [ExpertRow.from_dict(r) for r in content.get("experts", [])]
        copies = [CopyRow.from_dict(r) for r in content.get("copies", [])]
        checks = content.get("checks", {})
        return cls(content["machine"], rows, memory, experts, copies, content["notes"], checks)


def write_csv(path: Path, rows: list) -> None:
    records = [row.as_dict() for row in rows]
    for record in records:
        for key, value in record.items():
            if isinstance(value, dict):
                record[key] = "; ".join(f"{k}: {v}" for k, v in value.items())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)


# --------------------------------------------------------------------------------------- the machine


def machine(device: torch.device) -> dict:
    """What the numbers depend on: processor, threads, versions, the kernels' instruction sets, the day."""
    try:
        build = {k: v for k, v in dynops.build_info().items() if isinstance(v, (str, int, float, list))}
    except RuntimeError:
        build = {}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dynops": dynops.__version__,
        "build": build,
        "forced_isa": os.environ.get("DYNOPS_CPU_ISA", ""),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
    }


def machine_line(info: dict) -> str:
    isa = info["forced_isa"] or info["build"].get("cpu_isa") or info["torch_isa"]
    return f"{info['device']}, {info['threads']} threads, {isa}, torch {info['torch']}, {info['date']}."


def busy_share(seconds: float = 0.5) -> float:
    """The share of the processors that other programs use, watched while this one sleeps; 0 if unknown."""

    def ticks() -> tuple[int, int]:  # (idle, all)
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return values[3] + values[4], sum(values)

    try:
        before = ticks()
        time.sleep(seconds)
        after = ticks()
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1 - (after[0] - before[0]) / max(after[1] - before[1], 1)


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_stem(info: dict, dtype: str, suite: str, mode: str = "forward") -> str:
    """ "amd-epyc-float32-layers": the device, the dtype, the suite, and the mode where not forward."""
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    return "-".join([slug, dtype, suite] + ([] if mode == "forward" else ["backward"]))


# --------------------------------------------------------------------------------------- summaries


def break_even(points: list[tuple[float, float]]) -> float:
    """The density below which ours wins, from ``(density, speedup)``.

    Between two measured densities the ratio of times (1 / speedup) is taken as linear. 0 where ours
    loses at the lowest density measured; the highest measured where it never loses.
    """
    points = sorted(points)
    previous = None
    for density, speedup in points:
        ratio = 1 / speedup
        if ratio > 1:
            if previous is None:
                return 0.0
            d0, r0 = previous
            return d0 + (1 - r0) / (ratio - r0) * (density - d0)
        previous = density, ratio
    return points[-1][0]


def break_evens(rows: list[Row]) -> dict[str, float]:
    """Break-even density of each case that was measured up to density 1 (random masks, SBNet's for blocks)."""
    points: dict[tuple[str, str], list] = {}
    for row in rows:
        if row.variant == "plain" and row.mask in ("random", "top-left"):
            points.setdefault((row.case, row.mask), []).append((row.density, row.speedup))
    return {case: break_even(p) for (case, _), p in points.items() if max(p)[0] >= 1}


@dataclass
class Summary:
    """A group of plain rows in one line; ``worst`` is the row that realised least."""

    name: str
    count: int
    median: float
    worst: Row
    break_even_median: float | None
    break_even_lowest: float | None
    full_lowest: float | None  # the lowest speed-up at density 1


def summarise(name: str, rows: list[Row]) -> Summary | None:
    plain = [row for row in rows if row.variant == "plain"]
    saving = [row for row in plain if not row.break_even_only]
    if not saving:
        return None
    evens = list(break_evens(plain).values())
    full = [row.speedup for row in plain if row.density >= 1]
    return Summary(
        name,
        len(saving),
        statistics.median(row.realised for row in saving),
        min(saving, key=lambda row: row.realised),
        statistics.median(evens) if evens else None,
        min(evens, default=None),
        min(full, default=None),
    )


def summaries(rows: list[Row], target_groups: tuple[str, ...] = ()) -> list[Summary]:
    """One for each group, and first over ``target_groups``: random and square masks, and packed rows out."""
    groups = list(dict.fromkeys(row.group for row in rows))
    found = [summarise(group, [row for row in rows if row.group == group]) for group in groups]
    if any(group in target_groups for group in groups):
        target = [r for r in rows if r.group in target_groups and r.mask in ("random", "square")]
        name = " + ".join(group for group in groups if group in target_groups)
        found.insert(0, summarise(name + ", random and square", target))
        packed = [dataclasses.replace(r, variant="plain") for r in rows if r.variant == "packed out"]
        target = [row for row in packed if row.group in target_groups]
        found.insert(1, summarise(name + ", random, packed rows out", target))
    return [summary for summary in found if summary]


# --------------------------------------------------------------------------------------- tables

HEADER = ["layer", "mask", "density", "dense ms", "best dense", "ours ms", "theory", "speed-up", "realised"]
NO_THEORY = 1e3  # from here on next to nothing is left to compute, and the time says what that costs
OPTIONAL = {
    "best of ours": lambda row: row.ours_name,
    "gate ms": lambda row: f"{row.gate_ms:.3f}" if row.gate_ms else "",
    "dense p99": lambda row: f"{row.dense_p99_ms:.3f}" if row.dense_p99_ms else "",
    "ours p99": lambda row: f"{row.ours_p99_ms:.3f}" if row.ours_p99_ms else "",
}


def table(rows: list[Row]) -> str:
    """Every row, group by group, the one that realised least last in its group."""
    blocks = []
    for group, variant in dict.fromkeys((row.group, row.variant) for row in rows):
        own = [row for row in rows if (row.group, row.variant) == (group, variant)]
        own.sort(key=lambda row: -row.realised)
        title = group if variant == "plain" else f"{group} ({variant})"
        blocks.append(f"{title}\n" + aligned(*with_optional(own)))
    return "\n\n".join(blocks)


def row_cells(row: Row) -> list[str]:
    return [
        row.case,
        f"{row.mask}, {row.block}x{row.block} blocks" if row.block else row.mask,
        f"{row.density:.2f}",
        f"{row.dense_ms:.3f}",
        row.dense_name,
        f"{row.ours_ms:.3f}",
        f"{row.theory:.2f}x" if row.theory < NO_THEORY else "-",
        f"{row.speedup:.2f}x",
        f"{row.realised:.2f}" if row.theory < NO_THEORY else "-",
    ]


def with_optional(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """``HEADER`` and the cells of ``rows``, and those of ``OPTIONAL`` that one of them has."""
    cells = {name: [cell(row) for row in rows] for name, cell in OPTIONAL.items()}
    used = {name: column for name, column in cells.items() if any(column)}
    lines = [row_cells(row) + [column[i] for column in used.values()] for i, row in enumerate(rows)]
    return [*HEADER, *used], lines


SUMMARY_HEADER = ["group", "rows", "realised: median", "worst", "the worst row", "break-even: median"]
SUMMARY_HEADER += ["lowest", "slowest at density 1"]


def summary_cells(s: Summary) -> list[str]:
    worst = f"{s.worst.case}, {s.worst.mask}, {s.worst.density:g}"
    optional = [s.break_even_median, s.break_even_lowest]
    cells = [s.name, str(s.count), f"{s.median:.2f}", f"{s.worst.realised:.2f}", worst]
    cells += ["-" if value is None else f"{value:.2f}" for value in optional]
    return [*cells, "-" if s.full_lowest is None else f"{s.full_lowest:.2f}x"]


def summary_table(found: list[Summary]) -> str:
    return aligned(SUMMARY_HEADER, [summary_cells(s) for s in found])


def memory_table(rows: list[MemoryRow]) -> str:
    header = ["layer", "mask", "density", "dense MB", "best dense", "ours MB", "ours / dense"]
    return aligned(header, [_memory_cells(row) for row in sorted(rows, key=lambda r: r.ratio)])


def _memory_cells(r: MemoryRow) -> list[str]:
    sizes = [f"{r.dense_mb:.1f}", r.dense_name, f"{r.ours_mb:.1f}", f"{r.ratio:.2f}"]
    return [r.case, r.mask, f"{r.density:.2f}", *sizes]


# --------------------------------------------------------------------------------------- the plot


def _plot(rows: list[Row], title: str, path: Path) -> bool:
    """Speed-up against the share of MACs computed, with the theoretical line; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    plain = [row for row in rows if row.variant == "plain" and row.theory < NO_THEORY]
    for kind in dict.fromkeys((row.suite, row.mask) for row in plain):
        own = [row for row in plain if (row.suite, row.mask) == kind]
        size = 60 if kind[0] == "models" else 14
        label = f"{kind[0]}: {kind[1]}"
        axes.scatter([1 / row.theory for row in own], [row.speedup for row in own], s=size, label=label, alpha=0.7)  # fmt: skip
    lowest = min(1 / row.theory for row in plain)
    axes.plot([lowest, 1], [1 / lowest, 1], color="black", linewidth=1, label="theory: 1 / share computed")
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":", label="the best dense version")
    axes.set(xscale="log", yscale="log", xlabel="share of the dense MACs that is computed", ylabel="speed-up")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1) if t >= lowest * 0.9]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([0.5, 1, 2, 4, 10], ["0.5x", "1x", "2x", "4x", "10x"])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True
