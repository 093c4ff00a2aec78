"""Norm and pooling that are zero outside a mask: what stands between converted convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from ... import context
from ...ops import gather_pixels, scatter_pixels
from ...ops.pixels.rows import in_format_of
from ...plans import PixelPlan, as_pixel_plan
from ...stack.norm import norm_rows


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that norms the pixels of a mask and is zero elsewhere.

    Called as ``layer(x, mask_or_plan)``; without that argument inside ``with dynops.active(mask):``
    the mask is the active one; without either it is ``nn.BatchNorm2d``.

    In eval mode ``where(mask, batch_norm(input), 0)``. In training mode the statistics are those of the
    active pixels of the whole batch, and update the running ones as ``nn.BatchNorm2d`` does. With fewer than
    two active pixels the running statistics are used and not updated.

    Shape:
        - input, output: ``[N, C, H, W]``. mask_or_plan: ``[N, H, W]``, ``[N, 1, H, W]``, one for all
          samples (``[H, W]``, or N = 1), or a plan.
    """

    pixels_of = nn.BatchNorm2d

    def forward(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Tensor:
        plan = _plan(input, mask_or_plan)
        if plan is None:
            return nn.BatchNorm2d.forward(self, input)
        self._check_input_dim(input)
        out = scatter_pixels(norm_rows(self, gather_pixels(input, plan), plan), plan)
        return in_format_of(out, input)


class _MaskedPool:
    def forward(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Tensor:
        out = self.pixels_of.forward(self, input)
        plan = _plan(out, mask_or_plan)
        return out if plan is None else mask_pixels(out, plan)


class MaskedMaxPool2d(_MaskedPool, nn.MaxPool2d):
    """``nn.MaxPool2d`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.MaxPool2d


class MaskedAvgPool2d(_MaskedPool, nn.AvgPool2d):
    """``nn.AvgPool2d`` whose output is zero outside a mask; see :class:`MaskedBatchNorm2d` for the call."""

    pixels_of = nn.AvgPool2d


def mask_pixels(x: Tensor, plan: PixelPlan) -> Tensor:
    """``x`` ``[N, C, H, W]`` (unbatched ``[C, H, W]``) at the plan's pixels, zero elsewhere."""
    inactive = plan.inverse() < 0
    return x.masked_fill(inactive[:, None] if x.dim() == 4 else inactive, 0)


def _plan(x: Tensor, mask_or_plan) -> PixelPlan | None:
    """The plan for ``x``: the one passed, else that of ``dynops.active``, else None."""
    if mask_or_plan is not None:
        return as_pixel_plan(mask_or_plan, batch=x.shape[0] if x.dim() == 4 else 1)
    active = context.current()
    if active is None:
        return None
    return active.plan((x.shape[0] if x.dim() == 4 else 1, x.shape[-2], x.shape[-1]), x.device)
