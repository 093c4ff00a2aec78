"""The machine that measures: what its numbers depend on, and whether other programs use it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from pathlib import Path

import torch

import dynops


def machine(device: torch.device) -> dict:
    """The processor, threads, versions, instruction sets of the kernels, and the day."""
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
    """The share of the processors that other programs use while this one sleeps; 0 where it is unknown."""

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


def slug(name: str) -> str:
    """Lower-case letters, digits and hyphens, for the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_stem(info: dict, dtype: str, suite: str, mode: str = "forward") -> str:
    """The device, the dtype, the suite, and "backward" for that mode: ``amd-epyc-float32-layers``."""
    return "-".join([slug(info["device"]), dtype, suite] + ([] if mode == "forward" else ["backward"]))
