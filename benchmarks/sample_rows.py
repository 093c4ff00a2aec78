"""Rows of the benchmark of samples that are not rows of time against MACs, its targets, and its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from .text import aligned, rounded

if TYPE_CHECKING:
    from .report import Row

GATED = "gated"  # the variant of a block whose gate is computed in the timing
WORST = "every gate open, p50 and p99"

# ------------------------------------------------------------------------------------------ copies


@dataclass
class CopyRow:
    """One op on half of the samples, milliseconds from one run; the plan was made before."""

    op: str
    case: str
    dtype: str
    megabytes: float  # (1e6 bytes) read and written
    copy_ms: float  # of a copy that reads and writes as many bytes
    torch_ms: dict[str, float]
    ours_ms: float

    @property
    def best(self) -> str:
        return min(self.torch_ms, key=self.torch_ms.get)

    @property
    def speedup(self) -> float:
        return self.torch_ms[self.best] / self.ours_ms

    def gigabytes_a_second(self, ms: float) -> float:
        return self.megabytes / ms

    def as_dict(self) -> dict:
        derived = {"best": self.best, "speedup": self.speedup}
        return {key: rounded(value) for key, value in {**asdict(self), **derived}.items()}

    @classmethod
    def from_dict(cls, values: dict) -> CopyRow:
        return cls(**{f.name: values[f.name] for f in fields(cls)})


COPY_HEADER = ["op", "samples", "MB", "plain copy GB/s", "best of torch", "its GB/s", "ours GB/s", "speed-up"]  # fmt: skip


def copy_table(rows: list[CopyRow], text: Callable = aligned) -> str:
    return text(["dtype", *COPY_HEADER], [[row.dtype, *copy_cells(row)] for row in rows])


def copy_cells(row: CopyRow) -> list[str]:
    rates = [row.gigabytes_a_second(ms) for ms in (row.copy_ms, row.torch_ms[row.best], row.ours_ms)]
    copied, best, ours = (f"{rate:.1f}" for rate in rates)
    return [row.op, row.case, f"{row.megabytes:.1f}", copied, row.best, best, ours, f"{row.speedup:.2f}x"]


# ----------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What the rows of some groups are to realise; where every gate is open that is their speed-up."""

    name: str
    groups: tuple[str, ...]
    bound: float
    density: float | None = None  # of these rows only

    def worst(self, rows: list[Row]) -> Row | None:
        own = [row for row in rows if row.group in self.groups and self.density in (None, row.density)]
        return min(own, key=lambda row: row.realised, default=None)


BLOCKS = ("residual block", "replace block")
TARGETS = (
    Target("blocks that half of the samples skip", BLOCKS, 0.9, 0.5),
    Target("every gate open", BLOCKS, 1 / 1.05, 1.0),
    Target("early exit", ("early exit",), 0.9),
    Target("SkipNet of the shape of ResNet-110", ("SkipNet",), 0.9),
)


def target_table(rows: list[Row]) -> str:
    """For each target the row that is furthest from it."""
    found = [(target, worst) for target in TARGETS if (worst := target.worst(rows))]
    lines = [
        [
            target.name,
            f"{target.bound:.2f}",
            f"{row.realised:.2f}",
            f"{row.case}, {row.variant}",
            "yes" if row.realised >= target.bound else "no",
        ]
        for target, row in found
    ]
    return aligned(["target: realised", "at least", "worst", "the worst row", "reached"], lines)
