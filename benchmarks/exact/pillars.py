"""PointPillars' backbone and head on pillars that are packed rows: from coordinates to boxes, no dense map of the input."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

import dynops

from ..harness.compare import compare
from ..harness.contenders import FORMATS, bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..models.macs import CountedPolicy

SIZE, CHANNELS, DENSITY = 400, 64, 0.05


class Backbone(nn.Module):
    """OpenPCDet's BaseBEVBackbone and a head: three stages of 3x3 convolutions, each enlarged to the first one's size.

    Paper: Lang et al., PointPillars (CVPR 2019).
    """

    def __init__(self, depths=(3, 5, 5), widths=(64, 128, 256), up=128, outputs=(18, 42, 12)):
        super().__init__()
        self.blocks, self.ups, channels = nn.ModuleList(), nn.ModuleList(), CHANNELS
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            layers = [nn.ZeroPad2d(1), *_normed(nn.Conv2d(channels, width, 3, 2, bias=False))]
            for _ in range(depth):
                layers += _normed(nn.Conv2d(width, width, 3, padding=1, bias=False))
            self.blocks.append(nn.Sequential(*layers))
            enlarged = nn.ConvTranspose2d(width, up, 2**i, 2**i, bias=False)
            self.ups.append(nn.Sequential(*_normed(enlarged)))
            channels = width
        self.heads = nn.ModuleList(nn.Conv2d(len(widths) * up, n, 1) for n in outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for block, up in zip(self.blocks, self.ups, strict=True):
            x = block(x)
            maps.append(up(x))
        x = torch.cat(maps, 1)
        return tuple(head(x) for head in self.heads)


def _normed(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=0.01), nn.ReLU()]


def pillars(size: int, density: float) -> Tensor:
    """int64 ``[P, 3]``, (n, y, x) in no order: pixels in clumps, as LiDAR sees objects and walls."""
    generator = torch.Generator().manual_seed(0)
    clumps = torch.rand(60, 2, generator=generator) * size
    spread = (torch.rand(60, 1, generator=generator) + 0.5) * size / 100
    found = torch.empty(0, 2, dtype=torch.int64)
    while len(found) < density * size * size:
        which = torch.randint(60, (size,), generator=generator)
        points = clumps[which] + spread[which] * torch.randn(size, 2, generator=generator)
        found = torch.cat([found, points.round().long().clamp(0, size - 1)]).unique(dim=0)
    found = found[torch.randperm(len(found), generator=generator)[: round(density * size * size)]]
    return torch.cat([torch.zeros(len(found), 1, dtype=torch.int64), found], 1)


def all_cases(quick: bool = False) -> list[int]:
    return [SIZE]


def measure(size: int, setting: Setting) -> list[Row]:
    """The dense backbone gets its input as a map that is there; ours gets coordinates and features."""
    setting = replace(setting, compiled=False)
    torch.manual_seed(0)
    where = pillars(size, DENSITY).to(setting.device)
    features = torch.randn(len(where), CHANNELS).to(**setting.options)
    x = torch.zeros(1, size, size, CHANNELS).to(**setting.options)
    x[tuple(where.T)] = features
    x = x.permute(0, 3, 1, 2)
    model = calibrated(Backbone().to(**setting.options), x)
    mask = dynops.PixelPlan.from_coordinates(where, (1, size, size)).mask()
    with torch.inference_mode():
        with CountedPolicy(mask) as counted:
            model(x)
        dense = {
            name: bound(
                copy.deepcopy(model).to(memory_format=memory_format),
                x.contiguous(memory_format=memory_format),
            )
            for name, memory_format in FORMATS.items()
        }
        dynops.convert_(model)
        times = compare(dense, {"ours": bound(run, model, where, features, size)}, setting)
    return [
        times.row(
            "ours",
            suite="exact",
            group="sparse inputs",
            case=f"PointPillars, {size}x{size}",
            mask="pillars",
            density=DENSITY,
            gmacs=counted.dense / 1e9,
            computed_gmacs=counted.computed / 1e9,
        )
    ]


def run(model: nn.Module, where: Tensor, features: Tensor, size: int) -> tuple[Tensor, ...]:
    """The outputs of a converted backbone for pillars at ``where`` ``[P, 3]``, each one once."""
    plan = dynops.PixelPlan.from_coordinates(where, (1, size, size))
    order = torch.empty_like(where[:, 0]).scatter_(
        0, plan.rows_of(where), torch.arange(len(where), device=where.device)
    )
    rows = features[order]
    with dynops.use_mask(plan):
        return model(dynops.packed(rows, plan))
