"""A video for FCN: the error of the logits against the speed-up, at every threshold.

The photograph pans inside a window of a still frame, by one pixel a frame, and a foreign object moves over it: a disc with
another part of the photograph. In the second video the camera itself pans, by FCN's stride of 8 pixels.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dynops

from ..harness import masks
from ..pixels.model import normalised, photo_input
from .cases import fcn, logits
from .run import shared
from .trial import Trial, psnr, relative_error

FRAMES, SIZE, WINDOW, DISC = 7, 448, 160, 64
WINDOW_VIDEO, CAMERA_VIDEO = "window", "camera"
RELATIVE = (0.01, 0.03, 0.1, 0.2, 0.4)
ABSOLUTE = (0.01, 0.1, 0.3)


class Point(NamedTuple):
    """One stream over a video."""

    video: str
    threshold: float = 0.0
    relative: bool = False
    spread: str | int = "exact"

    @property
    def label(self) -> str:
        """For ``--only``."""
        kind = "relative" if self.relative else "absolute"
        return f"{self.video}, {kind} threshold {self.threshold:g}, spread {self.spread}"


def all_points(quick: bool = False) -> list[Point]:
    swept = [(t, True) for t in RELATIVE] + [(t, False) for t in ABSOLUTE]
    points = [Point(WINDOW_VIDEO, *own) for own in [(0.0, False), *swept]]
    points += [Point(WINDOW_VIDEO, spread=k) for k in (1, 4)]
    points += [Point(CAMERA_VIDEO, t, t > 0) for t in (0.0, 0.1, 0.4)]
    return points[1:4] if quick else points


def frames(video: str, count: int = FRAMES) -> list[Tensor]:
    """Images ``[1, 3, 448, 448]`` in 0..1."""
    photo = photo_input((576, 512))
    made = []
    for i in range(count):
        if video == CAMERA_VIDEO:
            frame = photo[:, :, 8 * i :, :][:, :, :SIZE, :SIZE].clone()
        else:
            frame = photo[:, :, :SIZE, :SIZE].clone()
            top, left = SIZE // 4, SIZE // 4
            view = photo[:, :, 200 + i :, 100 + i :][:, :, :WINDOW, :WINDOW]
            frame[:, :, top : top + WINDOW, left : left + WINDOW] = view
        _put_disc(frame, photo, i / count)
        made.append(frame)
    return made


def _put_disc(frame: Tensor, photo: Tensor, when: float) -> None:
    """The foreign object, on its way around a circle."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, DISC)] * 2, indexing="ij")
    inside = y.square() + x.square() <= 1
    middle, radius = (SIZE - DISC) / 2, SIZE / 8
    top = round(middle + radius * math.sin(2 * math.pi * when))
    left = round(middle + radius * math.cos(2 * math.pi * when))
    spot = frame[:, :, top : top + DISC, left : left + DISC]
    spot.copy_(torch.where(inside, photo[:, :, -DISC:, :DISC].flip(3), spot))


class Sweep:
    """The points of the curve; FCN's norms are calibrated on the photograph."""

    def __init__(self, count: int = FRAMES):
        torch.manual_seed(0)
        self.count, self.videos = count, {}
        image = normalised(photo_input((SIZE, SIZE)))
        model = fcn(torch.cat([image, image.flip(3)])).requires_grad_(False)
        self.model = model.to(memory_format=torch.channels_last)
        self.ours = shared(self.model)
        dynops.incremental_(self.ours)

    def measure(self, point: Point) -> Trial:
        """Every frame is given to the stream and, in turn, to the dense model in channels_last."""
        if point.video not in self.videos:
            self.videos[point.video] = [
                normalised(frame).contiguous(memory_format=torch.channels_last)
                for frame in frames(point.video, self.count)
            ]
        images = self.videos[point.video]
        shift = (0, -8) if point.video == CAMERA_VIDEO else (0, 0)
        stream = dynops.Stream(spread=point.spread, threshold=point.threshold, relative=point.relative)
        seen = self._run(stream, images, shift)
        middle = {
            name: statistics.median(getattr(s, name) for s in seen)
            for name in ("dense_ms", "ours_ms", "theory")
        }
        return Trial(
            "FCN (ResNet-50), video",
            point.video,
            statistics.mean(_changed(a, b, shift) for a, b in itertools.pairwise(images)),
            spread=str(point.spread),
            threshold=point.threshold,
            relative=point.relative,
            dense_name="channels_last eager",
            error=statistics.mean(s.error for s in seen),
            last_error=seen[-1].error,
            psnr=statistics.mean(s.psnr for s in seen),
            agreement=statistics.mean(s.agreement for s in seen),
            kept_mb=stream.bytes / 2**20,
            **middle,
        )

    @torch.inference_mode()
    def _run(self, stream: dynops.Stream, images: list[Tensor], shift: tuple[int, int]) -> list[_Seen]:
        """Every frame but the first, which is dense."""
        seen = []
        for i, image in enumerate(images):
            dense_ms, expected = _timed(self.model, image)
            with stream.aligned(*shift) if i else stream:
                ours_ms, got = _timed(self.ours, image)
            same = float((got.argmax(1) == expected.argmax(1)).float().mean())
            errors = relative_error(got, expected), psnr(got, expected), same
            seen.append(_Seen(dense_ms, ours_ms, stream.report().theory, *errors))
        return seen[1:]


class _Seen(NamedTuple):
    """A frame."""

    dense_ms: float
    ours_ms: float
    theory: float
    error: float
    psnr: float
    agreement: float


def _timed(model: nn.Module, image: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = logits(model, image)
    return (time.perf_counter() - start) * 1e3, out


def _changed(a: Tensor, b: Tensor, shift: tuple[int, int]) -> float:
    """The share of pixels that differ once the first image has moved."""
    moved = torch.roll(a, shift[::-1], (2, 3))
    return float((moved != b).any(1).float().mean())


def needed() -> dict[str, bool]:
    """The libraries, and whether they are there; the photograph is matplotlib's."""
    return {"torchvision": find_spec("torchvision") is not None, "matplotlib": masks.has_photograph()}
