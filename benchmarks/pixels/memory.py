"""Peak memory of one layer call, sparse against dense.

Each call is measured in a process of its own, because an allocator keeps what another call returned.
On CPU the number is the peak resident size during the call less that before it (VmHWM - VmRSS, the peak
reset through /proc/self/clear_refs), so scratch memory that no PyTorch allocator sees counts too. Weights
are packed by a call before that. On a GPU it is what the caching allocator reports.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.text import aligned
from . import layers

# Large layers, where the maps outweigh the allocator's own noise of some 0.2 MB.
CASES = [
    layers.Case("3x3", 8, 64, 64, 56, 56, 3),
    layers.Case("1x1", 8, 64, 256, 56, 56, 1),
    layers.Case("1x1", 8, 256, 64, 56, 56, 1),
    layers.Case("strided", 8, 128, 128, 56, 56, 3, 2),
    layers.Case("200x200", 1, 128, 128, 200, 200, 3),
    layers.Case("200x200", 1, 128, 128, 200, 200, 1),
    layers.Case("depthwise", 8, 144, 144, 56, 56, 3, groups=144),
]
MASKS = (("random", 0.1), ("random", 0.5), ("square", 0.25), ("random", 1.0))

# Every allocation of 64 KB or more is a mapping of its own and goes back at once: peaks are not hidden
# in memory that malloc kept from the call before.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def all_cases(quick: bool = False) -> list[layers.Case]:
    return CASES[: 2 if quick else None]


def measure(case: layers.Case, setting: Setting) -> list[Row]:
    """A row for each mask: megabytes in place of milliseconds."""
    setting = replace(setting, compiled=False, variants=False)
    peaks = {name: _in_process(case, name, "random", 1.0, setting) for name in ("NCHW", "channels_last")}
    dense = min(peaks, key=peaks.get)
    return [
        Row(
            suite="memory",
            group=case.group,
            case=case.name,
            mask=kind,
            density=density,
            variant="plain",
            mode="forward",
            dtype=setting.dtype_name,
            dense_name=f"{dense} eager",
            dense_mb=peaks[dense],
            ours_mb=_in_process(case, "ours", kind, density, setting),
        )
        for kind, density in MASKS
    ]


def _in_process(case: layers.Case, contender: str, kind: str, density: float, setting: Setting) -> float:
    """The peak of one call, measured in a fresh process with as many threads as this one has."""
    arguments = case, contender, kind, density, replace(setting, roofline=None), torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, _ENVIRONMENT), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak, *arguments).result()


def _peak(
    case: layers.Case, contender: str, kind: str, density: float, setting: Setting, threads: int
) -> float:
    torch.set_num_threads(threads)
    call = layers.one_call(case, setting, contender, kind, density)
    with torch.inference_mode():
        return peak_mb(call, setting.device)


def peak_mb(call, device: torch.device) -> float:
    """MB (2**20 bytes) that one ``call`` holds at its peak above what is held before it."""
    for _ in range(2):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before = _status_kb("VmRSS")
    kept = call()
    del kept
    return (_status_kb("VmHWM") - before) / 2**10


def _status_kb(key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def table(rows: list[Row]) -> str:
    """Every row, the one that needs most of its dense layer's memory last."""
    header = ["layer", "mask", "density", "dense MB", "best dense", "ours MB", "ours / dense"]
    return aligned(header, [_cells(row) for row in sorted(rows, key=lambda row: row.ratio)])


def _cells(row: Row) -> list[str]:
    sizes = [f"{row.dense_mb:.1f}", row.dense_name, f"{row.ours_mb:.1f}", f"{row.ratio:.2f}"]
    return [row.case, row.mask, f"{row.density:.2f}", *sizes]
