"""ChannelPlan: the channels of each sample that are computed, or read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import modes
from ..geometry import is_int
from .collect import cat_lists, moved, of_one_kind, pinned
from .derived import Derived, plain
from .masks import as_plan, check_mask_dtype, raising


class ChannelPlan(Derived):
    """The live channels of each sample of a batch.

    Attributes:
        index: int32 ``[S, L]``: in row s the ascending live channels of list s, then -1. There is one list
            for each sample (``S = N``); for each sample and head, sample by sample (``S = N * heads``); or one
            for all samples (``shared``, ``S = heads``).
        count: int32 ``[S]``, how many entries of each list are valid, on the index's device.
        channels: C, the channels that the plan is for.
        heads: lists of a sample. More than one only for the input of a convolution whose output channels
            fall into as many groups, each with inputs of its own.
        shared: whether all samples have the same lists.
        capacity: L where it was given, else None (then ``L = C``).

    Building and using a plan never synchronises with a GPU, with two exceptions: :meth:`from_index`, which checks its
    lists, and :attr:`width` without a capacity, the width of packed tensors. Channels past a capacity are dropped, in ascending order.
    """

    def __init__(
        self,
        index: Tensor,
        count: Tensor,
        channels: int,
        *,
        heads: int = 1,
        shared: bool = False,
        capacity: int | None = None,
    ):
        if index.dtype != torch.int32 or index.dim() != 2 or count.dtype != torch.int32 or count.dim() != 1:
            raise TypeError(
                f"index, count: expected int32 [S, L] and [S], got {index.dtype} {tuple(index.shape)}, "
                f"{count.dtype} {tuple(count.shape)}"
            )
        if count.shape[0] != index.shape[0] or (heads > 1 and index.shape[0] % heads):
            raise ValueError(
                f"count: expected one for each of the {index.shape[0]} lists, a multiple of {heads} heads, "
                f"got {count.shape[0]}"
            )
        self.index, self.count = plain(index), plain(count)
        self.channels = channels
        self.heads = heads
        self.shared = shared
        self.capacity = capacity
        super().__init__()

    def _indices(self) -> tuple[Tensor, Tensor]:
        return self.count, self.index

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> ChannelPlan:
        """Builds the plan of a mask.

        Args:
            mask: ``[N, C]`` or ``[N, C, 1, 1]`` (a list for each sample), ``[C]`` (one for all), or ``[N, G, C]``
                (G heads a sample); bool, integer or floating, nonzero = live.
            capacity: the most channels that a list may have; None: all.

        Raises:
            TypeError: ``mask`` is not a tensor, or is complex or quantised.
            ValueError: another rank, a negative capacity, or a NaN in the mask (looked for on a CPU only).
        """
        check_mask_dtype(mask, "mask", "[N, C], [C] or [N, G, C]")
        if mask.dim() == 4 and tuple(mask.shape[2:]) == (1, 1):
            mask = mask[:, :, 0, 0]
        if mask.dim() not in (1, 2, 3):
            raise ValueError(f"mask: expected [N, C], [C] or [N, G, C], got shape {tuple(mask.shape)}")
        if capacity is not None and not is_int(capacity, 0):
            raise ValueError(f"capacity: expected an int >= 0 or None, got {capacity!r}")
        if capacity is None and modes.sizes_are_fixed(mask):
            capacity = mask.shape[-1]
        channels, heads = mask.shape[-1], mask.shape[1] if mask.dim() == 3 else 1
        rows = mask.detach().reshape(mask.shape[:-1].numel(), channels)
        size = channels if capacity is None else min(capacity, channels)
        index, count = raising(torch.ops.dynops.channel_index, rows, size)
        return cls(index, count, channels, heads=heads, shared=mask.dim() == 1, capacity=capacity)

    @classmethod
    def from_index(cls, index: Tensor | list, channels: int, count: Tensor | None = None) -> ChannelPlan:
        """Builds the plan of lists of channels.

        Args:
            index: int ``[N, L]``, one list for each sample, padded with -1 at its end where ``count`` is None; int
                ``[L]``, one list for all samples; or a list of N lists of ints.
            channels: C.
            count: int ``[N]``, the valid entries of each list.

        Raises:
            TypeError: not integers.
            ValueError: a list that is not strictly ascending, or a channel outside ``[0, C)``.
        """
        if not is_int(channels, 0):
            raise ValueError(f"channels: expected an int >= 0, got {channels!r}")
        if isinstance(index, (list, tuple)):
            index = _padded(index)
        if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
            what = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected ints [N, L] or [L], or lists of them, got {what}")
        if index.dim() not in (1, 2):
            raise ValueError(f"index: expected [N, L] or [L], got shape {tuple(index.shape)}")
        shared = index.dim() == 1
        rows = index.view(1, -1) if shared else index
        if count is None:
            count = (rows != -1).flip(1).cumsum(1).gt(0).sum(1)  # up to the last: -1 before it is an error
        if tuple(count.shape) != (rows.shape[0],):
            raise ValueError(f"count: expected shape ({rows.shape[0]},), got {tuple(count.shape)}")
        rows, count = _checked_lists(rows.long(), count.to(rows.device), channels)
        return cls(rows, count, channels, shared=shared, capacity=rows.shape[1])

    @classmethod
    def prefix(cls, width: int | list | Tensor, channels: int, device=None) -> ChannelPlan:
        """The first ``width`` of ``channels`` channels: slimmable widths.

        Args:
            width: an int (for all samples), or ``[N]`` ints, a width for each sample.
            channels: C.
            device: of the plan; by default that of ``width``, if it is a tensor.

        Raises:
            TypeError, ValueError: widths that are no ints in ``[0, C]`` (on a GPU a tensor is not looked at, but
                clamped: looking would synchronise).
        """
        if isinstance(width, Tensor):
            if width.dim() != 1 or width.is_floating_point() or width.is_complex():
                raise TypeError(f"width: expected ints [N], got {width.dtype} {tuple(width.shape)}")
            device = width.device if device is None else device
            widths = width.to(device=device)
        else:
            widths = torch.tensor([width] if is_int(width) else list(width), device="cpu")
            if widths.is_floating_point() and widths.numel():
                raise TypeError(f"width: expected an int or ints [N], got {width!r}")
        looks = modes.may_look(widths) or (
            not isinstance(width, Tensor) and not modes.sizes_are_fixed(widths)
        )
        if looks and widths.numel():
            least, most = int(widths.min()), int(widths.max())
            if least < 0 or most > channels:
                raise ValueError(f"width: expected ints in [0, {channels}], got {least} to {most}")
        count = widths.clamp(0, channels).to(device or widths.device, torch.int32)
        all_channels = torch.arange(channels, dtype=torch.int32, device=count.device)
        index = torch.where(all_channels < count[:, None], all_channels, -1)
        return cls(index, count, channels, shared=is_int(width))

    @classmethod
    def grouped(cls, mask: Tensor, group: int, capacity: int | None = None) -> ChannelPlan:
        """The plan of whole groups of ``group`` adjacent channels.

        Args:
            mask: ``[N, C/group]`` or ``[C/group]``, nonzero = live.
            group: channels of a group.
            capacity: as in :meth:`from_mask`, in channels.
        """
        if not is_int(group, 1):
            raise ValueError(f"group: expected an int >= 1, got {group!r}")
        check_mask_dtype(mask, "mask", "[N, C/group] or [C/group]")
        if mask.dim() not in (1, 2):
            raise ValueError(f"mask: expected [N, C/group] or [C/group], got shape {tuple(mask.shape)}")
        return cls.from_mask(mask.detach().repeat_interleave(group, -1), capacity)

    @classmethod
    def full(cls, channels: int, device: torch.device | str = "cpu") -> ChannelPlan:
        """The plan of all channels, for all samples."""
        return cls.prefix(channels, channels, device)

    @property
    def batch(self) -> int | None:
        """N, or None where all samples share the lists."""
        return None if self.shared else self.index.shape[0] // self.heads

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def width(self) -> int:
        """Channels of a packed tensor on this plan: the capacity, or the longest list (which synchronises, once)."""
        if self.capacity is not None:
            return self.index.shape[1]
        return self.derived("width", lambda: int(self.count.max()) if self.count.numel() else 0)

    @property
    def is_full(self) -> bool:
        """True if every list has every channel (on a GPU False: looking would synchronise)."""
        if not modes.may_look(self.count):
            return False
        return self.derived("full", lambda: self.count.numel() > 0 and int(self.count.min()) == self.channels)

    @property
    def density(self) -> float:
        """Live channels / all channels. Synchronises."""
        return int(self.count.sum()) / max(self.count.numel() * self.channels, 1)

    def mask(self) -> Tensor:
        """The plan as a bool mask: ``[N, C]``, shared ``[C]``, with heads ``[N, G, C]``."""
        mask = torch.ops.dynops.channel_mask(self.index, self.count, self.channels)
        if self.heads > 1:
            return mask.view(-1, self.heads, self.channels)
        return mask[0] if self.shared else mask

    @classmethod
    def cat(cls, plans: Iterable[ChannelPlan]) -> ChannelPlan:
        """The plan of several batches one after the other. A shared plan counts as that of one sample.

        Raises:
            TypeError, ValueError: no plans, or plans of different channels, heads or devices.
        """
        plans = of_one_kind(plans, ChannelPlan, channels=lambda p: p.channels, heads=lambda p: p.heads)
        index, count = cat_lists([p.index for p in plans]), torch.cat([p.count for p in plans])
        limits = [p.capacity for p in plans]
        capacity = None if None in limits else max(limits)
        return cls(index, count, plans[0].channels, heads=plans[0].heads, capacity=capacity)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ChannelPlan:
        """The same plan on another device."""
        return self._with(*moved(self, device, non_blocking))

    def pin_memory(self) -> ChannelPlan:
        """The same plan in pinned memory. A DataLoader calls this."""
        return self._with(pinned(self.index), pinned(self.count))

    def _with(self, index: Tensor, count: Tensor) -> ChannelPlan:
        options = {"heads": self.heads, "shared": self.shared, "capacity": self.capacity}
        return ChannelPlan(index, count, self.channels, **options)

    def __repr__(self) -> str:
        samples = "all samples" if self.shared else f"{self.batch} samples"
        heads = "" if self.heads == 1 else f", {self.heads} heads"
        return f"ChannelPlan({self.channels} channels, {samples}{heads})"


def as_channel_plan(mask_or_plan, name: str = "mask_or_plan") -> ChannelPlan:
    """A :class:`ChannelPlan` from a plan or a mask."""
    return as_plan(ChannelPlan, mask_or_plan, name)


def _padded(lists: list) -> Tensor:
    """Lists of ints as one tensor ``[N, L]``, padded with -1; one list of ints as ``[L]``."""
    if all(is_int(channel) for channel in lists):
        return torch.tensor(lists, dtype=torch.int64, device="cpu")
    if not all(isinstance(row, (list, tuple)) and all(is_int(c) for c in row) for row in lists):
        raise TypeError("index: expected ints [N, L] or [L], or lists of them, got something else in a list")
    width = max((len(row) for row in lists), default=0)
    if any(channel < 0 for row in lists for channel in row):
        raise ValueError("index: expected channels >= 0 in a list of lists, got a negative one")
    return torch.tensor(
        [[*row, *[-1] * (width - len(row))] for row in lists], dtype=torch.int64, device="cpu"
    )


def _checked_lists(rows: Tensor, count: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """int32 lists with -1 past their counts, each strictly ascending in ``[0, channels)``."""
    position = torch.arange(rows.shape[1], device=rows.device)
    valid = position < count[:, None]
    if bool(((count < 0) | (count > rows.shape[1])).any()):
        raise ValueError(f"count: expected 0 to {rows.shape[1]}, got {count.tolist()}")
    inside = (rows >= 0) & (rows < channels)
    ascending = rows[:, 1:] > rows[:, :-1]
    wrong = (valid & ~inside).any(1)
    wrong |= (valid[:, 1:] & ~ascending).any(1)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"index: expected strictly ascending channels in [0, {channels}), got {rows[at].tolist()} in list {at}"
        )
    return torch.where(valid, rows, -1).to(torch.int32), count.to(torch.int32)
