"""Functions of ragged batches, whose images have sizes of their own: what depends on these sizes is computed image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ...geometry import enlarged_geometry
from ...kernels.cpu.prepared import StepKind
from ...plans import PixelPlan
from ..layers.pool import avg_pool, max_pool, windows_of_rows
from ..masked_output import pooled_images
from . import layout
from .layout import NCHW, gathered
from .value import SparseMap

_OF_INTERPOLATE = "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"


def each_image(x: SparseMap, run: Callable[[Tensor, int], Tensor], size: tuple[int, int]) -> SparseMap:
    """A function of each image of a ragged batch by itself, as a map.

    Args:
        run: called with an image ``[1, C, h, w]`` and its number in the batch.
        size: of the map.
    """
    dense, made = x.dense(), {}
    plan = x.plan or x.active.plan((x.shape[0], *x.shape[2:]), x.device)
    for n, (h, w) in enumerate(sizes_of_images(plan)):
        if min(h, w) > 0:
            made[n] = run(dense[n : n + 1, :, :h, :w], n)[0]
    mask = torch.zeros(dense.shape[0], *size, dtype=torch.bool, device=dense.device)
    first = next(iter(made.values()), dense[0]) if dense.shape[0] else dense.flatten(0, 1)
    out = first.new_zeros(dense.shape[0], first.shape[0], *size)
    for n, image in made.items():
        where = n, ..., slice(image.shape[1]), slice(image.shape[2])
        out[where], mask[where] = image, True
    plan = x.active.of_images(mask)
    return SparseMap.of_rows(gathered(out, plan, NCHW), plan, x.active)


def sizes_of_images(plan: PixelPlan) -> list[tuple[int, int]]:
    """The height and width of each image of a ragged batch (kept)."""

    def found() -> list[tuple[int, int]]:
        mask = plan.inverse() >= 0
        return list(zip(mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist(), strict=True))

    return plan.derived("sizes of images", found)


def of_each_image(func, name: str, x: SparseMap, args: tuple, kwargs: dict) -> SparseMap | None:
    """A function of a ragged batch that depends on the size of each image; None for any other."""
    if name == "interpolate":
        return _resized_images(x, **named(args, kwargs, *_OF_INTERPOLATE))
    if name not in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        return None
    size = func(torch.empty(1, 1, *x.shape[2:], device="meta"), *args, **kwargs).shape[2:]
    return each_image(x, lambda image, _: func(image, *args, **kwargs), size)


def _resized_images(x: SparseMap, size=None, scale_factor=None, mode="nearest", **given) -> SparseMap | None:
    """``F.interpolate`` of each image: by a factor, or to its size in a map of this size that a layer made before."""
    nearest, factors = mode == "nearest", scale_factor
    if size is None:
        factors = factors if isinstance(factors, (tuple, list)) else (factors,)
        if nearest and all(factor == int(factor) for factor in factors):
            return None  # rows
    elif nearest and is_compiling():
        return None
    given = {"scale_factor": scale_factor, "mode": mode, **given}
    whole = tuple(F.interpolate(torch.empty(1, 1, *x.shape[2:], device="meta"), size, **given).shape[2:])
    if size is None:
        return each_image(x, lambda image, _: F.interpolate(image, **given), whole)
    to = x.active.plan((x.shape[0], *whole), x.device)
    sizes = sizes_of_images(to)
    if nearest and (made := _enlarged_rows(x, to, sizes)) is not None:
        return made
    return each_image(x, lambda image, n: F.interpolate(image, sizes[n], **given), whole)


def _enlarged_rows(x: SparseMap, to: PixelPlan, sizes: list[tuple[int, int]]) -> SparseMap | None:
    """A nearest enlargement by whole factors from rows to rows. None where an image alone has another factor."""
    g = None if x.is_input else enlarged_geometry(x.plan.shape, to.shape)
    if g is None:
        return None
    for own, large in zip(sizes_of_images(x.plan), sizes, strict=True):
        if own != (-(-large[0] // g.stride_h), -(-large[1] // g.stride_w)):
            return None
    rows = windows_of_rows(StepKind.NEAREST, x.rows(), x.plan, to, g)
    return None if rows is None else SparseMap.of_rows(rows, to, x.active)


def pool_of_images(func, name: str, x: SparseMap, args: tuple, kwargs: dict) -> Tensor:
    """A pool of a ragged batch."""
    settings = (max_pool if name == "max_pool2d" else avg_pool)(*args, **kwargs)
    plan = x.plan or x.active.plan((x.shape[0], *x.shape[2:]), x.device)
    outside = ~layout.mask_at(plan, NCHW)
    return pooled_images(settings, lambda dense: func(dense, *args, **kwargs), x.dense(), outside)


def named(args: tuple, kwargs: dict, *names: str) -> dict:
    """The arguments of a call by their names, as far as they have one of these."""
    return {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
