"""SamplePlan: the samples of a batch that are computed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .collect import cat_index, of_one_kind
from .derived import IndexPlan
from .masks import MAX_PIXELS, check_index, check_mask_dtype, raising
from .pixels import PixelPlan


class SamplePlan(IndexPlan):
    """The samples of a batch that are computed: those that run a layer, or that have not left it yet.

    Attributes:
        index: int32 ``[K]``, ascending positions of the kept samples. In the capacity form ``[capacity]``, where
            entries from ``count`` on are -1.
        batch: N, the samples of the whole batch.
        count: ``None`` in the compact form; in the capacity form an int32 ``[1]`` tensor on the plan's device, the
            number of valid entries.

    The compact form has exactly one entry for each kept sample; building it on a GPU reads the count back to the
    host. The capacity form has a fixed size and never synchronises; samples past the capacity are dropped, in
    ascending order. (:func:`dynops.budget.cap` drops those with the lowest score.)
    """

    _WHERE = "batch"

    def __init__(self, index: Tensor, batch: int, count: Tensor | None = None):
        check_index(index, count, batch, "[K]")
        self._set(index, batch, count)

    @classmethod
    def from_mask(cls, keep: Tensor, capacity: int | None = None) -> SamplePlan:
        """Builds the plan of a gate's decision.

        Args:
            keep: ``[N]`` or ``[N, 1, ...]``, bool, integer or floating; nonzero = kept.
            capacity: size of the capacity form; ``None`` builds the compact form (inside ``torch.compile``, where
                sizes must not depend on data: the capacity form with room for the whole batch).

        Raises:
            TypeError: ``keep`` is not a tensor, or is complex or quantised.
            ValueError: another shape, a negative capacity, or a NaN in ``keep`` (not checked where checking would
                synchronise: capacity form on a GPU).
        """
        keep = check_keep(keep)
        return cls._of_mask(keep, keep.shape[0], capacity, "keep")

    @classmethod
    def cat(cls, plans: Iterable[SamplePlan]) -> SamplePlan:
        """The plan of several batches one after the other: see :meth:`PixelPlan.cat`."""
        plans = of_one_kind(plans, SamplePlan)
        index, count = cat_index([(plan.index, plan.count, plan.batch) for plan in plans])
        return cls._made(index, sum(plan.batch for plan in plans), count)

    @classmethod
    def full(cls, batch: int, device: torch.device | str = "cpu") -> SamplePlan:
        """The plan that keeps every sample."""
        return cls._made(torch.arange(batch, dtype=torch.int32, device=device), batch)

    @property
    def num_all(self) -> int:
        """All samples of the batch."""
        return self.batch

    @property
    def is_empty(self) -> bool:
        """True if the plan has room for no sample at all."""
        return self.num_rows == 0

    def mask(self) -> Tensor:
        """The plan as a bool mask ``[N]``."""
        return self.inverse() >= 0

    def inverse(self) -> Tensor:
        """int32 ``[N]``: the row of each sample, or -1 where it is not kept."""
        return torch.ops.dynops.inverse_index(self.index, self.count, [self.batch, 1, 1]).view(-1)

    def pixels(self, size: tuple[int, int]) -> PixelPlan:
        """The plan of every pixel of the kept samples at a resolution ``(H, W)`` (kept): how a stack of convolutions runs
        on some samples without a copy of them.

        Raises:
            ValueError: more than 2**31 - 1 pixels in the batch.
        """
        return self.derived(("pixels", size), lambda: self._make_pixels(size))

    def _make_pixels(self, size: tuple[int, int]) -> PixelPlan:
        shape, area = (self.batch, *size), size[0] * size[1]
        if self.batch * area > MAX_PIXELS:
            raise ValueError(f"size: expected at most {MAX_PIXELS} pixels in the batch, got {shape}")
        within = torch.arange(area, dtype=torch.int32, device=self.device)
        index = self.index[:, None] * area + within
        if self.count is not None:
            index = torch.where(self.index[:, None] < 0, -1, index)
        plan = PixelPlan._made(index.view(-1), shape, None if self.count is None else self.count * area)
        plan._samples = self
        return plan

    def dropped(self) -> SamplePlan:
        """The plan of the other samples; of a capacity plan in the capacity form, with room for the whole batch."""
        return SamplePlan.from_mask(self.inverse() < 0, None if self.count is None else self.batch)

    def shrink(self, keep: Tensor | SamplePlan) -> SamplePlan:
        """The plan of those of this plan's samples that stay: an active set that only shrinks.

        Args:
            keep: ``[num_rows]``, for each row of this plan; nonzero = stays. Unused rows of a capacity plan never do.
                Of a compact plan also a compact plan of its rows.

        Returns:
            A plan for the same batch, in this plan's form and, in the capacity form, of its capacity.

        Raises:
            TypeError, ValueError: ``keep`` is no mask of this plan's rows.
        """
        if isinstance(keep, SamplePlan):
            if keep.batch != self.num_rows or self.count is not None or keep.count is not None:
                raise ValueError(
                    f"keep: expected a compact plan of the {self.num_rows} rows of {self}, got {keep}"
                )
            return SamplePlan._made(self.index.index_select(0, keep.index), self.batch)
        keep = check_keep(keep)
        if keep.shape[0] != self.num_rows:
            raise ValueError(
                f"keep: expected one value for each of {self.num_rows} rows, got {keep.shape[0]}"
            )
        if self.count is None:
            rows = raising(torch.ops.dynops.mask_to_index.default, keep, name="keep")
            return SamplePlan._made(self.index[rows], self.batch)
        keep = (keep != 0) & (self.index >= 0)
        rows, count = torch.ops.dynops.mask_to_index_capacity(keep, self.num_rows)
        return SamplePlan._made(torch.where(rows < 0, -1, self.index[rows.clamp(min=0)]), self.batch, count)

    def __repr__(self) -> str:
        form = "" if self.count is None else "capacity "
        return f"SamplePlan({form}{self.num_rows} of {self.batch} samples)"


def most_of(max_fraction: float, size: int) -> int:
    """``floor(max_fraction * size)``: the most that may be computed. 0.29 * 100, in floats a little under 29, is 29."""
    return math.floor(max_fraction * size + 1e-9)


def check_keep(keep: Tensor, name: str = "keep") -> Tensor:
    """``keep`` as ``[N]``, detached, checked."""
    check_mask_dtype(keep, name, "[N]")
    if keep.dim() == 0 or keep.numel() != keep.shape[0]:
        raise ValueError(f"{name}: expected [N] or [N, 1, ...], got shape {tuple(keep.shape)}")
    if keep.shape[0] > MAX_PIXELS:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} samples, got {keep.shape[0]}")
    return keep.detach().reshape(-1)
