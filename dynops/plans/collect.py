"""Several plans as one: ``cat`` along the batch, also by ``torch.utils.data.default_collate``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def of_one_kind(plans, kind: type, **attributes) -> list:
    """``plans`` as a list, or an error that says which of them does not go with the first.

    Args:
        attributes: names and getters of attributes that all plans must share.
    """
    plans = list(plans)
    if not plans:
        raise ValueError(f"plans: expected at least one {kind.__name__}, got none")
    for i, plan in enumerate(plans):
        if not isinstance(plan, kind):
            raise TypeError(f"plans[{i}]: expected a {kind.__name__}, got {type(plan).__name__}")
        for name, get in {"device": lambda p: p.device, **attributes}.items():
            if get(plan) != get(plans[0]):
                raise ValueError(
                    f"plans[{i}]: expected the {name} of the first, {get(plans[0])}, got {get(plan)}"
                )
    return plans


def cat_index(parts: list[tuple[Tensor, Tensor | None, int]]) -> tuple[Tensor, Tensor | None]:
    """The index and count of plans one after the other; ``parts``: index, count and size of each.

    Where one has the capacity form, so has the result, with room for all; nothing synchronises.
    """
    shifted, first = [], 0
    for index, _, size in parts:
        shifted.append(torch.where(index < 0, index, index + first))
        first += size
    index = torch.cat(shifted)
    if all(count is None for _, count, _ in parts):
        return index, None
    rows, count = torch.ops.dynops.mask_to_index_capacity(index >= 0, index.shape[0])
    return torch.where(rows < 0, -1, index[rows.clamp(min=0)]), count


def cat_lists(lists: list[Tensor]) -> Tensor:
    """int32 ``[S, L]`` of lists ``[S_i, L_i]``, padded with -1 to the longest."""
    longest = max(index.shape[1] for index in lists)
    return torch.cat([F.pad(index, (0, longest - index.shape[1]), value=-1) for index in lists])


def moved(plan, device, non_blocking: bool) -> tuple[Tensor, Tensor | None]:
    """The index and count of ``plan`` on another device."""
    count = None if plan.count is None else plan.count.to(device, non_blocking=non_blocking)
    return plan.index.to(device, non_blocking=non_blocking), count


def pinned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.pin_memory()


def register_collate(*kinds: type) -> None:
    """Makes ``default_collate`` turn a list of plans into one plan, where this torch can be told so."""
    from torch.utils.data._utils import collate

    table = getattr(collate, "default_collate_fn_map", None)
    if table is None:
        return
    for kind in kinds:
        table[kind] = lambda batch, *, collate_fn_map=None, kind=kind: kind.cat(batch)
