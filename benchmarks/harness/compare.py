"""The comparison: every version of ours against every dense version, in one interleaved run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import replay
from .rows import Row
from .setting import Budget, Setting
from .timing import all_times, fastest, percentile

DENSE, GATE = "dense", "gate"
ONLY, EAGER, GRAPH = "", "eager", "graph"
MOST_DIFFERENT = 0.05  # of the norm; two ways through a network of bfloat16 differ by a few roundings a layer


@dataclass(frozen=True)
class Comparison:
    """The times of one run. Of every contender the version with the least median counts.

    Attributes:
        times: ``{(contender, version): milliseconds of each call}``; the contender of dense versions is ``DENSE``.
        looks: ``{contender: {version: ms}}`` of the first look, which leaves two versions of each.
        failed: the versions that could not run, each with its reason.
        beside: median milliseconds of the calls that were timed beside them and are no contenders.
    """

    setting: Setting
    times: dict[tuple, list[float]]
    looks: dict = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    p99: bool = False

    def medians(self, contender) -> dict[str, float]:
        """``{version: ms}`` of the versions that took part in the run."""
        return {v: statistics.median(values) for (who, v), values in self.times.items() if who == contender}

    @property
    def dense_all(self) -> dict[str, float]:
        """Milliseconds of every dense version; of those that the first look left out, from there."""
        return self.looks.get(DENSE, {}) | self.medians(DENSE)

    def row(self, contender, megabytes: float = 0.0, **what) -> Row:
        """The row of one contender.

        Args:
            megabytes: that must move, for the roofline.
            what: the fields that no timing knows. One that a timing knows too is taken from here.
        """
        dense, ours = self.medians(DENSE), self.medians(contender)
        dense_name, ours_name = min(dense, key=dense.get), min(ours, key=ours.get)
        gate = self.medians((GATE, contender))
        p99 = {
            "dense_p99_ms": percentile(self.times[DENSE, dense_name], 0.99),
            "ours_p99_ms": percentile(self.times[contender, ours_name], 0.99),
        }
        found = {
            "variant": "plain",
            "mode": self.setting.mode,
            "dtype": self.setting.dtype_name,
            "dense_ms": dense[dense_name],
            "dense_name": dense_name,
            "dense_all": self.dense_all,
            "ours_ms": ours[ours_name],
            "ours_name": ours_name,
            "ours_all": {} if ONLY in ours else self.looks.get(contender, {}) | ours,
            "gate_ms": gate.get(ours_name, 0.0),
            "failed": self.failed,
            "megabytes": megabytes,
            "roofline_ms": self.setting.roofline_ms(what.get("computed_gmacs", 0.0), megabytes),
        }
        return Row(**found | (p99 if self.p99 else {}) | what)


def compare(
    dense: dict[str, Callable],
    ours: dict,
    setting: Setting,
    *,
    replays: dict | None = None,
    gates: dict | None = None,
    beside: dict[str, Callable] | None = None,
    p99: bool = False,
    flush: Callable | None = None,
) -> Comparison:
    """Times ours in turns with the dense versions; a first look leaves the two fastest versions of each.

    Args:
        dense: ``{version: call}``. Where ``setting.graph`` they are replayed from CUDA graphs.
        ours: ``{contender: call}``, or ``{contender: {version: call}}`` where there are several.
        replays: where ``setting.graph``, ``{contender: a call that a CUDA graph can capture}``. Of ours the faster of
            "eager" and "graph" then counts.
        gates: ``{contender: {version: the gate by itself}}``.
        beside: calls that take turns with the others and never count.
        p99: also take the 99th percentiles, of at least 24 calls for each round of the budget.
        flush: called before every timed call, as :func:`all_times` has it.

    Raises:
        RuntimeError: no dense version runs, or no version of a contender. Where ``setting.graph``, what cannot run
            or be captured is left out and named in ``failed``; else it raises what the call raises.
    """
    failed: dict[str, str] = {}
    ways = {key: call if isinstance(call, dict) else {ONLY: call} for key, call in ours.items()}
    if setting.graph:
        dense = {name: _captured(call, name, failed) for name, call in replay.working(dense, failed).items()}
        ways = {key: replay.working(versions, failed) for key, versions in ways.items()}
        if replays is not None:
            ways = {key: _with_graph(key, versions, replays, failed) for key, versions in ways.items()}
    if not dense or not all(ways.values()):
        raise RuntimeError(f"nothing to compare: {failed}")
    looks, calls = {}, {}
    brief = Budget(0.15 * setting.budget.seconds, min_rounds=2, max_rounds=10, warmup=1, calls=1)
    looks[DENSE], kept = fastest(dense, setting.device)
    calls |= {(DENSE, name): call for name, call in kept.items()}
    calls |= {("beside", name): call for name, call in (beside or {}).items()}
    for key, versions in ways.items():
        looks[key], kept = fastest(versions, setting.device, brief)
        calls |= {(key, name): call for name, call in kept.items()}
        own = (gates or {}).get(key, {})
        calls |= {((GATE, key), name): own[name] for name in kept if name in own}
    budget = _for_percentiles(setting.budget) if p99 else setting.budget
    times = all_times(calls, setting.device, budget, flush)
    beside = {name: statistics.median(times.pop(("beside", name))) for name in beside or {}}
    return Comparison(setting, times, looks, failed, beside, p99)


def _with_graph(
    key, versions: dict[str, Callable], replays: dict, failed: dict[str, str]
) -> dict[str, Callable]:
    """The calls of a contender, a lone one as "eager", and its replay as "graph" where it computes the same."""
    versions = {version or EAGER: call for version, call in versions.items()}
    name = f"ours {key}, graph"
    found = replay.captured_or(replays[key], name, failed) if key in replays else None
    if found is not None and _agrees(found, next(iter(versions.values()), None), name, failed):
        versions[GRAPH] = found
    return versions


def _agrees(found: Callable, eager: Callable | None, name: str, failed: dict[str, str]) -> bool:
    """True where a replay computes the same as the call. Otherwise the reason goes to ``failed``: it is no result."""
    differs = 0.0 if eager is None else replay.difference(found(), eager())
    if differs > MOST_DIFFERENT:
        failed[name] = f"differs from the call by {differs:.1e} of its norm"
    return differs <= MOST_DIFFERENT


def _captured(call: Callable, name: str, failed: dict[str, str]) -> Callable:
    """The call from a graph, or as it is where it cannot be captured."""
    return replay.captured_or(call, f"dense {name}, graph", failed) or call


def _for_percentiles(budget: Budget) -> Budget:
    rounds = 12 * budget.min_rounds  # of two calls
    return replace(budget, min_rounds=rounds, max_rounds=max(rounds, budget.max_rounds), calls=2)
