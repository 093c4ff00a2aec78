"""Oracles of the channel ops in plain PyTorch, which share no line with dynops.ops, and kinds of plans."""

import torch
from torch import Tensor

from dynops import ChannelPlan
from dynops.testing import dense_masked_conv2d

# What a plan may look like; "every" is None, "ragged" mixes empty, full and random lists.
KINDS = (
    "every", "random", "none", "one", "all", "ragged", "prefix", "shared", "shared prefix", "grouped",
    "capacity", "wide capacity",
)  # fmt: skip


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)


def channels_of(kind: str, n: int, c: int) -> tuple[ChannelPlan | None, Tensor]:
    """A plan of this kind for n samples of c channels, and its bool mask ``[n, c]``."""
    mask = torch.rand(n, c) < 0.5
    if kind == "every":
        return None, torch.ones(n, c, dtype=torch.bool)
    if kind in ("none", "all"):
        mask = torch.full((n, c), kind == "all")
    elif kind == "one":
        mask = torch.arange(c) == torch.randint(0, c, (n, 1))
    elif kind == "ragged":
        mask[0::3], mask[1::3] = False, True
    elif kind == "prefix":
        width = torch.randint(0, c + 1, (n,))
        return ChannelPlan.prefix(width, c), torch.arange(c) < width[:, None]
    elif kind == "shared":
        return ChannelPlan.from_mask(torch.arange(c) % 3 != 1), (torch.arange(c) % 3 != 1).expand(n, c)
    elif kind == "shared prefix":
        return ChannelPlan.prefix((c + 1) // 2, c), (torch.arange(c) < (c + 1) // 2).expand(n, c)
    elif kind == "grouped":
        group = next(size for size in (4, 3, 2, 1) if c % size == 0)
        some = torch.rand(n, c // group) < 0.5
        return ChannelPlan.grouped(some, group), some.repeat_interleave(group, 1)
    elif kind == "capacity":  # drops the last live ones of some samples
        return ChannelPlan.from_mask(mask, c // 2), mask & (mask.cumsum(1) <= c // 2)
    elif kind == "wide capacity":
        return ChannelPlan.from_mask(mask, c + 5), mask
    return ChannelPlan.from_mask(mask), mask


def at_channels(mask: Tensor) -> Tensor:
    """``[N, C]`` as it broadcasts over a map."""
    return mask[:, :, None, None]


def masked_channel_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C/groups, kh, kw]
    bias: Tensor | None,  # [O]
    in_mask: Tensor,  # [N, C], with heads [N, G, C]
    out_mask: Tensor,  # [N, O]
    *,
    scale: Tensor | None = None,  # [N, O]
    base: Tensor | None = None,  # [N, O, out_h, out_w]
    activation: str | None = None,
    **arguments,
) -> Tensor:
    """``channel_conv2d`` as the dense layer would do it: everything is computed, then masked."""
    masks = in_mask.unbind(1) if in_mask.dim() == 3 else [in_mask]

    def parts(t, dim):
        return [None] * len(masks) if t is None else t.chunk(len(masks), dim)

    outs = [
        dense_masked_conv2d(
            torch.where(at_channels(mask), x, 0), w, b, _everywhere(x),
            gate=None if s is None else at_channels(s), activation=activation, **arguments,
        )
        for mask, w, b, s in zip(masks, parts(weight, 0), parts(bias, 0), parts(scale, 1), strict=True)
    ]  # fmt: skip
    return torch.where(at_channels(out_mask), torch.cat(outs, 1), 0 if base is None else base)


def packed_slots(mask: Tensor, width: int) -> Tensor:
    """bool ``[N, width]``: which channels of a packed tensor are live."""
    return torch.arange(width) < mask.sum(1)[:, None]


def packed(dense: Tensor, mask: Tensor, width: int) -> Tensor:
    """``[N, C, ...]`` to ``[N, width, ...]``: the channels of ``mask``, then zeros."""
    slots = packed_slots(mask, width)
    spread = slots.view(*slots.shape, *[1] * (dense.dim() - 2))
    out = dense.new_zeros(len(mask), width, *dense.shape[2:])
    return out.masked_scatter(spread.expand_as(out), dense[mask])


def unpacked(rows: Tensor, mask: Tensor) -> Tensor:
    """``[N, width, ...]`` to ``[N, C, ...]``: zero where ``mask`` is."""
    spread = mask.view(*mask.shape, *[1] * (rows.dim() - 2))
    out = rows.new_zeros(*mask.shape, *rows.shape[2:])
    return out.masked_scatter(spread.expand_as(out), rows[packed_slots(mask, rows.shape[1])])
