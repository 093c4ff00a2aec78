"""interpolate_pixels: unselected positions filled from the selected ones.

Papers: Xie et al., Spatially Adaptive Inference with Stochastic Feature Sampling and Interpolation
(ECCV 2020): normalised Gaussian; Figurnov et al., PerforatedCNNs (NIPS 2016): nearest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...plans import PixelPlan
from .. import checks
from ..dispatch import Kernels
from ..observers import observers
from ..registry import define
from .rows import gather_pixels, in_format, memory_format_of, scatter_pixels

MODES = ("gaussian", "nearest")
_FAR = 2**62  # more than any squared distance, with room to add one


def _nearest_pixel(index: Tensor, count: Tensor | None, shape: list[int]) -> Tensor:
    """int32 ``[N, H, W]``: the flat position of the nearest pixel in ``index``, -1 where its sample has none.

    Exact Euclidean distance; of several pixels the first in row-major order. Two passes: the nearest in each column,
    then over columns at growing offsets. A CPU stops when no nearer one can come: O(N*H*W) memory and O(N*H*W*D) time
    for a largest distance D. A GPU has a kernel for it.
    """
    n, h, w = shape
    if n * h * w == 0:
        return index.new_empty(shape)
    selected = torch.zeros(n * h * w + 1, dtype=torch.bool, device=index.device)
    selected[torch.where(index < 0, n * h * w, index.long())] = True
    distance, row = _nearest_in_column(selected[:-1].view(n, h, w))
    column = torch.arange(w, device=index.device)
    best, position = distance.clone(), row * w + column
    empty = (distance == _FAR).flatten(1).all(1)[:, None, None]
    for offset in range(1, w):
        if index.device.type == "cpu" and offset * offset > best.masked_fill(empty, 0).max():
            break
        left, right = slice(0, w - offset), slice(offset, w)
        for to, source in ((right, left), (left, right)):
            d = distance[..., source] + offset * offset
            p = row[..., source] * w + column[source]
            nearer = (d < best[..., to]) | ((d == best[..., to]) & (p < position[..., to]))
            best[..., to] = torch.where(nearer, d, best[..., to])
            position[..., to] = torch.where(nearer, p, position[..., to])
    start = torch.arange(n, device=index.device)[:, None, None] * (h * w)
    return torch.where(empty, -1, position + start).to(torch.int32)


def _nearest_in_column(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to, and row of, the nearest selected pixel in the same column (the upper of two)."""
    h = selected.shape[1]
    y = torch.arange(h, device=selected.device)[:, None]
    above = torch.where(selected, y, -1).cummax(1).values
    below = torch.where(selected, y, h).flip(1).cummin(1).values.flip(1)
    to_above = torch.where(above >= 0, (y - above) ** 2, _FAR)
    to_below = torch.where(below < h, (below - y) ** 2, _FAR)
    upper = to_above <= to_below
    return torch.where(upper, to_above, to_below), torch.where(upper, above, below)


define(
    "nearest_pixel(Tensor index, Tensor? count, SymInt[] shape) -> Tensor",
    Kernels(None, "rows", copies=True).run("nearest_pixel", _nearest_pixel, backend=""),
    lambda index, count, shape: index.new_empty(shape),
)


def interpolate_pixels(
    x: Tensor,
    plan: PixelPlan,
    mode: str = "gaussian",
    *,
    kernel_size: int = 7,
    sigma: float | Tensor = 1.5,
) -> Tensor:
    """Fills the positions that a plan did not select from those that it did.

    Selected positions keep their values exactly. At the others:

    * ``"gaussian"``: the mean of the selected values in the window, with weights
      ``exp(-distance**2 / (2 sigma**2))`` that are normalised to sum to one; where the window holds
      none (or only weights that underflow), the nearest value, its limit for a small ``sigma``;
    * ``"nearest"``: the value of the nearest selected pixel of the sample, in exact Euclidean
      distance; of several, the first in row-major order.

    A sample without selected pixels is filled with zeros.

    Args:
        x: ``[N, C, H, W]`` at the plan's resolution, of which only selected values are read, or
            packed rows ``[P, C]``; floating.
        plan: the selected pixels, in either form.
        kernel_size: side of the Gaussian's window in pixels, odd.
        sigma: its standard deviation in pixels; a scalar tensor may need a gradient.

    Returns:
        ``[N, C, H, W]``, dtype of ``x`` (half precision is averaged in float32), memory format of
        ``x`` (channels_last from rows). Gradients flow to the selected values and to ``sigma``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: SFSI (ECCV 2020), PerforatedCNNs (NIPS 2016).
    """
    _check(x, plan, mode, kernel_size, sigma)
    rows = gather_pixels(x, plan) if x.dim() == 4 else x
    for observer in observers():
        observer.filled(plan, rows.shape[1], mode, kernel_size)
    selected = (plan.inverse() >= 0)[:, None]
    if plan.num_pixels * rows.shape[1] == 0:
        out = scatter_pixels(rows, plan)
    elif mode == "nearest":
        out = _fill_nearest(rows, plan)
    else:
        filled, reached = _fill_gaussian(rows, plan, selected, kernel_size, sigma)
        # one look at the device to save the search; where that must not be, the search
        if plan.count is None and not modes.sizes_are_fixed(reached) and bool(reached.all()):
            out = filled
        else:
            out = torch.where(reached, filled, _fill_nearest(rows, plan))
        out = torch.where(selected, scatter_pixels(rows, plan), out)
    return in_format(out, memory_format_of(x) if x.dim() == 4 else torch.channels_last)


def _fill_nearest(rows: Tensor, plan: PixelPlan) -> Tensor:
    nearest = torch.ops.dynops.nearest_pixel(plan.index, plan.count, list(plan.shape)).reshape(-1).long()
    row = plan.inverse().reshape(-1)[nearest.clamp(min=0)]
    row = torch.where(nearest < 0, rows.shape[0], row)
    values = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[row]
    return values.view(*plan.shape, rows.shape[1]).permute(0, 3, 1, 2)


def _fill_gaussian(
    rows: Tensor, plan: PixelPlan, selected: Tensor, size: int, sigma
) -> tuple[Tensor, Tensor]:
    """The weighted means, and where there was a weight at all ``[N, 1, H, W]``."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if isinstance(sigma, Tensor):  # a number stays one: its copy could not be captured in a CUDA graph
        sigma = sigma.to(rows.device, dtype)
    offset = torch.arange(size, dtype=dtype, device=rows.device) - size // 2
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    weight = _blur(selected.to(dtype), kernel)
    reached = weight > torch.finfo(dtype).tiny
    sums = _blur(scatter_pixels(rows.to(dtype), plan), kernel)
    return (sums / torch.where(reached, weight, 1)).to(rows.dtype), reached


def _blur(x: Tensor, kernel: Tensor) -> Tensor:  # [N, C, H, W], [K]
    """Each channel convolved with ``kernel`` along both axes, zero outside the map."""
    channels, size = x.shape[1], kernel.shape[0]
    x = F.conv2d(
        x, kernel.view(1, 1, size, 1).expand(channels, 1, size, 1), None, 1, (size // 2, 0), 1, channels
    )
    return F.conv2d(
        x, kernel.view(1, 1, 1, size).expand(channels, 1, 1, size), None, 1, (0, size // 2), 1, channels
    )


def _check(x, plan, mode, kernel_size, sigma) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [N, C, H, W] or packed rows [P, C], got {type(x).__name__}")
    checks.pixel_plan(plan, "plan", x.device)
    checks.floating(x)
    checks.packed_rows(x, plan, "x") if x.dim() == 2 else checks.dense_map(x, plan, "x")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected a positive odd int, got {kernel_size!r}")
    if isinstance(sigma, Tensor):
        if sigma.numel() != 1:
            raise ValueError(f"sigma: expected one number, got shape {tuple(sigma.shape)}")
    elif not sigma > 0:
        raise ValueError(f"sigma: expected a number > 0, got {sigma!r}")
