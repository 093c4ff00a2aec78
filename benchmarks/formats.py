"""Thin and wide layers in both memory formats, each against the dense layer in its own format, at every density.

"Never slower than dense by surprise" is about these rows: an empty mask, a full one, layers with so few products that
only the bytes count, and NCHW maps, which ours has to bring into rows.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import PixelPlan, ops

from . import masks
from .layers import Case, Setting
from .report import Row
from .text import aligned
from .timing import _keep_memory, _no_gc, progress

DENSITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
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


def run(cases: list[Case], setting: Setting) -> list[Row]:
    rows = []
    for case in progress(cases, "formats", "layer"):
        for format_name in FORMATS:
            rows += measure(case, setting, format_name)
    return rows


def measure(case: Case, setting: Setting, format_name: str) -> list[Row]:
    """A row for each density, warm and cold; from the mask to the output, the plan included."""
    generator = torch.Generator().manual_seed(0)
    layout = FORMATS[format_name]
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
    weight = torch.randn(case.o, case.c // case.groups, case.kernel, case.kernel, generator=generator)
    weight = (weight / (weight[0].numel() ** 0.5)).to(setting.dtype).contiguous(memory_format=layout)
    x = x.to(setting.dtype).contiguous(memory_format=layout)
    arguments = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
    calls = {"dense": lambda: F.conv2d(x, weight, None, **arguments)}
    computed = {}
    for density in DENSITIES:
        mask = masks.MASKS["random"](case.n, *case.out_size, density, generator) & (density > 0)
        computed[density] = int(mask.count_nonzero()) / mask.numel()
        calls[density] = _ours(x, weight, mask, arguments)
    rows = []
    with torch.inference_mode():
        for variant, flush in (("plain", None), ("cold", torch.empty(_FLUSH_BYTES // 4))):
            times = _times(calls, setting, flush)
            rows += [_row(case, setting, format_name, d, computed[d], variant, times) for d in DENSITIES]
    return rows


def _ours(x: Tensor, weight: Tensor, mask: Tensor, arguments: dict):
    return lambda: ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask), **arguments)


def _times(calls: dict, setting: Setting, flush: Tensor | None) -> dict:
    """The least milliseconds of each call that half of the rounds reached, all in turns."""
    _keep_memory()
    times: dict = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    with _no_gc():
        end = time.perf_counter() + setting.budget.seconds
        for done in range(setting.budget.max_rounds):
            if done >= setting.budget.min_rounds and time.perf_counter() > end:
                break
            for name, call in calls.items() if done % 2 == 0 else reversed(calls.items()):
                if flush is None:
                    call()
                else:
                    flush.fill_(done)
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _row(case, setting, format_name, density, computed, variant, times) -> Row:
    return Row(
        suite="formats",
        group=format_name,
        case=case.name,
        mask="random",
        density=density,
        variant=variant,
        mode=setting.mode,
        dtype=str(setting.dtype).removeprefix("torch."),
        gmacs=case.dense_macs / 1e9,
        computed_gmacs=case.dense_macs * computed / 1e9,
        dense_ms=times["dense"],
        dense_name=f"{format_name} eager",
        ours_ms=times[density],
    )


def table(rows: list[Row]) -> str:
    """Speed-up over the dense layer in the same format: a line for each layer and format, a column a density."""
    header = ["layer", "format", "caches", "dense ms", *[f"{d:.0%}" for d in DENSITIES]]
    lines: dict = {}
    for row in rows:
        key = row.case, row.group, "cold" if row.variant == "cold" else "warm"
        lines.setdefault(key, [f"{row.dense_ms:.3f}"]).append(f"{row.speedup:.2f}x")
    return aligned(header, [[*key, *cells] for key, cells in lines.items()])
