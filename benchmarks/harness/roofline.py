"""The roofline: the least time of an op on this machine, from peaks that are measured in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .contenders import bound
from .setting import Budget
from .timing import interleaved

READ, PRODUCT = "memory read", "peak product"
CALL_MS = {"cpu": 0.010, "cuda": 0.0}  # of any call, however little it computes
SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices of the dense product


class Roofline:
    """The peaks of a machine in one dtype: the fastest of a few reads of 512 MB, and of a few dense products.

    Args:
        side: of the matrices of the dense product; None: 8192 on a GPU, 1024 on a CPU.
        rows: of 32 KB, that are read.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, side: int | None = None, rows: int = 1 << 14
    ):
        data = torch.ones(rows, 1 << 13, device=device)
        reads = {
            "sum": data.sum,
            "sums of rows": bound(data.sum, 1),
            "largest integer": data.view(torch.int32).amax,
        }
        products, gmacs = _products(dtype, device, side or SIDES[device.type])
        with torch.inference_mode():
            first = interleaved({**reads, **products}, device, Budget(3.0 if rows >= 1 << 14 else 0.0, 5))
        read = min(reads, key=first.get)
        product = min(products, key=lambda name: first[name] / gmacs[name])
        self.calls = {READ: reads[read], PRODUCT: products[product]}
        self.times = {READ: first[read], PRODUCT: first[product]}
        self.megabytes, self.gmacs = data.numel() * 4 / 1e6, gmacs[product]
        self.dtype, self.call_ms = str(dtype).removeprefix("torch."), CALL_MS[device.type]
        self.runs: list[dict[str, float]] = [self.times]

    def ms(self, gmacs: float, megabytes: float, times: dict[str, float] | None = None) -> float:
        """The later of two times, MACs at the peak and bytes at the speed of memory, and what any call costs.

        Args:
            times: milliseconds of :attr:`calls` in the same interleaved run. None: those of the start.
        """
        times = times or self.times
        products = gmacs / self.gmacs * times[PRODUCT]
        return max(products, megabytes / self.megabytes * times[READ]) + self.call_ms

    def __str__(self) -> str:
        peaks = sorted(2e3 * self.gmacs / times[PRODUCT] for times in self.runs)
        speeds = sorted(self.megabytes / times[READ] for times in self.runs)
        return (
            f"Measured in this run: a peak of {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s in {self.dtype}, memory read "
            f"at {speeds[0]:.0f} to {speeds[-1]:.0f} GB/s."
        )


def _products(
    dtype: torch.dtype, device: torch.device, side: int
) -> tuple[dict[str, Callable], dict[str, float]]:
    """Calls of dense products, and billions of MACs of each."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    c = min(side // 4, 256)  # channels of the convolutions
    x = torch.randn(8, c, 28, 28, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    calls, gmacs = {"mm": lambda: a @ b}, {"mm": side**3 / 1e9}
    for size in (1, 3):
        weight = torch.randn(c, c, size, size, device=device).to(dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        name = f"convolution {size}x{size}"
        calls[name] = bound(F.conv2d, x, weight, None, 1, size // 2)
        gmacs[name] = 8 * 28 * 28 * c * c * size * size / 1e9
    return calls, gmacs
