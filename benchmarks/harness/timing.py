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
from types import ModuleType

import torch

from . import replay
from .rows import Row
from .setting import Budget, Setting

FIRST_LOOK = Budget(seconds=1.0, min_rounds=3, max_rounds=10)


def interleaved(
    contenders: dict, device: torch.device, budget: Budget, flush: Callable | None = None
) -> dict[str, float]:
    """Median milliseconds of each contender, from :func:`all_times`."""
    times = all_times(contenders, device, budget, flush)
    return {name: statistics.median(values) for name, values in times.items()}


def all_times(contenders: dict, device: torch.device, budget: Budget, flush: Callable | None = None) -> dict:
    """Milliseconds of every call of each contender; in every round each has a turn of a few calls.

    The first call of a turn is not timed: it finds the caches as the contender before left them, which says
    nothing of either. Every other round runs backwards, so that no contender always follows the same one.
    On a GPU the time is that between two events on the stream, and every call finds the second-level cache flushed.

    Args:
        flush: called before every timed call, in place of the call that is not timed: caches are then cold.
    """
    _keep_memory()
    for call in contenders.values():
        for _ in range(budget.warmup):
            call()
    times: dict = {name: [] for name in contenders}
    order = list(contenders.items())
    with _no_gc():
        end = time.perf_counter() + budget.seconds
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and time.perf_counter() > end:
                break
            for name, call in order if done % 2 == 0 else reversed(order):
                if flush is None:
                    call()
                for _ in range(budget.calls):
                    if flush is not None:
                        flush()
                    times[name].append(_once(call, device))
    return times


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def fastest(
    calls: dict[str, Callable], device: torch.device, look: Budget = FIRST_LOOK, keep: int = 2
) -> tuple[dict[str, float], dict[str, Callable]]:
    """A first look at some versions: ``({version: ms}, the fastest ``keep`` of them)``; no look at so few versions."""
    if len(calls) <= keep:
        return {}, calls
    times = interleaved(calls, device, look)
    return times, {name: calls[name] for name in sorted(times, key=times.get)[:keep]}


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


def progress(items: list, label: str) -> Iterator:
    """Iterates with a progress bar, or with a line for each item where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"{label}: {i} of {len(items)}", flush=True)
            yield item
    else:
        yield from tqdm(items, desc=label)


def rows_of(module: ModuleType, cases: list, setting: Setting) -> list[Row]:
    """The rows of all cases, ``module.measure(case, setting)`` of each, with a progress bar."""
    label = module.__name__.partition(".")[2]
    return [row for case in progress(cases, label) for row in module.measure(case, setting)]
