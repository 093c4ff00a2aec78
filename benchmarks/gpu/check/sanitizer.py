"""Calls every CUDA C++ kernel and compares it with its reference: ``python -m benchmarks.gpu.check.sanitizer [--device cuda]``.

Small on purpose: compute-sanitizer runs it. On a CPU the same calls reach the kernels of ``csrc/cpu``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynops import BlockPlan, PixelPlan, backends
from dynops.geometry import ConvGeometry
from dynops.ops import blocks, index
from dynops.ops.pixels import rows

from .stages import FAILED, NOT_RUN, PASSED, Finished

OPS = torch.ops.dynops
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without its cache the allocator gives each tensor memory of its own, whose ends memcheck knows.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TOOLS = ("memcheck", "racecheck")
DONE = "kernels agree with their references"


@dataclass(frozen=True)
class Call:
    """One kernel on one input: ``op(*arguments)`` on the device, ``reference(*arguments)`` on the CPU."""

    name: str
    op: Callable
    reference: Callable
    arguments: tuple
    rounds: bool = False  # sums, which may differ in rounding; copies and indices may not

    def check(self, device: torch.device) -> None:
        """Raises AssertionError where they differ."""
        there = [a.to(device) if isinstance(a, Tensor) else a for a in self.arguments]
        actual, expected = (
            _tensors(f(*args)) for f, args in ((self.op, there), (self.reference, self.arguments))
        )
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            a = a.cpu()
            assert a.shape == e.shape and a.dtype == e.dtype, f"{self.name}, result {i}: {a.shape} {a.dtype}"
            if self.rounds:
                error = (a.double() - e.double()).norm() / e.double().norm()
                assert error <= 4 * torch.finfo(e.dtype).eps, (
                    f"{self.name}, result {i}: differs by {error:.1e}"
                )
            else:
                different = int((a != e).sum())
                assert different == 0, f"{self.name}, result {i}: {different} of {e.numel()} values differ"


def _tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def calls() -> Iterator[Call]:
    """Every kernel of ``csrc/cuda``, with full, capacity and overfull plans, in both memory formats."""
    torch.manual_seed(0)
    yield from _plan_calls()
    yield from _row_calls()
    yield from _block_calls()
    yield from _list_calls()


N, C, H, W = 3, 13, 37, 53  # nothing divides anything
SHAPE = [N, H, W]


def _mask() -> Tensor:
    return torch.rand(N, H, W) < 0.3


def _plan_calls() -> Iterator[Call]:
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float32):
        yield Call(f"mask_to_index {dtype}", OPS.mask_to_index, index._mask_to_index, (_mask().to(dtype),))
    large = torch.rand(2, 300, 400) < 0.5  # more than one block of threads looks at
    yield Call("mask_to_index, large", OPS.mask_to_index, index._mask_to_index, (large,))
    for mask, capacity in (
        (_mask(), N * H * W),
        (_mask(), 100),
        (_mask(), 0),
        (torch.zeros(N, H, W), 50),
        (large, 150_000),
    ):
        arguments = mask, capacity
        yield Call(
            f"mask_to_index_capacity {capacity}",
            OPS.mask_to_index_capacity,
            index._mask_to_index_capacity,
            arguments,
        )
    conv = ConvGeometry(N, 2 * H, 2 * W, H, W, 3, 3, 2, 2, 1, 1, 1, 1, 1, 0)
    for name, plan in _plans().items():
        yield Call(
            f"inverse_index, {name}", OPS.inverse_index, index._inverse_index, (plan.index, plan.count, SHAPE)
        )
        arguments = plan.index, plan.count, list(conv)
        yield Call(f"needed_mask, {name}", OPS.needed_mask, index._needed_mask, arguments)


def _plans() -> dict[str, PixelPlan]:
    mask = _mask()
    capacities = {"compact": None, "capacity": mask.numel(), "overfull": 100}
    return {name: PixelPlan.from_mask(mask, capacity) for name, capacity in capacities.items()}


def _maps(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(N, C, H, W).to(dtype)
    return {"NCHW": x, "channels_last": x.contiguous(memory_format=torch.channels_last)}


def _row_calls() -> Iterator[Call]:
    for dtype in (*DTYPES, torch.float64):
        for layout, x in _maps(dtype).items():
            for form, plan in _plans().items():
                name = f"{dtype}, {layout}, {form}"
                yield Call(
                    f"gather_rows {name}", OPS.gather_rows, rows._gather_rows, (x, plan.index, plan.count)
                )
                packed = torch.randn(plan.num_rows, C).to(dtype)
                for base in (None, x):
                    arguments = packed, plan.index, plan.count, SHAPE, base
                    yield Call(f"scatter_rows {name}", OPS.scatter_rows, rows._scatter_rows, arguments)


def _block_calls() -> Iterator[Call]:
    mask = _mask()
    for halo in (0, 2):
        for capacity in (None, 40):
            plan = BlockPlan.from_mask(mask & (torch.rand(N, H, W) < 0.05), (8, 4), capacity=capacity)
            g = list(plan.geometry.widened((halo, 1, 0, halo)) if halo else plan.geometry)
            form = f"halo {halo}, capacity {capacity}"
            for mean in (False, True):
                yield Call(f"block_mask {form}", OPS.block_mask, blocks._block_mask, (mask, g, mean, 0.25))
            yield Call(
                f"block_cover {form}", OPS.block_cover, blocks._block_cover, (plan.index, plan.count, g)
            )
            for dtype in DTYPES:
                yield from _tile_calls(plan, g, dtype, form, overlap=halo > 0)


def _tile_calls(
    plan: BlockPlan, g: list[int], dtype: torch.dtype, form: str, overlap: bool
) -> Iterator[Call]:
    for layout, x in _maps(dtype).items():
        name, given = f"{dtype}, {layout}, {form}", (plan.index, plan.count, g)
        yield Call(f"gather_tiles {name}", OPS.gather_tiles, blocks._gather_tiles, (x, *given))
        tiles = torch.randn_like(blocks._gather_tiles(x, *given))
        for base in (None, x):
            for add in (True,) if overlap else (False, True):
                arguments = tiles, *given, base, add
                what = f"scatter_tiles{', add' if add else ''} {name}"
                yield Call(what, OPS.scatter_tiles, blocks._scatter_tiles, arguments, rounds=add)


def _list_calls() -> Iterator[Call]:
    for tokens, topk, experts in ((1, 1, 4), (300, 8, 64), (5000, 2, 7)):
        chosen = torch.randint(0, experts + 1, (tokens, topk))  # the number of experts means dropped
        for dtype in (torch.int64, torch.int32):
            for capacity in (-1, 0, 4):
                arguments = chosen.to(dtype), experts, capacity
                name = f"expert_index {tokens}x{topk} of {experts}, {dtype}, capacity {capacity}"
                yield Call(name, OPS.expert_index, index._expert_index, arguments)
    live = torch.rand(5, 77) < 0.4
    lists, counts = index._channel_index(live, 77)
    yield Call("channel_index", OPS.channel_index, index._channel_index, (live, 40))
    yield Call("channel_mask", OPS.channel_mask, index._channel_mask, (lists, counts, 77))


# ------------------------------------------------------------------------------ compute-sanitizer


def compute_sanitizer() -> str | None:
    """The program, in PATH or with the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.exists()), None)


def command(program: str, tool: str, python: str) -> list[str]:
    script = [python, "-m", "benchmarks.gpu.check.sanitizer", "--device", "cuda"]
    return [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *script]


_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# in a kernel, not of the tool itself
_FINDING = re.compile(r"Invalid __\w+__ (?:read|write|atomic)|Race reported")


def verdict(done: Finished, limit: float) -> tuple[str, str]:
    """``(outcome, why)`` of a run under compute-sanitizer.

    Where the script itself did not get through, and nothing was found in a kernel, the tool could not run here (on some
    virtual machines it cannot).
    """
    found = [int(number) for number in _SUMMARY.findall(done.text)]
    whole = DONE in done.text
    if whole and found and not any(found) and done.ok:
        return PASSED, "nothing found"
    if any(found) and (whole or _FINDING.search(done.text)):  # a bad access may end the script
        return FAILED, f"{max(found)} found"
    return NOT_RUN, f"could not run: {done.why(limit)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check.sanitizer", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args(arguments).device)
    if not backends.has_binary():
        raise SystemExit("dynops._C is not built: there are no kernels to call")
    if device.type == "cuda" and not hasattr(OPS, "cuda_gather_tiles"):
        raise SystemExit("dynops._C has no CUDA half: there are no kernels to call")
    count = 0
    for call in calls():
        try:
            call.check(device)
        except Exception as error:
            raise SystemExit(f"{call.name}: {type(error).__name__}: {error}") from error
        count += 1
    print(f"{count} calls: {DONE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
