"""Argument checks of the channel ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...plans import ChannelPlan
from .. import checks


def plan_of(plan, name: str, x: Tensor, channels: int | None, x_name: str, heads: int | None = None) -> None:
    """``plan`` is for the batch and the channels of ``x``; ``channels``: those that ``x`` must have, if packed."""
    if not isinstance(plan, ChannelPlan):
        checks.plan(plan, ChannelPlan, name)
    if not isinstance(x, Tensor) or x.dim() < 2:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{x_name}: expected a tensor [N, C, ...], got {what}")
    checks.floating(x, x_name)
    expected = plan.channels if channels is None else channels
    if x.shape[1] != expected:
        raise ValueError(f"{x_name}: expected {expected} channels, as {name} has them, got {x.shape[1]}")
    _batch_fits(plan, name, x, x_name)
    if heads is not None and plan.heads != heads:
        raise ValueError(f"{name}: expected a plan with one list a sample, got {plan.heads} heads")


def _batch_fits(plan: ChannelPlan, name: str, x: Tensor, x_name: str) -> None:
    batch = plan.batch
    if batch is not None and batch != x.shape[0]:
        raise ValueError(f"{name}: expected a list for each of {x.shape[0]} samples, got {batch}")
    if plan.index.device != x.device:
        raise ValueError(f"{name}: expected it on {x_name}'s device {x.device}, got {plan.device}")


def base_of(base, shape: tuple[int, ...], x: Tensor) -> None:
    """``base`` has the shape of the output, and the dtype and device of ``x``."""
    if not isinstance(base, Tensor):
        raise TypeError(f"base: expected a tensor, got {type(base).__name__}")
    checks.shaped(base, "base", shape, what="the output's shape ")
    checks.same(base, "base", x, dtype=modes.autocast_dtype(x) is None)


def conv_arguments(x, weight, bias, in_plan, out_plan, packed_in: bool, options, activation, scale, base):
    """Checks a channel convolution's arguments. Returns x (padded where the mode needs it), weight, bias, geometry, activation."""
    *_, groups, padding_mode = options
    x, weight, bias = checks.conv_tensors(x, weight, bias)
    in_channels = weight.shape[1] * groups if isinstance(groups, int) else weight.shape[1]
    if in_plan is not None:
        plan_of(in_plan, "in_plan", x, in_plan.width if packed_in else None, "x")
        if in_plan.channels != in_channels:
            raise ValueError(
                f"in_plan: expected one of {in_channels} channels, as weight {tuple(weight.shape)} with "
                f"groups={groups} has them, got {in_plan.channels}"
            )
        _heads_fit(in_plan, weight, groups, packed_in)
    in_shape = (x.shape[0], in_channels, *x.shape[2:]) if packed_in else tuple(x.shape)
    g, fill = checks.conv_geometry(in_shape, weight.shape, options, bias)
    if out_plan is not None:
        _out_plan_fits(out_plan, x, weight.shape[0])
    activation = checks.activation(activation)
    if scale is not None:
        checks.shaped(checks.tensor(scale, "scale", 2, "[N, O]"), "scale", (x.shape[0], weight.shape[0]))
        checks.same(scale, "scale", x, dtype=False)
    if base is not None:
        base_of(base, (x.shape[0], weight.shape[0], g.out_h, g.out_w), x)
    return (x if fill is None else F.pad(x, fill, mode=padding_mode)), weight, bias, g, activation


def _heads_fit(in_plan: ChannelPlan, weight: Tensor, groups: int, packed_in: bool) -> None:
    if in_plan.heads == 1:
        return
    if groups != 1 or packed_in or weight.shape[0] % in_plan.heads:
        raise ValueError(
            f"in_plan: expected {in_plan.heads} heads to divide the {weight.shape[0]} output channels of a "
            f"convolution with groups=1 of a dense input, got groups={groups}"
            f"{', a packed input' if packed_in else ''}"
        )


def _out_plan_fits(out_plan, x: Tensor, outputs: int) -> None:
    if not isinstance(out_plan, ChannelPlan):
        checks.plan(out_plan, ChannelPlan, "out_plan")
    if out_plan.channels != outputs or out_plan.heads != 1:
        raise ValueError(
            f"out_plan: expected one of {outputs} channels without heads, got {out_plan.channels}, "
            f"{out_plan.heads} heads"
        )
    _batch_fits(out_plan, "out_plan", x, "x")
