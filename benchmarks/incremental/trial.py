"""The row of this benchmark, and the errors of an approximate output."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from torch import Tensor


@dataclass
class Trial:
    """One measurement of a stream against the dense model, in one interleaved run.

    Attributes:
        edited: the share of the input's pixels that each call changes.
        told: the stream is given the mask of what changed, in place of a comparison.
        spread, statistics, attention, threshold, relative: the stream's options.
        dense_ms: median of the faster of eager NCHW and channels_last; of "everything" always channels_last.
        compiled_ms: of the dense model by ``torch.compile`` in channels_last; 0: not measured.
        theory: MACs of everything over MACs of the rows that the stream computed, of the median call.
        error: relative L2 norm of the output against dense after the first edit; of a video its mean.
        last_error: after the last edit that was compared.
        psnr: in dB, against dense, after the first edit; its peak is the range of the dense output.
        agreement: of a segmentation: the share of pixels with the dense model's class.
        kept_mb: that the stream keeps (2**20 bytes).
    """

    case: str
    edit: str
    edited: float
    told: bool = False
    spread: str = "exact"
    statistics: str = "exact"
    attention: str = "exact"
    threshold: float = 0.0
    relative: bool = False
    dense_ms: float = 0.0
    dense_name: str = ""
    compiled_ms: float = 0.0
    ours_ms: float = 0.0
    theory: float = 1.0
    error: float = 0.0
    last_error: float = 0.0
    psnr: float = math.inf
    agreement: float = 1.0
    kept_mb: float = 0.0

    @property
    def speedup(self) -> float:
        """Over the fastest dense version that was measured."""
        return min(self.dense_ms, self.compiled_ms or math.inf) / self.ours_ms

    @property
    def realised(self) -> float:
        return self.speedup / self.theory

    @property
    def key(self) -> tuple:
        """What it measures: a newer row takes the place of one that has the same."""
        return (self.case, self.edit, f"{self.edited:.3f}", *(getattr(self, name) for name in OPTIONS))

    def record(self) -> dict:
        """The row as plain data."""
        return asdict(self) | {"speedup": self.speedup, "realised": self.realised}

    @classmethod
    def from_record(cls, record: dict[str, str]) -> Trial:
        """A row of a CSV file."""
        kinds = {"float": float, "str": str, "bool": lambda text: text == "True"}
        return cls(**{f.name: kinds[f.type](record[f.name]) for f in fields(cls)})


OPTIONS = ("told", "spread", "statistics", "attention", "threshold", "relative")
COLUMNS = [field.name for field in fields(Trial)] + ["speedup", "realised"]


def relative_error(ours: Tensor, dense: Tensor) -> float:
    """The L2 norm of the difference over that of ``dense``."""
    return float((ours - dense).norm() / dense.norm())


def psnr(ours: Tensor, dense: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of ``dense``."""
    error = float((ours - dense).square().mean().sqrt())
    return 20 * math.log10(float(dense.max() - dense.min()) / error) if error else math.inf
