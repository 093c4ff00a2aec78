"""Images of different sizes as one batch and its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import is_int


def ragged(images: Sequence[Tensor], size_divisor: int = 1) -> tuple[Tensor, Tensor]:
    """Pads images of different sizes into a batch, and makes its mask. A converted model computes each image as if alone::

        x, mask = dynops.ragged(images)
        with dynops.use_mask(mask, ragged=True):
            out = model(x)

    Args:
        images: tensors ``[C, H, W]`` of the same channels, dtype and device; at least one.
        size_divisor: the batch's height and width are multiples of it, as detection models pad them (32).

    Returns:
        x: ``[N, C, height, width]`` in channels_last, each image in the top left corner and zero beyond it.
        mask: bool ``[N, height, width]``, true on each image.

    Raises:
        TypeError: ``images`` holds something that is no tensor. ValueError: no images, another rank, images that
            differ in channels, dtype or device, or a divisor below 1.
    """
    if isinstance(images, Tensor):
        images = list(images)
    if not is_int(size_divisor, 1):
        raise ValueError(f"size_divisor: expected an int >= 1, got {size_divisor!r}")
    images = list(images)
    if not images:
        raise ValueError("images: expected at least one, got none")
    for i, image in enumerate(images):
        _check(image, images[0], i)
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    height, width = (-(-size // size_divisor) * size_divisor for size in (height, width))
    first = images[0]
    x = first.new_zeros(len(images), first.shape[0], height, width).to(memory_format=torch.channels_last)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=first.device)
    for n, image in enumerate(images):
        _, h, w = image.shape
        x[n, :, :h, :w] = image
        mask[n, :h, :w] = True
    return x, mask


def _check(image, first: Tensor, i: int) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"images[{i}]: expected a tensor [C, H, W], got {type(image).__name__}")
    if image.dim() != 3:
        raise ValueError(f"images[{i}]: expected [C, H, W], got shape {tuple(image.shape)}")
    for what, own, expected in (
        ("channels", image.shape[0], first.shape[0]),
        ("dtype", image.dtype, first.dtype),
        ("device", image.device, first.device),
    ):
        if own != expected:
            raise ValueError(f"images[{i}]: expected the {what} of the first image, {expected}, got {own}")
