"""BatchNorm2d of the channels that a plan has, on dense or packed maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import gather_channels, scatter_channels
from ...ops.channels import checks as channel_checks
from ...ops.epilogue import ACTIVATIONS
from ...plans import ChannelPlan, as_channel_plan
from ...stack.norm import fold, fold_batch, uses_batch_statistics
from ..from_dense import FromDense


class ChannelBatchNorm2d(FromDense, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that norms the live channels of each sample and is zero at the others.

    Constructor, parameters and ``state_dict`` are those of ``nn.BatchNorm2d``; so is the result where there is
    no plan and no scale.

    In eval mode ``where(mask, activation(scale * batch_norm(input)), 0)``. In training mode a channel's statistics
    are those of the samples where it is live, and the running ones follow them as ``nn.BatchNorm2d`` has it; a
    channel with fewer than two live values takes its running statistics and does not change them. With ``momentum=None``
    a batch weighs one over the number of batches so far, also for a channel that earlier ones did not have.

    Shape:
        - input: ``[N, C, H, W]``; with ``packed=True`` ``[N, plan.width, H, W]``, what a packed
          :class:`ChannelConv2d` returns.
        - plan: a :class:`dynops.ChannelPlan`, or a mask ``[N, C]`` or ``[C]``; None: all channels.
        - scale: ``[N, C]``, a soft gate.
        - activation: None or a name that ``dynops.ops.channel_conv2d`` takes.
        - output: as ``input``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    _dense = nn.BatchNorm2d

    def forward(
        self,
        input: Tensor,
        plan: ChannelPlan | Tensor | None = None,
        *,
        scale: Tensor | None = None,
        activation: str | None = None,
        packed: bool = False,
    ) -> Tensor:
        if plan is None and scale is None and activation is None:
            return nn.BatchNorm2d.forward(self, input)
        self._check_input_dim(input)
        plan = None if plan is None else as_channel_plan(plan, "plan")
        return norm_channels(self, input, plan, scale, activation, packed)


def norm_channels(
    norm: nn.BatchNorm2d,
    x: Tensor,  # [N, C, H, W], packed [N, width, H, W]
    plan: ChannelPlan | None,
    scale: Tensor | None,  # [N, C]
    activation: str | None,
    packed: bool,
) -> Tensor:  # as x
    """``activation(scale * norm(x))`` at live channels, zero at the others; see :class:`ChannelBatchNorm2d`."""
    _check(norm, x, plan, scale, activation, packed)
    if plan is None:
        out = nn.BatchNorm2d.forward(norm, x)
        out = out if scale is None else out * scale.to(out.dtype)[:, :, None, None]
        return ACTIVATIONS[activation or ""](out)
    if uses_batch_statistics(norm):
        factor, shift = _batch_fold(norm, x, plan, packed)
    else:
        factor, shift = fold(norm)
    if scale is not None:
        factor, shift = factor * scale, shift * scale
    if packed:
        factor, shift = (gather_channels(t.expand(len(x), -1).contiguous(), plan) for t in (factor, shift))
    out = torch.addcmul(_as_map(shift), x, _as_map(factor))  # in float32 where x is in half precision
    if not packed:
        out = torch.where(_as_map(plan.mask()), out, 0)  # masked_fill would leave channels_last
    return ACTIVATIONS[activation or ""](out).to(x.dtype)


def _check(norm, x: Tensor, plan: ChannelPlan | None, scale, activation, packed: bool) -> None:
    channels = norm.num_features
    if plan is not None:
        channel_checks.plan_of(plan, "plan", x, plan.width if packed else None, "input", 1)
        if plan.channels != channels:
            raise ValueError(f"plan: expected one of the norm's {channels} channels, got {plan.channels}")
    elif packed:
        raise ValueError("plan: expected one with packed=True, got None")
    if scale is not None and tuple(scale.shape) != (x.shape[0], channels):
        raise ValueError(f"scale: expected shape {(x.shape[0], channels)}, got {tuple(scale.shape)}")
    if (activation or "") not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {tuple(ACTIVATIONS)[1:]}, got {activation!r}")


def _as_map(values: Tensor) -> Tensor:
    """``[C]`` or ``[N, C]`` as it is broadcast over ``[N, C, H, W]``."""
    return values.view(*([1] if values.dim() == 1 else []), *values.shape, 1, 1)


def _batch_fold(norm: nn.BatchNorm2d, x: Tensor, plan: ChannelPlan, packed: bool) -> tuple[Tensor, Tensor]:
    """The factor and shift ``[C]`` of a norm with the statistics of the live channels; updates the running ones."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    live = plan.mask().expand(len(x), -1)
    n = live.sum(0).to(values.dtype) * x.shape[2:].numel()
    mean = _live_sum(values, plan, live, packed) / n.clamp(min=1)
    at = gather_channels(mean.expand(len(x), -1).contiguous(), plan) if packed else mean
    var = _live_sum((values - _as_map(at)) ** 2, plan, live, packed) / n.clamp(min=1)
    return fold_batch(norm, mean, var, n, n > 1)


def _live_sum(values: Tensor, plan: ChannelPlan, live: Tensor, packed: bool) -> Tensor:
    """``[C]``: the sum of each channel where it is live."""
    sums = values.sum((2, 3))
    return (scatter_channels(sums, plan) if packed else sums.masked_fill(~live, 0)).sum(0)
