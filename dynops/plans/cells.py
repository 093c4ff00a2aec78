"""The mask of a layer's output from the mask of its input, by the layer's own geometry.

Along one axis an output pixel stands for a *cell* of the input: as many pixels as the stride, around the centre of the
window that the output pixel reads. The cells of neighbours touch and do not overlap. Where the input is exactly
``stride`` times as large as the output, cell ``i`` is ``stride * i`` to ``stride * i + stride - 1``. A cell outside the
input is the pixel at its edge, so a full mask stays full.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..geometry import ConvGeometry, known


class Axis(NamedTuple):
    """A layer along one axis, in pixels. ``extent``: from the first to the last pixel that a window reads."""

    size: int
    out: int
    extent: int
    stride: int
    before: int  # padding before the first pixel
    ceil: bool  # of a pool: a last window may hang over the padding
    transposed: bool

    @property
    def is_exact(self) -> bool:
        """True if one size is exactly ``stride`` times the other."""
        small, large = (self.size, self.out) if self.transposed else (self.out, self.size)
        return small * self.stride == large

    @property
    def keeps(self) -> bool:
        """True if output pixel i stands for input pixel i."""
        return self.size == self.out if self.stride == 1 else False

    @property
    def padding(self) -> int:
        """Padding before and after together. They may differ where the stride is 1 ("same", pads)."""
        return self.out - self.size + self.extent - 1 if self._is_plain else 2 * self.before

    @property
    def _is_plain(self) -> bool:
        return self.stride == 1 and not self.transposed


def axes(g: ConvGeometry, ceil: bool = False) -> tuple[Axis, Axis]:
    """The axes y and x of a convolution or pool."""
    transposed = bool(g.transposed)
    return (
        Axis(g.in_h, g.out_h, g.dil_h * (g.kernel_h - 1) + 1, g.stride_h, g.pad_h, ceil, transposed),
        Axis(g.in_w, g.out_w, g.dil_w * (g.kernel_w - 1) + 1, g.stride_w, g.pad_w, ceil, transposed),
    )


def mask_after(mask: Tensor, both: tuple[Axis, Axis], ragged: bool) -> Tensor:
    """``[N, H, W]`` bool to ``[N, out_H, out_W]``: true where the cell has a pixel of the mask.

    Args:
        ragged: the mask of each sample is a rectangle from the first pixel on, an image of its own size. The
            result then has the pixels that the layer makes of that image alone.
    """
    for dim, axis in enumerate(both, 1):
        if ragged:
            mask = mask.index_select(dim, _last_read(axis, mask.device).clamp(0, axis.size - 1))
        elif not known(axis.keeps):
            cells = _cells(axis, mask.device).clamp(0, axis.size - 1)  # [out, pixels]
            mask = functools.reduce(torch.bitwise_or, [mask.index_select(dim, at) for at in cells.unbind(1)])
    return mask


def _cells(a: Axis, device: torch.device) -> Tensor:
    """int64 ``[out, pixels of a cell]``."""
    at, exact = torch.arange(a.out, device=device), known(a.is_exact)
    if a.transposed:
        if exact:
            return (at // a.stride)[:, None]
        # the input pixel whose window has its centre within half a stride
        return (-((a.extent - a.stride - 2 * a.before - 2 * at - 1) // (2 * a.stride)) - 1)[:, None]
    first = 0 if exact else (a.extent - a.stride - 2 * a.before + 1) // 2
    if first and is_compiling():  # sizes that are symbols may be exact all the same
        first = first * (torch.full((1,), a.out * a.stride - a.size, device=device) != 0)
    return at[:, None] * a.stride + first + torch.arange(a.stride, device=device)


def _last_read(a: Axis, device: torch.device) -> Tensor:
    """int64 ``[out]``: an image alone has the output pixel if it has this pixel."""
    at = torch.arange(a.out, device=device)
    if a.transposed:
        rest = a.out - (a.size - 1) * a.stride + a.padding - a.extent  # output_padding
        return -((a.extent + rest - a.padding - at - 1) // a.stride)
    if a.ceil:  # the window before ends inside, and this one begins inside
        ends = (at - 1) * a.stride - a.padding + a.extent
        return torch.where(at == 0, 0, torch.maximum(ends, at * a.stride - a.before))
    return at * a.stride - a.padding + a.extent - 1
