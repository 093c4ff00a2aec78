"""The row of every benchmark, and the summaries of groups of rows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from .text import rounded

DERIVED = ("theory", "speedup", "realised", "gflops", "roofline_share")


@dataclass
class Row:
    """One measurement of ours against the best that exists without dynops, from one interleaved run.

    Attributes:
        suite: the benchmark: "layers", "formats", "blocks", "channels", "samples", "copies", "models", "experts",
            "video" or "memory". Rows of "memory" have megabytes instead of milliseconds.
        density: the share asked for; ``computed_gmacs`` has what was computed.
        variant: "plain" takes a mask and a dense map and returns a dense map. Summaries count no other variant.
        gmacs: of the dense forward pass, in billions; FLOPs are 2 x MACs.
        dense_all, ours_all: milliseconds of every version.
        break_even_only: a density that was measured to find the break-even; no summary counts it.
        block: pixels on a side of the computed blocks; 0 where pixels were computed.
        gate_ms: of the gate called by itself. The variant "gated" has it in ``ours_ms`` too.
        dense_p99_ms, ours_p99_ms: 99th percentiles; 0 where they were not asked for.
        failed: the versions that could not run, each with its reason.
        tokens: of a call of experts.
        weights: the dtype of our weights, where it may differ from ``dtype``.
        megabytes: that must move (1e6 bytes): weights, inputs that are read, outputs.
        roofline_ms: the least time on this machine; 0 where it is not known.
        dense_mb, ours_mb: the peak of one call above the memory held before it (2**20 bytes).
    """

    suite: str
    group: str
    case: str
    mask: str
    density: float
    variant: str
    mode: str  # "forward" or "forward+backward"
    dtype: str
    gmacs: float = 0.0
    computed_gmacs: float = 0.0
    dense_ms: float = 0.0
    dense_name: str = ""
    ours_ms: float = 0.0
    dense_all: dict[str, float] = field(default_factory=dict)
    break_even_only: bool = False
    block: int = 0
    ours_name: str = ""
    ours_all: dict[str, float] = field(default_factory=dict)
    gate_ms: float = 0.0
    dense_p99_ms: float = 0.0
    ours_p99_ms: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    weights: str = ""
    megabytes: float = 0.0
    roofline_ms: float = 0.0
    dense_mb: float = 0.0
    ours_mb: float = 0.0

    @property
    def theory(self) -> float:
        """Dense MACs / MACs that must be computed: inf where nothing must be, 1 where neither has products."""
        if self.computed_gmacs:
            return self.gmacs / self.computed_gmacs
        return math.inf if self.gmacs else 1.0

    @property
    def speedup(self) -> float:
        """Time of the best dense version / time of ours."""
        return self.dense_ms / self.ours_ms if self.ours_ms else math.nan

    @property
    def realised(self) -> float:
        """speedup / theory: the share of the theoretical saving that became time saved."""
        return self.speedup / self.theory

    @property
    def gflops(self) -> float:
        """2 x MACs a second of ours, in billions; of the forward pass where there is a backward one."""
        return 2e3 * self.computed_gmacs / self.ours_ms if self.ours_ms else math.nan

    @property
    def roofline_share(self) -> float:
        """Roofline / time of ours; 0 where the roofline is not known."""
        return self.roofline_ms / self.ours_ms if self.ours_ms else 0.0

    @property
    def ratio(self) -> float:
        """Peak memory of ours / of the dense layer."""
        return self.ours_mb / self.dense_mb

    def as_dict(self) -> dict:
        """The fields that differ from their defaults, and the numbers that follow from them."""
        fields = {f.name: (getattr(self, f.name), f) for f in dataclasses.fields(self)}
        kept = {name: value for name, (value, f) in fields.items() if value != _default(f)}
        derived = {name: getattr(self, name) for name in (("ratio",) if self.ours_mb else DERIVED)}
        return {name: rounded(value) for name, value in {**kept, **derived}.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Row:
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def _default(f: dataclasses.Field):
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


# --------------------------------------------------------------------------------------- summaries


def break_even(points: Iterable[tuple[float, float]], origin: bool = False) -> float:
    """The density below which ours wins, from ``(density, speedup)``.

    Between two measured densities the ratio of times (1 / speedup) is taken as linear. Below the first it is unknown,
    or with ``origin`` a line through zero: ours then breaks even somewhere. 0 where ours loses at the lowest density
    and what lies below is unknown; the highest density where it never loses.
    """
    points = sorted(points)
    previous = (0.0, 0.0) if origin else None
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
    """The break-even of each case that was measured up to density 1 (random masks; SBNet's for blocks)."""
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
    """The summary of the plain rows, or None where there are none."""
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
    """A summary of each group. First, two over ``target_groups``: random and square masks, and packed rows out."""
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
