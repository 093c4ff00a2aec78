"""What changes between two calls: each image differs from the one before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import EVERYTHING, MOVING, NOTHING

STEP = 16  # pixels that the moving square goes in a call


class Edits:
    """Images ``[1, C, H, W]``, each an edit of the last.

    "square": new content in a square at a new place; what was painted before stays. "moving square": one that goes to the
    right over a still image; its old and its new place change. "nothing": a copy. "everything": another image.

    Attributes:
        share: of the pixels, that an edit changes.
    """

    def __init__(self, image: Tensor, edit: str, share: float, generator: torch.Generator):
        self.image, self.edit, self.generator = image, edit, generator
        h, w = image.shape[2:]
        area = share * h * w
        if edit == MOVING:  # side * (side + STEP) pixels
            self.side = round(math.sqrt(area + STEP**2 / 4) - STEP / 2)
            self.share = self.side * (self.side + STEP) / (h * w)
            self.still, self.content = image, self._noise(self.side, self.side)
            self.left, self.direction = 0, 1
        else:
            self.side = min(h, max(1, round(math.sqrt(area))))
            self.share = {NOTHING: 0.0, EVERYTHING: 1.0}.get(edit, self.side**2 / (h * w))

    def next(self) -> Tensor:
        """The next image, in memory of its own."""
        h, w = self.image.shape[2:]
        if self.edit == EVERYTHING:
            self.image = self._noise(h, w).contiguous(memory_format=torch.channels_last)
            return self.image
        if self.edit == NOTHING:
            return self.image.clone()
        if self.edit == MOVING:
            return self._moved(h, w)
        self.image = self.image.clone()
        top, left = self._corner = [self._place(size) for size in (h, w)]
        self.image[:, :, top : top + self.side, left : left + self.side] = self._noise(self.side, self.side)
        return self.image

    def mask(self) -> Tensor:
        """bool ``[1, H, W]``: the last square that was painted."""
        mask = torch.zeros(1, *self.image.shape[2:], dtype=torch.bool)
        top, left = self._corner
        mask[:, top : top + self.side, left : left + self.side] = True
        return mask

    def _moved(self, h: int, w: int) -> Tensor:
        if not 0 <= self.left + self.direction * STEP <= w - self.side:
            self.direction = -self.direction
        self.left += self.direction * STEP
        top = (h - self.side) // 2
        self.image = self.still.clone()
        self.image[:, :, top : top + self.side, self.left : self.left + self.side] = self.content
        return self.image

    def _place(self, size: int) -> int:
        return int(torch.randint(size - self.side + 1, (1,), generator=self.generator))

    def _noise(self, h: int, w: int) -> Tensor:
        return torch.randn(*self.image.shape[:2], h, w, generator=self.generator)
