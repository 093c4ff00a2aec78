"""ExpertPlan: which expert computes which rows, as (token, choice) pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..geometry import is_int
from .collect import of_one_kind
from .derived import plain

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class ExpertPlan:
    """The experts of each token of a batch: T tokens with K choices each, P = T * K pairs.

    A *row* of the plan is a pair; packed tensors ``[P, C]`` have one row for each.

    Attributes:
        order: int32 ``[P]``, the pair ``t * K + k`` of each row: sorted by expert, by pair within one expert, then
            the dropped pairs.
        offsets: int32 ``[E + 1]``: the rows of expert e are ``offsets[e]`` to ``offsets[e + 1]``; from ``offsets[E]``
            on they are the dropped pairs.
        position: int32 ``[T, K]``, the row of each pair, -1 where it is dropped.
        capacity: the most rows that an expert may have, or None.

    All sizes are known from T, K and E: building and using a plan never synchronises with a GPU.
    """

    def __init__(self, order: Tensor, offsets: Tensor, position: Tensor, capacity: int | None = None):
        for name, value, dims in (("order", order, 1), ("offsets", offsets, 1), ("position", position, 2)):
            if value.dtype != torch.int32 or value.dim() != dims:
                raise TypeError(
                    f"{name}: expected int32 of {dims} dimensions, got {value.dtype} {tuple(value.shape)}"
                )
        if order.shape[0] != position.numel() or offsets.shape[0] < 2:
            raise ValueError(
                f"order, offsets, position: expected [T * K], [E + 1] and [T, K], got {tuple(order.shape)}, "
                f"{tuple(offsets.shape)} and {tuple(position.shape)}"
            )
        # kernels read them flat
        self.order, self.offsets, self.position = (plain(t.contiguous()) for t in (order, offsets, position))
        self.capacity = capacity

    @classmethod
    def from_topk(cls, index: Tensor, num_experts: int, capacity: int | None = None) -> ExpertPlan:
        """Builds the plan of a router's choices.

        Args:
            index: int ``[T, K]`` (or ``[T]``: one choice) in ``[0, num_experts]``; ``num_experts`` means dropped. A
                token may name an expert twice.
            num_experts: E.
            capacity: the most rows of an expert; None: no limit. First choices go before second ones, and so on;
                among equal choices the earlier token goes first (GShard, ICLR 2021). The rest is dropped.

        Raises:
            TypeError: ``index`` is not a tensor of integers.
            ValueError: another rank, no choice, an index outside ``[0, num_experts]`` (looked for on a CPU only;
                on a GPU, where looking would synchronise, it is dropped), 2**31 pairs or more.
        """
        if not isinstance(index, Tensor) or index.dtype not in _INTEGERS:
            what = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected integers [T, K], got {what}")
        if not is_int(num_experts, 1):
            raise ValueError(f"num_experts: expected an int >= 1, got {num_experts!r}")
        if capacity is not None and not is_int(capacity, 0):
            raise ValueError(f"capacity: expected an int >= 0 or None, got {capacity!r}")
        if index.dim() == 1:
            index = index[:, None]
        if index.dim() != 2 or index.shape[1] == 0:
            raise ValueError(f"index: expected [T, K] with K >= 1, got shape {tuple(index.shape)}")
        if index.numel() >= 2**31:
            raise ValueError(f"index: expected fewer than 2**31 pairs, got {index.numel()}")
        limit = -1 if capacity is None else capacity
        order, offsets, position = _expert_index(index, num_experts, limit)
        return cls(order, offsets, position, capacity)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.position.shape[0]

    @property
    def topk(self) -> int:
        """K."""
        return self.position.shape[1]

    @property
    def num_rows(self) -> int:
        """P = T * K, the dropped ones included."""
        return self.order.shape[0]

    @property
    def device(self) -> torch.device:
        return self.order.device

    @property
    def counts(self) -> Tensor:
        """int32 ``[E]``: the rows of each expert."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def token(self) -> Tensor:
        """int32 ``[P]``: the token of each row."""
        return self.order // self.topk

    @property
    def expert(self) -> Tensor:
        """int32 ``[P]``: the expert of each row, E where it is dropped."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.offsets[1:], rows, right=True, out_int32=True)

    @classmethod
    def cat(cls, plans: Iterable[ExpertPlan]) -> ExpertPlan:
        """The plan of several batches of tokens one after the other. Dropped pairs stay dropped.

        Raises:
            TypeError, ValueError: no plans, or plans of different experts, choices or devices.
        """
        plans = of_one_kind(plans, ExpertPlan, num_experts=lambda p: p.num_experts, topk=lambda p: p.topk)
        plan = cls.from_topk(torch.cat([p._choices() for p in plans]), plans[0].num_experts)
        limits = [p.capacity for p in plans]
        plan.capacity = None if None in limits else sum(limits)
        return plan

    def _choices(self) -> Tensor:
        """int32 ``[T, K]``: the expert of each pair, E where it is dropped."""
        expert = torch.searchsorted(self.offsets[1:], self.position, right=True, out_int32=True)
        return torch.where(self.position < 0, self.num_experts, expert)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExpertPlan:
        """The same plan on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ExpertPlan:
        """The same plan in pinned memory. A DataLoader calls this."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> ExpertPlan:
        return ExpertPlan(*map(change, (self.order, self.offsets, self.position)), self.capacity)

    def __repr__(self) -> str:
        limit = "" if self.capacity is None else f", capacity {self.capacity}"
        return f"ExpertPlan({self.tokens} tokens, {self.topk} of {self.num_experts} experts{limit})"


def _expert_index(index: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op, where an index outside [0, E] is a ValueError instead of its RuntimeError."""
    try:
        return torch.ops.dynops.expert_index(index, num_experts, capacity)
    except RuntimeError:
        outside = index.device.type == "cpu" and ((index < 0) | (index > num_experts)).any()
        if not outside:
            raise
    low, high = int(index.min()), int(index.max())
    raise ValueError(f"index: expected values in [0, {num_experts}], got {low} to {high}")
