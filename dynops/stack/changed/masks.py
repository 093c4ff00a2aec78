"""How changed pixels spread: masks ``[N, H, W]`` bool through the neighbourhoods that layers read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import ConvGeometry
from ...plans.masks import resize_mask


class Reads(NamedTuple):
    """Along one axis: the input position of each read of an output pixel, int64 ``[reads, out]``; -1 outside.

    Attributes:
        size: of the input.
        edges: bool ``[out]``: the output pixels whose reads were moved to inside the map, or None.
    """

    at: Tensor
    size: int
    edges: Tensor | None = None

    @property
    def reads_outside(self) -> Tensor:
        """bool ``[out]``: output pixels that read outside of the map, where padding is."""
        outside = (self.at < 0).any(0)
        return outside if self.edges is None else outside | self.edges

    @property
    def reads_itself(self) -> bool:
        """True where each output pixel reads the input pixel at its own place."""
        if self.at.shape[1] != self.size:
            return False
        return bool((self.at == torch.arange(self.size, device=self.at.device)).any(0).all())


@functools.lru_cache(maxsize=512)
def window(
    size: int, out: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool, device
) -> Reads:
    """What a convolution or a pool reads."""
    taps, o = torch.arange(kernel, device=device)[:, None] * dilation, torch.arange(out, device=device)
    if transposed:
        at = o + padding - taps
        at = torch.where(at % stride == 0, at.div(stride, rounding_mode="floor"), -1)
    else:
        at = o * stride - padding + taps
    return Reads(at.masked_fill((at < 0) | (at >= size), -1), size)


def of_geometry(g: ConvGeometry, device) -> tuple[Reads, Reads]:
    """What a convolution of this geometry reads, along y and x."""
    transposed = bool(g.transposed)
    return (
        window(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dil_h, transposed, device),
        window(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dil_w, transposed, device),
    )


def turned(g: ConvGeometry) -> ConvGeometry:
    """The convolution whose outputs read what the inputs of ``g`` write: it makes of a plan of inputs that of the outputs."""
    sizes = {"in_h": g.out_h, "in_w": g.out_w, "out_h": g.in_h, "out_w": g.in_w}
    return g._replace(**sizes, transposed=1 - int(g.transposed))


@functools.lru_cache(maxsize=256)
def padded(size: int, before: int, after: int, mode: str, device) -> Reads:
    """What ``F.pad`` reads: one pixel each."""
    if mode == "constant":
        at = torch.arange(-before, size + after, device=device)
        return Reads(at.masked_fill(at >= size, -1).clamp(min=-1)[None], size)
    at = F.pad(torch.arange(size, dtype=torch.float64, device=device)[None, None], (before, after), mode)
    place = torch.arange(-before, size + after, device=device)
    return Reads(at[0].long(), size, (place < 0) | (place >= size))


@functools.lru_cache(maxsize=256)
def nearest(size: int, out: int, scale: float | None, device) -> Reads:
    """What nearest interpolation reads, as torch computes it."""
    at = torch.arange(size, dtype=torch.float32, device=device)[None, None, :, None]
    at = (
        F.interpolate(at, size=(out, 1))
        if scale is None
        else F.interpolate(at, scale_factor=(scale, 1.0), recompute_scale_factor=False)
    )
    return Reads(at[0, :, :, 0].long(), size)


@functools.lru_cache(maxsize=256)
def linear(size: int, out: int, align_corners: bool, scale: float | None, device) -> Reads:
    """What linear interpolation reads, and one pixel more where rounding may decide."""
    o = torch.arange(out, dtype=torch.float64, device=device)
    if align_corners:
        place = o * ((size - 1) / max(out - 1, 1))
    else:
        place = ((o + 0.5) * (size / out if scale is None else 1 / scale) - 0.5).clamp(min=0)
    first = (place - 1e-4).floor()
    at = torch.stack([first, first + 1, (place + 1e-4).floor() + 1]).long()
    return Reads(at.clamp(0, size - 1), size, ((at < 0) | (at >= size)).any(0) | (place <= 0))


def spread(mask: Tensor, reads: tuple[Reads, Reads]) -> Tensor:
    """The output pixels ``[N, out_h, out_w]`` that read a pixel of ``mask`` ``[N, H, W]``."""
    for dim, axis in ((1, reads[0]), (2, reads[1])):
        if axis.at.shape == (1, axis.size) and axis.reads_itself:
            continue
        pad = (0, 1) if dim == 2 else (0, 0, 0, 1)
        wider = F.pad(mask, pad)  # position -1 is false
        mask = functools.reduce(
            torch.logical_or, (wider.index_select(dim, at % wider.shape[dim]) for at in axis.at)
        )
    return mask


def borders(reads: tuple[Reads, Reads]) -> Tensor:
    """bool ``[1, out_h, out_w]``: the output pixels that read outside of the map."""
    return (reads[0].reads_outside[:, None] | reads[1].reads_outside)[None]


def dilated(mask: Tensor, by: int) -> Tensor:
    """``mask`` and the pixels up to ``by`` away, diagonally too."""
    if by == 0:
        return mask
    n, h, w = mask.shape
    size = 2 * by + 1
    return spread(mask, tuple(window(s, s, size, 1, by, 1, False, mask.device) for s in (h, w)))


def at_size(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``mask`` at another resolution: true where any pixel under the output pixel is."""
    return resize_mask(mask, size)


def in_blocks(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """``mask`` widened to whole blocks, which begin at the map's first pixel."""
    (n, h, w), (bh, bw) = mask.shape, block
    rows, columns = -(-h // bh), -(-w // bw)
    filled = F.pad(mask, (0, columns * bw - w, 0, rows * bh - h)).view(n, rows, bh, columns, bw)
    filled = filled.any(4).any(2)[:, :, None, :, None].expand(n, rows, bh, columns, bw)
    return filled.reshape(n, rows * bh, columns * bw)[:, :h, :w]
