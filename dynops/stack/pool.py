"""A pool inside ``dynops.use_mask``: the plan of its output, and what it reads outside the images of a ragged batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..context import use_mask
from ..plans import PixelPlan
from .module_geometry import pool_geometry


def pool_under(pool: nn.MaxPool2d | nn.AvgPool2d, x: Tensor, active: use_mask) -> tuple[Tensor, PixelPlan]:
    """The pool's dense output for ``x`` ``[N, C, H, W]`` or ``[C, H, W]``, and the plan of it."""
    in_shape = _map_shape(x)
    if active.ragged:
        out = _of_images(pool, x, active.plan(in_shape, x.device).inverse() < 0)
    else:
        out = pool.pixels_of.forward(pool, x)
    geometry = pool_geometry(pool, in_shape, _map_shape(out))
    return out, active.after(geometry, x.device, bool(pool.ceil_mode))


def _of_images(pool, x: Tensor, outside: Tensor) -> Tensor:
    """The pool's output where pixels ``outside`` the images are padding."""
    outside = outside[:, None] if x.dim() == 4 else outside
    if isinstance(pool, nn.MaxPool2d):
        return pool.pixels_of.forward(pool, x.masked_fill(outside, float("-inf")))
    out = pool.pixels_of.forward(pool, x.masked_fill(outside, 0))
    if pool.divisor_override is not None or pool.count_include_pad:
        return out
    inside = (~outside).to(x.dtype)  # the mean is over these
    share = F.avg_pool2d(inside, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, False)
    return out / share.clamp(min=1e-3)


def _map_shape(x: Tensor) -> tuple[int, int, int]:
    return (x.shape[0] if x.dim() == 4 else 1), x.shape[-2], x.shape[-1]
