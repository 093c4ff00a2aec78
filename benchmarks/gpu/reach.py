"""What the project wants to reach on an H200, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from ..expert_rows import ExpertRow
from ..report import Row
from ..text import aligned, rounded

HALF = "bfloat16"
GROUPED = "torch grouped_mm"
SAMPLES = ("residual block", "replace block")


@dataclass(frozen=True)
class Reached:
    """One target: what the worst row has of it, or nothing where no row was measured."""

    target: str
    wanted: float
    worst: float | None
    median: float | None
    worst_row: str
    rows: int
    verdict: str

    def as_dict(self) -> dict:
        return rounded(asdict(self))


@dataclass(frozen=True)
class Target:
    text: str
    wanted: float
    value: Callable  # of a row, or None where the target is not about it


def reach(rows: list[Row], experts: list[ExpertRow], ceilings: dict[str, float]) -> list[Reached]:
    """Every target with the rows that it is about; ``ceilings``: ``facts.ceilings`` of the same run."""
    found = [_reached(target, ((row_name(r), target.value(r)) for r in rows)) for target in _targets()]
    own = _expert_targets(ceilings.get("half"))
    found += [_reached(target, ((expert_name(r), target.value(r)) for r in experts)) for target in own]
    return found


def _reached(target: Target, values: Iterable[tuple[str, float | None]]) -> Reached:
    known = sorted((value, name) for name, value in values if value is not None)
    if not known:
        return Reached(target.text, target.wanted, None, None, "", 0, "not measured")
    verdict = "met" if known[0][0] >= target.wanted else "not met"
    median = known[len(known) // 2][0]
    return Reached(target.text, target.wanted, known[0][0], median, known[0][1], len(known), verdict)


def _targets() -> list[Target]:
    def realised(suite: str, group=None, densities=None):
        def value(row: Row) -> float | None:
            own = (
                row.suite == suite
                and row.dtype == HALF
                and row.variant == "plain"
                and not row.break_even_only
            )
            own = own and (group is None or row.group in group)
            return row.realised if own and (densities is None or row.density in densities) else None

        return value

    return [
        Target(
            "pixels 3x3, batch 32 and more, 50 and 25 %: realised",
            0.8,
            realised("layers", ("3x3",), (0.5, 0.25)),
        ),
        Target("pixels 3x3, batch 32 and more, 10 %: realised", 0.7, realised("layers", ("3x3",), (0.1,))),
        Target("blocks: realised", 0.85, realised("blocks")),
        Target("channels: realised", 0.7, realised("channels")),
        Target("sample skipping: realised", 0.95, realised("samples", SAMPLES)),
        Target("ResNet-50 at 25 %, batch 64: realised", 0.7, realised("models", None, (0.25,))),
        Target(
            "auto, every pixel row: speed-up",
            0.98,
            lambda row: row.speedup if row.suite == "layers" else None,
        ),
    ]


def _expert_targets(half: float | None) -> list[Target]:
    def against_grouped(row: ExpertRow) -> float | None:
        time = row.built_in_ms.get(GROUPED)
        return time / row.ours_ms if time else None

    def share_of_product(row: ExpertRow) -> float | None:
        return row.gflops * 1e9 / half if half and row.tokens == 8192 else None

    return [
        Target(f"experts: speed-up over {GROUPED}", 1.0, against_grouped),
        Target("experts, 8192 tokens: share of the measured dense product", 0.6, share_of_product),
    ]


def row_name(row: Row) -> str:
    return f"{row.case}, {row.mask}, {row.density:g}, {row.dtype}"


def expert_name(row: ExpertRow) -> str:
    return f"{row.layer}, {row.tokens} tokens, {row.mode}"


HEADER = ["target", "wanted", "worst", "median", "rows", "verdict", "the worst row"]


def table(found: list[Reached]) -> str:
    def cells(r: Reached) -> list[str]:
        numbers = ["-" if v is None else f"{v:.2f}" for v in (r.worst, r.median)]
        return [r.target, f"{r.wanted:.2f}", *numbers, str(r.rows), r.verdict, r.worst_row]

    return aligned(HEADER, [cells(r) for r in found])
