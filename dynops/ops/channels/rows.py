"""gather_channels and scatter_channels: the live channels of each sample, packed, and back.

Packed maps are ``[N, width, H, W]``: channel j of sample n is the j-th of its list, zero past the list's end. Each op
is the other's gradient. ``_gather`` and ``_scatter`` are the reference; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import cpu
from ...kernels.layout import empty_map, memory_format_of
from ...plans import ChannelPlan
from .. import batching
from ..dispatch import Kernels
from ..registry import define
from . import checks


def _slots(index: Tensor, count: Tensor, batch: int, channels: int) -> Tensor:
    """int64 ``[N, L]``: the channel of each packed one; those past the count go to the spare slot C."""
    valid = torch.arange(index.shape[1], device=index.device) < count[:, None]
    return torch.where(valid, index, channels).long().expand(batch, -1)


def _gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """``[N, C, H, W]`` to ``[N, width, H, W]``: the live channels of each sample, then zeros."""
    slots = _slots(index[:, :width], count, x.shape[0], x.shape[1])
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    out = padded.gather(1, slots[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    return out.contiguous(memory_format=memory_format_of(x))


def _scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """``[N, width, H, W]`` to ``[N, channels, H, W]``; ``base``, or zero, where a channel is not live."""
    n, width, *size = packed.shape
    slots = _slots(index[:, :width], count, n, channels)
    out = packed.new_zeros(n, channels + 1, *size)
    if base is not None:
        out[:, :-1] = base
    out.scatter_(1, slots[:, :, None, None].expand(-1, -1, *size), packed)
    return out[:, :-1].clone(memory_format=memory_format_of(packed))


_KERNELS = Kernels(cpu.channels, "channels")


def _fake_gather(x, index, count, width):
    return empty_map(x, (x.shape[0], width, *x.shape[2:]))


def _fake_scatter(packed, index, count, channels, base):
    return empty_map(packed, (packed.shape[0], channels, *packed.shape[2:]))


def channel_mask(index: Tensor, count: Tensor, channels: int) -> Tensor:
    """bool ``[S, channels]``: the channels that each list holds."""
    return torch.ops.dynops.channel_mask(index, count, channels)


def _gather_setup(ctx, inputs, output):
    x, index, count, _ = inputs
    ctx.save_for_backward(index, count)
    ctx.channels = x.shape[1]


def _gather_backward(ctx, grad):
    return _scatter_op(grad, *ctx.saved_tensors, ctx.channels, None), None, None, None


def _scatter_setup(ctx, inputs, output):
    packed, index, count, _, _ = inputs
    ctx.save_for_backward(index, count)
    ctx.width = packed.shape[1]


def without_live(grad: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The gradient of a base: that of the channels that are not live."""
    return grad.masked_fill(channel_mask(index, count, grad.shape[1])[:, :, None, None], 0)


def _scatter_backward(ctx, grad):
    index, count = ctx.saved_tensors
    dpacked = _gather_op(grad, index, count, ctx.width) if ctx.needs_input_grad[0] else None
    return dpacked, None, None, None, without_live(grad, index, count) if ctx.needs_input_grad[4] else None


_gather_op = define(
    "gather_channels(Tensor x, Tensor index, Tensor count, SymInt width) -> Tensor",
    _KERNELS.run("gather", _gather, backend=""),
    _fake_gather,
    _gather_setup,
    _gather_backward,
    terms="x",
    vmap=batching.passive(2, "x"),
)
_scatter_op = define(
    "scatter_channels(Tensor packed, Tensor index, Tensor count, SymInt channels, Tensor? base) -> Tensor",
    _KERNELS.run("scatter", _scatter, backend=""),
    _fake_scatter,
    _scatter_setup,
    _scatter_backward,
    terms="packed, base",
    vmap=batching.passive(2, "packed", "base"),
)


def gather_channels(x: Tensor, plan: ChannelPlan) -> Tensor:
    """The live channels of each sample, packed.

    Args:
        x: ``[N, C]`` or ``[N, C, ...]``, any floating dtype; a 4-D one in either memory format, which the result
            has too.

    Returns:
        ``[N, plan.width, ...]``, zero past the end of a sample's list.

    Raises:
        TypeError, ValueError: ``x`` does not fit the plan.
    """
    checks.plan_of(plan, "plan", x, None, "x", 1)
    width = plan.width
    return _gather_op(_as_map(x), plan.index, plan.count, width).view(x.shape[0], width, *x.shape[2:])


def scatter_channels(packed: Tensor, plan: ChannelPlan, base: Tensor | None = None) -> Tensor:
    """The dense tensor with the packed channels in their places and ``base`` (or zero) at all others.

    Args:
        packed: ``[N, plan.width, ...]``.
        base: ``[N, C, ...]`` of the same dtype, or None.

    Returns:
        ``[N, C, ...]``, memory format of ``packed``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the plan.
    """
    width = plan.width if isinstance(plan, ChannelPlan) else None
    checks.plan_of(plan, "plan", packed, width, "packed", 1)
    shape = (packed.shape[0], plan.channels, *packed.shape[2:])
    if base is not None:
        checks.base_of(base, shape, packed)
        base = _as_map(base)
    return _scatter_op(_as_map(packed), plan.index, plan.count, plan.channels, base).view(shape)


def _as_map(x: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, x.shape[2:].numel())


__all__ = ["gather_channels", "scatter_channels"]
