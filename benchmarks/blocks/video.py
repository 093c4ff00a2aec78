"""A video that recomputes changed blocks only: an object cut out of the photograph moves over the rest of it."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics

import torch
from torch import Tensor, nn

import dynops
from dynops.nn import SparseBlocks
from dynops.testing import assert_within_budget

from ..harness import masks
from ..harness.compare import Comparison, compare
from ..harness.contenders import bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import chain_macs, chain_work
from ..harness.timing import fastest
from ..pixels.model import network_versions, normalised, photo_input

SIZE, FRAMES, BLOCK = (256, 256), 24, 16
NAME = "encoder-decoder"


def frames(size: tuple[int, int], count: int) -> list[Tensor]:
    """The video, ``count`` images ``[1, 3, H, W]`` in 0..1.

    An ellipse around the face, a fifth of the photograph high and wide, moves once around a circle over the
    photograph, which is still.
    """
    still = photo_input(size)
    h, w = size
    high, wide = h // 5, w // 5
    top, left = round(0.25 * h), round(0.4 * w)
    cut = still[..., top : top + high, left : left + wide]
    y, x = torch.meshgrid(torch.linspace(-1, 1, high), torch.linspace(-1, 1, wide), indexing="ij")
    inside = y.square() + x.square() <= 1
    video = []
    for step in range(count):
        angle = 2 * math.pi * step / count
        top = round((h - high) * (0.5 + 0.4 * math.sin(angle)))
        left = round((w - wide) * (0.5 + 0.4 * math.cos(angle)))
        frame = still.clone()
        spot = frame[..., top : top + high, left : left + wide]
        spot.copy_(torch.where(inside, cut, spot))
        video.append(frame)
    return video


def segmentation_net(classes: int = 8) -> nn.Sequential:
    """An encoder of stride 2 and a decoder with a transposed convolution: scores ``[N, classes, H, W]``."""

    def conv(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *conv(3, 32),
        *conv(32, 64, stride=2),
        *conv(64, 64),
        nn.ConvTranspose2d(64, 32, 2, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, classes, 3, padding=1),
    )


class Stream:
    """A network over a video: each frame computes the blocks that it changes, on the last frame's output."""

    def __init__(self, net: nn.Module, block: int):
        self.layer = SparseBlocks(net, block)
        self.block = block

    def first(self, frame: Tensor) -> Tensor:
        return self.layer(frame)

    def next(self, previous: Tensor, frame: Tensor, output: Tensor) -> Tensor:
        """The output of ``frame``, given the frame before it and that one's output."""
        return self.layer(frame, self.plan(previous, frame), base=output)

    def plan(self, previous: Tensor, frame: Tensor) -> dynops.BlockPlan:
        return dynops.changed_blocks(previous, frame, self.block, layer=self.layer)


def all_cases(quick: bool = False) -> list[int]:
    """The number of frames; none without the photograph."""
    if not masks.has_photograph():
        return []
    return [6 if quick else FRAMES]


def measure(count: int, setting: Setting, size: tuple[int, int] = SIZE, block: int = BLOCK) -> list[Row]:
    """A row for each frame after the first, and the medians over them.

    Raises:
        AssertionError: a frame's output is not the dense network's within the error budget.
    """
    torch.manual_seed(0)
    video = [normalised(frame) for frame in frames(size, count)]
    net = calibrated(segmentation_net(), torch.cat(video[:2])).to(**setting.options)
    video = [frame.to(**setting.options, memory_format=torch.channels_last) for frame in video]
    stream = Stream(copy.deepcopy(net).to(memory_format=torch.channels_last), block)
    rows = []
    with torch.inference_mode():
        outputs = checked_outputs(stream, net, video)
        _, dense = fastest(network_versions(net, video[0], setting), setting.device)
        briefly = dataclasses.replace(setting, budget=setting.budget.scaled(0.1))
        for i in range(1, count):
            ours = {"ours": bound(stream.next, video[i - 1], video[i], outputs[i - 1])}
            times = compare(dense, ours, briefly)
            rows.append(_row(net, size, i, stream.plan(video[i - 1], video[i]), times))
    return [median(rows), *rows]


def checked_outputs(stream: Stream, net: nn.Module, video: list[Tensor]) -> list[Tensor]:
    """The stream's output of every frame, each compared with the dense network's in the error budget."""
    exact = copy.deepcopy(net).double()
    outputs: list[Tensor] = []
    for i, frame in enumerate(video):
        outputs.append(stream.next(video[i - 1], frame, outputs[-1]) if i else stream.first(frame))
        assert_within_budget(outputs[-1], exact(frame.double()), net(frame), f"frame {i}")
    return outputs


def _row(net: nn.Module, size: tuple[int, int], i: int, plan: dynops.BlockPlan, times: Comparison) -> Row:
    work = chain_work(net, (1, *size), plan.pixels())
    return times.row(
        "ours",
        megabytes=work.values * times.setting.dtype.itemsize / 1e6,
        suite="video",
        group="video",
        case=f"{NAME}, {size[0]}x{size[1]}, frame {i:02}",
        mask="moving object",
        density=plan.density,
        gmacs=chain_macs(net, (1, *size)) / 1e9,
        computed_gmacs=work.macs / 1e9,
        block=plan.block_size[0],
    )


def median(rows: list[Row]) -> Row:
    """The frames in one row, each column its own median."""
    first = rows[0]
    values = {
        name: statistics.median(getattr(row, name) for row in rows)
        for name in ("density", "computed_gmacs", "dense_ms", "ours_ms", "megabytes", "roofline_ms")
    }
    names = [row.dense_name for row in rows]
    return dataclasses.replace(
        first,
        **values,
        case=first.case.rsplit(",", 1)[0],
        variant=f"medians of {len(rows)} frames",
        dense_name=max(set(names), key=names.count),
    )
