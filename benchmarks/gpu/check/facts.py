"""The GPU that is there: name, driver, clocks, versions, and if the binary runs on it: ``python -m benchmarks.gpu.check.facts``.

It only reads; no setting of the GPU is changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import dynops
from dynops.testing import random_mask

NO_GPU = 4  # exit code
# The fields that nvidia-smi is asked for. A driver that does not know one leaves it out.
FIELDS = (
    "name", "driver_version", "vbios_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "pstate", "mig.mode.current", "ecc.mode.current",
    "clocks_event_reasons.active", "clocks_throttle_reasons.active", "utilization.gpu",
)  # fmt: skip
SIDE = 8192  # of the matrices


def nvidia_smi(fields=FIELDS, index: int = 0) -> dict[str, str]:
    """The answers of nvidia-smi about a GPU: all fields at once, or one by one where it does not know one; {} without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    found = _query(fields, index)
    if found is None:
        single = [(field, _query((field,), index)) for field in fields]
        found = {field: values[field] for field, values in single if values}
    return {
        k: v for k, v in found.items() if v and "not supported" not in v.lower() and "n/a" not in v.lower()
    }


def _query(fields, index: int) -> dict[str, str] | None:
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if done.returncode == 0 and lines else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def versions() -> dict[str, str]:
    """The versions of Python, torch, CUDA, cuDNN, Triton and nvcc; "" where there is none."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
    }
    found["cudnn"] = str(torch.backends.cudnn.version() or "")
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = ""
    found["nvcc"] = nvcc_version()
    return found


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"V([\d.]+)", done.stdout)
    return release[1] if release else ""


def properties(device: torch.device) -> dict:
    p = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{p.major}.{p.minor}",
        "processors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", None),
    }


def under_load(device: torch.device) -> dict[str, str]:
    """Clocks, power and the reasons for slower clocks while products run for about a second."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(1000):
        a @ b  # queued: the device works while nvidia-smi looks
    found = nvidia_smi([field for field in FIELDS if "version" not in field and "memory" not in field])
    torch.cuda.synchronize(device)
    return found


def binary_problem(device: torch.device) -> str:
    """The reason why dynops._C has no kernels for the device; "" where one of them runs there."""
    if not dynops.backends.has_binary():
        return "there is no binary for this Python"
    if device.type == "cuda" and not hasattr(torch.ops.dynops, "cuda_gather_tiles"):
        return "the binary has no CUDA half"
    mask = random_mask((2, 9, 7), 0.5)
    try:
        found = dynops.PixelPlan.from_mask(mask.to(device)).index.cpu()
    except RuntimeError as error:  # no code for this architecture
        return str(error).splitlines()[0]
    right = mask.flatten().nonzero()[:, 0]
    return "" if torch.equal(found.long(), right) else "the binary's plan of a mask is wrong"


def gpu_facts() -> dict:
    device = torch.device("cuda", 0)
    return {
        "binary_problem": binary_problem(device),
        "gpu": torch.cuda.get_device_name(device),
        **properties(device),
        "versions": versions(),
        "idle": nvidia_smi(),
        "under_load": under_load(device),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check.facts", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--cpu", action="store_true", help="versions only, for a dry run without a GPU")
    args = parser.parse_args(arguments)
    if not args.cpu and not torch.cuda.is_available():
        return NO_GPU
    cpu = {"gpu": "", "versions": versions(), "binary_problem": binary_problem(torch.device("cpu"))}
    facts = cpu if args.cpu else gpu_facts()
    text = json.dumps(facts, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
