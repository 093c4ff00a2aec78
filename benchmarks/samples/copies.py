"""gather_samples and scatter_samples against torch's own ways and a plain copy, in GB/s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynops import SamplePlan, ops

from ..harness.contenders import bound, formats_of
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.timing import interleaved
from .contests import random_keep

SHAPES = ((16, 64, 56, 56), (32, 128, 28, 28), (32, 16, 32, 32), (4096, 512))


def problems(x: Tensor, plan: SamplePlan) -> dict[str, tuple[Callable, dict[str, Callable], float]]:
    """``{op: (ours, {a way of torch: call}, bytes read and written)}`` for a batch in one memory format."""
    index, size = plan.index.long(), x[0].numel() * x.element_size()
    rows, kept, batch = ops.gather_samples(x, plan), plan.num_rows, plan.batch
    mask = plan.mask()
    gathers = {
        "index_select": bound(torch.index_select, x, 0, index),
        "x[index]": lambda: x[index],
        "x[mask]": lambda: x[mask],
    }
    copies = {"index_copy": bound(torch.index_copy, x, 0, index, rows)}
    adds = {"index_add": bound(torch.index_add, x, 0, index, rows)}
    return {
        "gather": (bound(ops.gather_samples, x, plan), gathers, 2.0 * kept * size),
        "scatter": (bound(ops.scatter_samples, rows, plan, x), copies, 2.0 * batch * size),
        "scatter, add": (
            bound(ops.scatter_samples, rows, plan, x, add=True),
            adds,
            (2.0 * batch + kept) * size,
        ),
    }


def all_cases(quick: bool = False) -> list[tuple[int, ...]]:
    return list(SHAPES[: 1 if quick else None])


def measure(shape: tuple[int, ...], setting: Setting) -> list[Row]:
    """A row for each op; the roofline is a plain copy of as many bytes. The faster memory format counts, for both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(**setting.options)
    plan = SamplePlan.from_mask(random_keep(shape[0], 0.5, generator).to(setting.device))
    calls, moved = {}, {}
    for name, form in formats_of(x).items():
        for op, (ours, ways, moved_bytes) in problems(x.contiguous(memory_format=form), plan).items():
            calls[op, "ours", name] = ours
            calls |= {(op, way, name): call for way, call in ways.items()}
            moved[op] = moved_bytes
    for op, moved_bytes in moved.items():
        source = x.new_empty(int(moved_bytes / 2) // x.element_size())
        calls[op, "copy", ""] = source.clone
    with torch.inference_mode():
        times = interleaved(calls, setting.device, setting.budget.scaled(0.5))
    return [_row(op, shape, setting, moved[op], times) for op in moved]


def _row(op: str, shape: tuple[int, ...], setting: Setting, moved: float, times: dict) -> Row:
    own = {key[1:]: ms for key, ms in times.items() if key[0] == op}
    copied, ours = own.pop(("copy", "")), min(ms for (way, _), ms in own.items() if way == "ours")
    ways = {
        f"{way}, {name}" if len(shape) == 4 else way: ms for (way, name), ms in own.items() if way != "ours"
    }
    best = min(ways, key=ways.get)
    return Row(
        suite="copies",
        group=op,
        case=",".join(map(str, shape)),
        mask="random",
        density=0.5,
        variant="plain",
        mode="forward",
        dtype=setting.dtype_name,
        dense_ms=ways[best],
        dense_name=best,
        dense_all=ways,
        ours_ms=ours,
        megabytes=moved / 1e6,
        roofline_ms=copied,
    )
