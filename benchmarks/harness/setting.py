"""The setting of a run: everything that its rows have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .roofline import Roofline


@dataclass(frozen=True)
class Budget:
    """The time to measure for: at least ``min_rounds``, then until ``seconds`` or ``max_rounds`` are used up."""

    seconds: float = 3.0
    min_rounds: int = 7
    max_rounds: int = 60
    warmup: int = 2
    calls: int = 2  # timed in each turn, after one that is not

    def scaled(self, factor: float) -> Budget:
        return replace(self, seconds=self.seconds * factor)


@dataclass(frozen=True)
class Setting:
    """The device, dtype and versions of one run, and the time for each of its comparisons.

    Attributes:
        variants: also measure rows with the plan reused and on packed rows, for random masks.
        graph: replay dense versions from CUDA graphs, and ours in the capacity form where that is faster.
        roofline: the peaks of the machine, measured; without it rows have no roofline.
    """

    device: torch.device
    dtype: torch.dtype
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    backward: bool = False
    compiled: bool = True
    compiled_formats: tuple[str, ...] = ("NCHW", "channels_last")
    break_even: bool = True
    variants: bool = True
    budget: Budget = field(default_factory=Budget)
    mask_kinds: tuple[str, ...] = ("random", "square", "photo")
    graph: bool = False
    roofline: Roofline | None = None

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def options(self) -> dict:
        """Arguments of ``Tensor.to`` and ``Module.to``."""
        return {"device": self.device, "dtype": self.dtype}

    def compiles(self, memory_format: str) -> bool:
        """True where versions are compiled in this format; "" is that of tensors that are no maps."""
        return self.compiled and (memory_format in self.compiled_formats or not memory_format)

    def roofline_ms(self, gmacs: float, megabytes: float) -> float:
        """The least time of a forward pass on this machine, or 0 where it is not known."""
        if self.roofline is None or self.backward or not megabytes:
            return 0.0
        return self.roofline.ms(gmacs, megabytes)
