"""Report: what a call computed, step by step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..stack.changed.tape import ALL, Tape


class Last(NamedTuple):
    """The last call of a stream."""

    tape: Tape
    seconds: float


class Row(NamedTuple):
    """A step of a call.

    Attributes:
        name: the module whose parameters it has, and the function; else the function alone.
        size: ``(N, H, W)`` of what it makes; None: it is no map.
        share: of the pixels that were computed.
        macs, dense_macs: multiply-accumulates, of what was computed and of everything.
        bytes: that are kept of it.
        owed: the largest difference that was left unwritten for the threshold.
        seconds: of the step with those that are computed together with it.
    """

    name: str
    size: tuple[int, int, int] | None
    share: float
    macs: float
    dense_macs: float
    bytes: int
    owed: float
    seconds: float


class Report:
    """What a call computed. ``print`` shows a table.

    Attributes:
        rows: a :class:`Row` for each step.
        theory: MACs of everything over those that were computed.
        seconds: of the call.
        owed: the largest difference that was left unwritten, of the input too.
        bytes: that are kept.
        masks: bool ``[N, H, W]`` by size ``(H, W)``: what changed in maps of that size.
    """

    def __init__(self, rows: list[Row], seconds: float, masks: dict, owed: float = 0.0):
        self.rows, self.seconds, self.masks = rows, seconds, masks
        self.owed = max((row.owed for row in rows), default=0.0)
        self.owed = max(self.owed, owed)
        self.bytes = sum(row.bytes for row in rows)
        computed, dense = sum(row.macs for row in rows), sum(row.dense_macs for row in rows)
        self.theory = dense / computed if computed else float("inf") if dense else 1.0

    @classmethod
    def of(cls, last: Last) -> Report:
        rows, masks = [], {}
        for step in last.tape.steps:
            pixels = step.of
            macs = step.rule.macs(step)
            owed = max((getattr(v.stored, "owed", 0.0) for v in step.outs), default=0.0)
            out = step.outs[0]
            rows.append(
                Row(step.label, out.size, step.rows / pixels if pixels else 0.0, macs * step.rows, macs * pixels,
                    sum(v.bytes for v in step.outs), owed, step.seconds)
            )  # fmt: skip
            if out.size is not None:
                key = tuple(out.size[1:])
                mask = _mask_of(out)
                masks[key] = masks[key] | mask if key in masks and masks[key].shape == mask.shape else mask
        owed = [getattr(value.stored, "owed", 0.0) for value in last.tape.inputs]
        return cls(rows, last.seconds, masks, max(owed, default=0.0))

    def picture(self, size: tuple[int, int] | None = None, sample: int = 0) -> Tensor:
        """uint8 ``[H, W]``: 255 where a map of this size changed; None: the largest."""
        size = max(self.masks, key=lambda s: s[0] * s[1]) if size is None else tuple(size)
        if size not in self.masks:
            raise ValueError(f"size: expected one of {sorted(self.masks)}, got {size}")
        return self.masks[size][sample].to(torch.uint8) * 255

    def __str__(self) -> str:
        lines = [f"{'step':48} {'size':>12} {'computed':>9} {'MMACs':>9} {'kept MB':>8} {'ms':>7}"]
        for row in self.rows:
            size = "x".join(map(str, row.size)) if row.size else ""
            lines.append(
                f"{row.name[-48:]:48} {size:>12} {row.share:9.1%} {row.macs / 1e6:9.1f} {row.bytes / 1e6:8.2f} {row.seconds * 1e3:7.2f}"
            )
        lines.append(
            f"theory {self.theory:.2f}x, {self.seconds * 1e3:.1f} ms, {self.bytes / 1e6:.1f} MB kept, owed at most {self.owed:.3g}"
        )
        return "\n".join(lines)


def _mask_of(value) -> Tensor:
    if value.plan is None or value.plan is ALL:
        return torch.full(value.size, value.plan is ALL, device="cpu")
    return value.plan.mask().cpu()
