"""Masks to measure on: random (the worst case), one square (the best), and a photograph's gradients."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random(n: int, h: int, w: int, density: float, generator: torch.Generator) -> Tensor:
    """``[N, H, W]`` bool with exactly ``round(density * H * W)`` pixels, at least one, in each sample."""
    count = active(h, w, density)
    order = torch.rand(n, h * w, generator=generator).argsort(1)
    mask = torch.zeros(n, h * w, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True).view(n, h, w)


CELL = 16


def random_blocks(n: int, h: int, w: int, density: float, generator: torch.Generator) -> Tensor:
    """Random squares of 16 pixels, on a grid, of which the last ones may be cut off by the edge."""
    cells = random(n, -(-h // CELL), -(-w // CELL), density, generator)
    return cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)[:, :h, :w].contiguous()


def square(n: int, h: int, w: int, density: float, generator: torch.Generator) -> Tensor:
    """One square of about ``density * H * W`` pixels at a random place in each sample."""
    area = density * h * w
    wide = min(w, max(1, round(math.sqrt(area))))
    high = min(h, max(1, round(area / wide)))
    wide = min(w, max(1, round(area / high)))  # wider again where the height was cut off
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    for sample in mask:
        top = int(torch.randint(h - high + 1, (1,), generator=generator))
        left = int(torch.randint(w - wide + 1, (1,), generator=generator))
        sample[top : top + high, left : left + wide] = True
    return mask


def top_left(n: int, h: int, w: int, density: float, generator: torch.Generator) -> Tensor:
    """SBNet's mask: the top-left ceil(sqrt(d) * H) x ceil(sqrt(d) * W) rectangle."""
    side = math.sqrt(density)
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    mask[:, : math.ceil(side * h), : math.ceil(side * w)] = True
    return mask


def photo(n: int, h: int, w: int, density: float, generator: torch.Generator) -> Tensor:
    """The pixels of highest gradient in the photograph at ``[H, W]``; sample i sees it shifted by i/n."""
    energy = gradients(photograph(), (h, w))
    shifted = torch.cat([energy.roll(i * w // max(n, 1), 2) for i in range(n)]) if n else energy[:0]
    return densest(shifted, density)


MASKS = {
    "random": random,
    "random blocks": random_blocks,
    "square": square,
    "photo": photo,
    "top-left": top_left,
}


def active(h: int, w: int, density: float) -> int:
    """The pixels of a sample that are active at a density, at least one."""
    return min(h * w, max(1, round(density * h * w)))


def has_photograph() -> bool:
    """False where matplotlib or Pillow is not installed."""
    try:
        photograph()
    except ImportError:
        return False
    return True


@functools.cache
def photograph() -> Tensor:
    """``[1, 3, 600, 512]`` float32 in 0..1: the portrait of Grace Hopper that ships with matplotlib.

    Raises:
        ImportError: matplotlib (and with it Pillow) is not installed.
    """
    import numpy
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file:
        pixels = numpy.array(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255)


def gradients(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean gradient magnitude of the luminance of ``image`` [N, 3, H, W] in each cell: ``[N, *size]``."""
    gray = sum(w * image[:, c] for c, w in enumerate(_LUMINANCE))  # [N, H, W]
    dx = F.pad(gray[:, :, 1:] - gray[:, :, :-1], (0, 1))
    dy = F.pad(gray[:, 1:] - gray[:, :-1], (0, 0, 0, 1))
    energy = torch.hypot(dx, dy)
    return energy if energy.shape[1:] == size else F.adaptive_avg_pool2d(energy, size)


def densest(energy: Tensor, density: float) -> Tensor:
    """Bool ``[N, H, W]``: the ``round(density * H * W)`` cells of highest energy in each sample."""
    n, h, w = energy.shape
    flat = energy.reshape(n, h * w)
    top = flat.topk(active(h, w, density), dim=1, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True).view(n, h, w)
