"""Norms, pooling and resampling that are zero outside a mask: what stands between converted convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from ... import context
from ...ops import gather_pixels, scatter_pixels
from ...ops.pixels.rows import in_format_of
from ...plans import PixelPlan, as_pixel_plan
from ...stack.layers.norm import group_norm_rows
from ...stack.maps import layer_input, normed
from ...stack.masked_output import under_mask
from ...stack.norm import norm_rows


class _MaskedNorm:
    def forward(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Tensor:
        if mask_or_plan is None and (x := layer_input(input, context.current())) is not None:
            return normed(self, x)
        plan = _plan(input, mask_or_plan) if input.dim() == 4 else None
        if plan is None:  # a norm of batches refuses any other rank
            return self.pixels_of.forward(self, input)
        rows = norm_rows if isinstance(self, nn.modules.batchnorm._BatchNorm) else group_norm_rows
        return in_format_of(scatter_pixels(rows(self, gather_pixels(input, plan), plan), plan), input)


class MaskedBatchNorm2d(_MaskedNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that norms the pixels of a mask and is zero elsewhere.

    Called as ``layer(x, mask_or_plan)``; without that argument inside ``with dynops.use_mask(mask):``
    the mask is the active one; without either it is ``nn.BatchNorm2d``.

    In eval mode ``where(mask, batch_norm(input), 0)``. In training mode the statistics are those of the
    active pixels of the whole batch, and update the running ones as ``nn.BatchNorm2d`` does. With fewer than
    two active pixels the running statistics are used and not updated.

    Shape:
        - input, output: ``[N, C, H, W]``. mask_or_plan: ``[N, H, W]``, ``[N, 1, H, W]``, one for all
          samples (``[H, W]``, or N = 1), or a plan.
    """

    pixels_of = nn.BatchNorm2d


class MaskedSyncBatchNorm(_MaskedNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` of the pixels of a mask: in training mode the statistics are those of all ranks' active pixels.

    See :class:`MaskedBatchNorm2d` for the call.
    """

    pixels_of = nn.SyncBatchNorm


class MaskedGroupNorm(_MaskedNorm, nn.GroupNorm):
    """``nn.GroupNorm`` that norms the pixels of a mask and is zero elsewhere.

    See :class:`MaskedBatchNorm2d` for the call. The mean and variance of a sample's group are over its active pixels,
    in both modes. This holds for a map that a model views as ``[N, C, H * W]`` too. With one active value the variance is 0.
    Other inputs that are not ``[N, C, H, W]`` are normed whole.

    Paper: Wu and He, Group Normalization (ECCV 2018).
    """

    pixels_of = nn.GroupNorm


class MaskedInstanceNorm2d(_MaskedNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` without running statistics that norms the pixels of a mask and is zero elsewhere.

    As :class:`MaskedGroupNorm`, with a group for each channel.

    Raises:
        ValueError: ``track_running_stats``.
    """

    pixels_of = nn.InstanceNorm2d

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.track_running_stats:
            raise ValueError("track_running_stats: expected False, got True")


class _MaskedOutput:
    def forward(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Tensor:
        active = context.current()
        if mask_or_plan is None and (x := layer_input(input, active)) is not None:
            return self.pixels_of.forward(self, x)
        if mask_or_plan is None and active is not None:
            out, plan = under_mask(self, input, active)
            return mask_pixels(out, plan)
        out = self.pixels_of.forward(self, input)
        plan = _plan(out, mask_or_plan)
        return out if plan is None else mask_pixels(out, plan)


class MaskedUpsample(_MaskedOutput, nn.Upsample):
    """``nn.Upsample`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call.

    Inputs that are not ``[N, C, H, W]`` have no mask.
    """

    pixels_of = nn.Upsample

    def forward(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Tensor:
        if input.dim() != 4:
            return nn.Upsample.forward(self, input)
        return super().forward(input, mask_or_plan)


class MaskedPixelShuffle(_MaskedOutput, nn.PixelShuffle):
    """``nn.PixelShuffle`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.PixelShuffle


class MaskedZeroPad2d(_MaskedOutput, nn.ZeroPad2d):
    """``nn.ZeroPad2d`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.ZeroPad2d


class MaskedMaxPool2d(_MaskedOutput, nn.MaxPool2d):
    """``nn.MaxPool2d`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.MaxPool2d


class MaskedAvgPool2d(_MaskedOutput, nn.AvgPool2d):
    """``nn.AvgPool2d`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.AvgPool2d


def mask_pixels(x: Tensor, plan: PixelPlan) -> Tensor:
    """``x`` ``[N, C, H, W]`` (unbatched ``[C, H, W]``) at the plan's pixels, zero elsewhere."""
    inactive = plan.inverse() < 0
    return x.masked_fill(inactive[:, None] if x.dim() == 4 else inactive, 0)


def _plan(x: Tensor, mask_or_plan) -> PixelPlan | None:
    """The plan for ``x``: the one passed, else that of ``dynops.use_mask``, else None."""
    if mask_or_plan is not None:
        return as_pixel_plan(mask_or_plan, batch=x.shape[0] if x.dim() == 4 else 1)
    active = context.current()
    if active is None:
        return None
    return active.plan((x.shape[0] if x.dim() == 4 else 1, x.shape[-2], x.shape[-1]), x.device)
