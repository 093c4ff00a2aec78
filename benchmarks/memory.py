"""Peak memory of one layer call, sparse against dense.

Each call is measured in a process of its own, because an allocator keeps what another call returned.
On CPU the number is the peak resident size during the call less that before it (VmHWM - VmRSS, the peak
reset through /proc/self/clear_refs), so scratch memory that no PyTorch allocator sees counts too. Weights
are packed by a call before that. On a GPU it is what the caching allocator reports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import layers
from .report import MemoryRow
from .timing import progress

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


def run(setting: layers.Setting, cases: list[layers.Case] | None = None) -> list[MemoryRow]:
    rows = []
    for case in progress(CASES if cases is None else cases, "memory", "layer"):
        index = CASES.index(case)
        peaks = {name: _in_process(index, name, "random", 1.0, setting) for name in ("NCHW", "channels_last")}
        dense = min(peaks, key=peaks.get)
        for kind, density in MASKS:
            ours = _in_process(index, "ours", kind, density, setting)
            dtype = str(setting.dtype).removeprefix("torch.")
            rows.append(MemoryRow(case.name, kind, density, dtype, peaks[dense], ours, f"{dense} eager"))
    return rows


def _in_process(index: int, contender: str, kind: str, density: float, setting: layers.Setting) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", str(index), contender, kind, str(density)]
    command += [str(setting.device), str(setting.dtype).removeprefix("torch."), str(torch.get_num_threads())]
    environment = {**os.environ, **_ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout)


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


def main() -> None:
    parser = argparse.ArgumentParser(description="measures one call; run by benchmarks.memory.run")
    for name in ("index", "contender", "kind", "density", "device", "dtype", "threads"):
        parser.add_argument(name)
    a = parser.parse_args()
    torch.set_num_threads(int(a.threads))
    setting = layers.Setting(torch.device(a.device), getattr(torch, a.dtype), compiled=False, variants=False)
    with contextlib.redirect_stdout(sys.stderr):
        call = layers.one_call(CASES[int(a.index)], setting, a.contender, a.kind, float(a.density))
        with torch.inference_mode():
            peak = peak_mb(call, setting.device)
    print(peak)


if __name__ == "__main__":
    main()
