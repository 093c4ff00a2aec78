"""Interleaved timing: the contenders take turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from . import replay


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``min_rounds``, then until ``seconds`` or ``max_rounds`` are used up."""

    seconds: float = 3.0
    min_rounds: int = 7
    max_rounds: int = 60
    warmup: int = 2
    calls: int = 2  # timed in each turn, after one that is not

    def scaled(self, factor: float) -> Budget:
        return replace(self, seconds=self.seconds * factor)


def interleaved(contenders: dict[str, Callable], device: torch.device, budget: Budget) -> dict[str, float]:
    """Median milliseconds of each contender, from :func:`all_times`."""
    return {name: statistics.median(values) for name, values in all_times(contenders, device, budget).items()}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def all_times(
    contenders: dict[str, Callable], device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Milliseconds of every call of each contender; in every round each has a turn of a few calls.

    The first call of a turn is not timed: it finds the caches as the contender before left them, which says
    nothing of either. Every other round runs backwards, so that no contender always follows the same one.
    On a GPU the time is that between two events on the stream, and every call finds the second-level cache flushed.
    """
    _keep_memory()
    for call in contenders.values():
        for _ in range(budget.warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    with _no_gc():
        end = time.perf_counter() + budget.seconds
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and time.perf_counter() > end:
                break
            for name, call in order if done % 2 == 0 else reversed(order):
                call()
                times[name] += [_once(call, device) for _ in range(budget.calls)]
    return times


@functools.cache
def _keep_memory() -> None:
    """Lets glibc keep freed memory instead of returning it to the system after each call.

    Otherwise a call whose output is a few megabytes may, by luck of the heap's layout, fault every page of it
    in again (0.25 us a page: 2.5 ms for 40 MB), dense or sparse. Other allocators keep it by themselves.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def _once(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        return replay.device_ms(call, device)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


FIRST_LOOK = Budget(seconds=1.0, min_rounds=3, max_rounds=10)


def best_dense(
    dense: dict[str, Callable], device: torch.device, keep: int = 2, look: Budget = FIRST_LOOK
) -> tuple[dict[str, float], dict[str, Callable]]:
    """A first look at every dense version: ``(milliseconds of all, the fastest keep of them)``.

    The kept ones go into the run with ours; the faster of them there is "the best dense".
    """
    first_look = interleaved(dense, device, look)
    fastest = sorted(first_look, key=first_look.get)[:keep]
    return first_look, {name: dense[name] for name in fastest}


@dataclass(frozen=True)
class Comparison:
    """Ours against the best dense version, milliseconds from one interleaved run."""

    ours: dict  # {contender: ms}, of its fastest version
    dense_ms: float
    dense_name: str
    dense_all: dict[str, float]  # every dense version; those that were not kept: of the first look
    ours_all: dict = field(default_factory=dict)  # {contender: {version: ms}} where there are several
    failed: dict[str, str] = field(default_factory=dict)  # {version: why it could not run}

    def versions(self, contender) -> dict:
        """Fields of a row: which version of ours was the fastest, all of them, and what could not run."""
        found = self.ours_all.get(contender, {})
        return {
            "ours_name": min(found, key=found.get) if found else "",
            "ours_all": found,
            "failed": self.failed,
        }


def compare(
    dense: dict[str, Callable],
    ours: dict,
    device: torch.device,
    budget: Budget,
    replays: dict | None = None,
) -> Comparison:
    """Times ``ours`` {contender: call} in turns with the fastest of the ``dense`` versions.

    Args:
        replays: for contenders of ours the call in a form that a CUDA graph can capture. With it every dense version is
            replayed from a graph as well, and of ours the faster of "eager" and "graph" counts. What cannot run
            or be captured is left out and named in ``failed``.

    Raises:
        RuntimeError: no dense version runs, or none of a contender.
    """
    if replays is not None:
        return _compare_replays(dense, ours, device, budget, replays)
    first_look, kept = best_dense(dense, device)
    times = interleaved({**kept, **ours}, device, budget)
    best = min(kept, key=times.get)
    dense_all = first_look | {name: times[name] for name in kept}
    return Comparison({key: times[key] for key in ours}, times[best], best, dense_all)


EAGER, GRAPH = "eager", "graph"
MOST_DIFFERENT = 0.05  # of the norm; two ways through a network of bfloat16 differ by a few roundings a layer


def _compare_replays(dense: dict, ours: dict, device, budget: Budget, replays: dict) -> Comparison:
    failed: dict[str, str] = {}
    dense = {name: _captured(call, name, failed) for name, call in replay.working(dense, failed).items()}
    calls = {(EAGER, key): call for key, call in replay.working(ours, failed).items()}
    for key, call in replays.items():
        found = replay.captured_or(call, f"ours {key}, graph", failed)
        if found is not None and _agrees(found, calls.get((EAGER, key)), f"ours {key}, graph", failed):
            calls[GRAPH, key] = found
    if not dense or any((EAGER, key) not in calls and (GRAPH, key) not in calls for key in ours):
        raise RuntimeError(f"nothing to compare: {failed}")
    first_look, kept = best_dense(dense, device)
    times = interleaved({**kept, **calls}, device, budget)
    best = min(kept, key=times.get)
    versions = {key: {v: times[v, key] for v in (EAGER, GRAPH) if (v, key) in calls} for key in ours}
    dense_all = first_look | {name: times[name] for name in kept}
    fastest = {key: min(found.values()) for key, found in versions.items()}
    return Comparison(fastest, times[best], best, dense_all, versions, failed)


def _agrees(found: Callable, eager: Callable | None, name: str, failed: dict[str, str]) -> bool:
    """Whether a replay computes what the call does: a fast one that does not is no result."""
    differs = 0.0 if eager is None else replay.difference(found(), eager())
    if differs > MOST_DIFFERENT:
        failed[name] = f"differs from the call by {differs:.1e} of its norm"
    return differs <= MOST_DIFFERENT


def _captured(call: Callable, name: str, failed: dict[str, str]) -> Callable:
    """From a graph, or as it is where it cannot be captured."""
    return replay.captured_or(call, f"dense {name}, graph", failed) or call


def progress(items: list, label: str, unit: str = "case") -> Iterator:
    """Iterates with a progress bar, or with a line for each item where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"{label}: {i} of {len(items)}", flush=True)
            yield item
    else:
        yield from tqdm(items, desc=label, unit=unit)
