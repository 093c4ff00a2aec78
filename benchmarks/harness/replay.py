"""CUDA graphs of the contenders. A replay launches everything at once: no launch from Python is in its time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from dynops import graphs


def captured(call: Callable) -> Callable:
    """A call that replays ``call`` from a CUDA graph and returns the outputs that the capture made.

    Raises:
        RuntimeError: what ``call`` does cannot be captured (it waits for the device, say).
    """
    graph, outputs = graphs.capture(call)

    def replay():
        graph.replay()
        return outputs

    replay()
    _settle()
    return replay


def captured_or(call: Callable, name: str, failed: dict[str, str]) -> Callable | None:
    """:func:`captured`, or None where that fails, with the reason in ``failed``."""
    try:
        return captured(call)
    except RuntimeError as error:  # of the end of the capture; what went wrong in it came before
        failed[name] = first_line(error if error.__cause__ else error.__context__ or error)
        _settle()
        return None


def _settle() -> None:
    """Waits for the device, and raises where it is lost, so that no later call is blamed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def working(calls: dict, failed: dict[str, str]) -> dict:
    """The ``calls`` that run. The reasons of the others, such as too little memory, go to ``failed``."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # a library may lack a layout, a kernel or memory
            failed[str(name)] = first_line(error)
            _settle()
        else:
            found[name] = call
    return found


@functools.cache
def flush(device: torch.device, least: int = 0) -> Callable[[], object]:
    """A call that fills the second-level cache: it reads four times as many bytes as that holds, or ``least``.

    It reads, because lines that it had written would be written back in the time of the call. It also takes
    longer than a launch: the host is ahead of the device when the call begins.
    """
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    with torch.inference_mode(False):
        data = torch.zeros(max(4 * cache, least) // 4, dtype=torch.int32, device=device)
    return data.amax


def device_ms(call: Callable, device: torch.device) -> float:
    """Milliseconds between two events on the stream around a call that finds the second-level cache without its data."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush(device)()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def difference(actual, expected) -> float:
    """The largest ``|a - e| / |e|`` (Euclidean norms, float32) of the tensors of two results; NaN counts as infinite."""
    worst = 0.0
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        error = (a.float() - e.float()).norm() / e.float().norm().clamp_min(1e-30)
        worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst
