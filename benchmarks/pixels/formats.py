"""Thin and wide layers in both memory formats, each against the dense layer in its own format, at every density.

"Never slower than dense by surprise" is about these rows: an empty mask, a full one, layers with so few products that
only the bytes count, and NCHW maps, which ours has to bring into rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import PixelPlan, ops

from ..harness import masks
from ..harness.compare import compare
from ..harness.contenders import FORMATS, bound
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.text import aligned
from .layers import Case, random_tensors

DENSITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
# Written between two calls of a cold row: past every second-level cache, so that what the layer reads lies in the
# third level or in memory, as after the layers before it in a model.
_FLUSH_BYTES = 32 << 20


def all_cases(quick: bool = False) -> list[Case]:
    cases = [
        Case("thin", 1, 256, 1, 56, 56, 1),
        Case("thin", 1, 1, 64, 56, 56, 3),
        Case("thin", 1, 2, 16, 112, 112, 3),
        Case("thin", 1, 3, 64, 224, 224, 7, 2),
        Case("depthwise", 1, 32, 32, 112, 112, 3, groups=32),
        Case("depthwise", 1, 128, 128, 56, 56, 3, groups=128),
        Case("depthwise", 1, 512, 512, 14, 14, 3, groups=512),
    ]
    if quick:
        return cases
    cases += [Case("1x1", 1, 64, 256, size, size, 1) for size in (56, 14)]
    cases += [Case("1x1", 1, 256, 64, size, size, 1) for size in (56, 14)]
    cases += [Case("3x3", 1, 64, 64, size, size, 3) for size in (56, 14)]
    return cases + [Case("3x3", 1, 256, 256, size, size, 3) for size in (28, 14)]


def measure(case: Case, setting: Setting) -> list[Row]:
    """A row for each format and density, warm and cold; from the mask to the output, the plan included."""
    return [row for name in FORMATS for row in _in_format(case, setting, name)]


def _in_format(case: Case, setting: Setting, name: str) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(case, setting, generator)[:2]
    x, weight = (t.contiguous(memory_format=FORMATS[name]) for t in tensors)
    dense = {f"{name} eager": bound(F.conv2d, x, weight, None, **case.arguments)}
    ours, computed = {}, {}
    for density in DENSITIES:
        mask = masks.random(case.n, *case.out_size, density, generator) & (density > 0)
        computed[density] = case.dense_macs / 1e9 * int(mask.count_nonzero()) / mask.numel()
        ours[density] = bound(_ours, case, x, weight, mask)
    spoiled = torch.empty(_FLUSH_BYTES // 4)
    rows = []
    with torch.inference_mode():
        for variant, flush in (("plain", None), ("cold", bound(spoiled.fill_, 1.0))):
            times = compare(dense, ours, setting, flush=flush)
            rows += [
                times.row(
                    density,
                    suite="formats",
                    group=name,
                    case=case.name,
                    mask="random",
                    density=density,
                    variant=variant,
                    gmacs=case.dense_macs / 1e9,
                    computed_gmacs=computed[density],
                )
                for density in DENSITIES
            ]
    return rows


def _ours(case: Case, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask), **case.arguments)


def table(rows: list[Row]) -> str:
    """Speed-up over the dense layer in the same format: a line for each layer and format, a column a density."""
    header = ["layer", "format", "caches", "dense ms", *[f"{d:.0%}" for d in DENSITIES]]
    lines: dict = {}
    for row in rows:
        key = row.case, row.group, "cold" if row.variant == "cold" else "warm"
        lines.setdefault(key, [f"{row.dense_ms:.3f}"]).append(f"{row.speedup:.2f}x")
    return aligned(header, [[*key, *cells] for key, cells in lines.items()])
