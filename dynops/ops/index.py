"""Plan building: mask to index, its inverse, and the input pixels that outputs read.

Each op's reference below defines it. The kernels that the binary registers go before it, on a CPU and on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import ConvGeometry
from .dispatch import Kernels
from .registry import define


def _mask_to_index(mask: Tensor) -> Tensor:
    """int32 ``[P]``: the ascending flat positions of the nonzeros of ``mask``."""
    _refuse_nan(mask)
    return mask.reshape(-1).nonzero()[:, 0].to(torch.int32)


def _refuse_nan(mask: Tensor) -> None:
    if mask.is_floating_point() and bool(mask.isnan().any()):
        raise RuntimeError("mask: NaN")


def _mask_to_index_capacity(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The first ``capacity`` positions, padded with -1, and how many are valid; no host sync."""
    if mask.device.type == "cpu":  # elsewhere looking would synchronise
        _refuse_nan(mask)
    active = (mask.reshape(-1) != 0).to(torch.int32)
    row = active.cumsum(0, dtype=torch.int32) - 1
    slot = torch.where((active != 0) & (row < capacity), row, capacity).long()
    index = torch.full((capacity + 1,), -1, dtype=torch.int32, device=mask.device)
    index[slot] = torch.arange(mask.numel(), dtype=torch.int32, device=mask.device)
    count = active.sum(dtype=torch.int32).clamp(max=capacity).reshape(1)
    return index[:-1].clone(), count


def _inverse_index(index: Tensor, count: Tensor | None, shape: list[int]) -> Tensor:
    """int32 ``[N, H, W]``: the row of each pixel, -1 where there is none."""
    pixels = shape[0] * shape[1] * shape[2]
    inverse = torch.full((pixels + 1,), -1, dtype=torch.int32, device=index.device)
    slot = torch.where(index < 0, pixels, index.long())
    inverse[slot] = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return inverse[:-1].view(shape).clone()


def _needed_mask(index: Tensor, count: Tensor | None, geometry: list[int]) -> Tensor:
    """bool ``[N, in_h, in_w]``: the input pixels that the outputs in ``index`` read."""
    g = ConvGeometry(*geometry)
    pixels = g.batch * g.out_h * g.out_w
    mask = torch.zeros(pixels + 1, device=index.device)
    mask[torch.where(index < 0, pixels, index.long())] = 1
    mask = mask[:-1].view(g.batch, 1, g.out_h, g.out_w)
    ones = torch.ones(1, 1, g.kernel_h, g.kernel_w, device=index.device)
    stride, dilation = (g.stride_h, g.stride_w), (g.dil_h, g.dil_w)
    left, right, top, bottom = g.margins
    if g.transposed:
        full = F.pad(mask, (left, right, top, bottom))
        return F.conv2d(full, ones, stride=stride, dilation=dilation)[:, 0] > 0
    full = F.conv_transpose2d(mask, ones, stride=stride, dilation=dilation)
    return F.pad(full, (-left, -right, -top, -bottom))[:, 0] > 0


def _channel_index(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """int32 ``[S, size]``: the first ``size`` nonzeros of each row of ``mask`` ``[S, C]``, then -1; and their counts."""
    if mask.device.type == "cpu":  # elsewhere looking would synchronise
        _refuse_nan(mask)
    live = mask != 0
    count = live.sum(1, dtype=torch.int32).clamp(max=size)
    first = (~live).to(torch.int8).argsort(dim=1, stable=True)[:, :size].to(torch.int32)
    position = torch.arange(size, dtype=torch.int32, device=mask.device)
    return torch.where(position < count[:, None], first, -1), count


_LISTS = Kernels(None, "channel_lists", copies=True)


def _run_channel_index(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    kernels = None if mask.is_complex() else _LISTS.of("", mask)
    return (_channel_index if kernels is None else kernels.channel_index)(mask, size)


def _channel_mask(index: Tensor, count: Tensor, channels: int) -> Tensor:
    """bool ``[S, channels]``: whether each channel is in the list."""
    mask = torch.zeros(index.shape[0], channels + 1, dtype=torch.bool, device=index.device)
    position = torch.arange(index.shape[1], device=index.device)
    slot = torch.where(position < count[:, None], index, channels).long()
    return mask.scatter_(1, slot, True)[:, :channels].clone()


def _expert_index(index: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order, offsets and positions of an ExpertPlan of ``index`` ``[T, K]``; ``capacity`` < 0: no limit."""
    outside = (index < 0) | (index > experts)
    if index.device.type == "cpu" and bool(outside.any()):  # elsewhere looking would synchronise
        raise RuntimeError(
            f"index: expected values in [0, {experts}], got {int(index.min())} to {int(index.max())}"
        )
    bounds = torch.arange(experts + 1, dtype=torch.int32, device=index.device)
    key = torch.where(outside, experts, index).to(torch.int32)
    if capacity >= 0:  # an expert's rank of each pair, first choices before second ones
        slots = key.t().reshape(-1)
        by_expert, order = slots.sort(stable=True)
        first = torch.searchsorted(by_expert, bounds)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=index.device) - first[by_expert.long()]
        key = torch.where(rank.view(key.t().shape).t() < capacity, key, experts).contiguous()
    by_expert, order = key.reshape(-1).sort(stable=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(order.numel(), dtype=torch.int32, device=index.device)
    position = torch.where(key < experts, position.view(key.shape), -1).contiguous()
    return order.to(torch.int32), torch.searchsorted(by_expert, bounds, out_int32=True), position


def _int32(like: Tensor, *shapes) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


define(
    "mask_to_index(Tensor mask) -> Tensor",
    _mask_to_index,
    lambda mask: _int32(mask, (torch.library.get_ctx().new_dynamic_size(),))[0],
)
define(
    "mask_to_index_capacity(Tensor mask, SymInt capacity) -> (Tensor, Tensor)",
    _mask_to_index_capacity,
    lambda mask, capacity: _int32(mask, (capacity,), (1,)),
)
define(
    "inverse_index(Tensor index, Tensor? count, SymInt[] shape) -> Tensor",
    _inverse_index,
    lambda index, count, shape: index.new_empty(shape),
)
define(
    "needed_mask(Tensor index, Tensor? count, SymInt[] geometry) -> Tensor",
    _needed_mask,
    lambda index, count, geometry: index.new_empty(geometry[:3], dtype=torch.bool),
)
define(
    "channel_index(Tensor mask, SymInt size) -> (Tensor, Tensor)",
    _LISTS.serve(_run_channel_index),
    lambda mask, size: _int32(mask, (mask.shape[0], size), mask.shape[:1]),
)
define(
    "channel_mask(Tensor index, Tensor count, SymInt channels) -> Tensor",
    _channel_mask,
    lambda index, count, channels: index.new_empty((index.shape[0], channels), dtype=torch.bool),
)
define(
    "expert_index(Tensor index, SymInt experts, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    _expert_index,
    lambda index, experts, capacity: _int32(index, (index.numel(),), (experts + 1,), index.shape),
)
