"""gather_samples and scatter_samples against torch's own ways and a plain copy, in GB/s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynops import SamplePlan, ops

from .layers import Setting
from .sample_contests import bound, formats, random_keep
from .sample_rows import CopyRow
from .timing import interleaved, progress

SHAPES = ((16, 64, 56, 56), (32, 128, 28, 28), (32, 16, 32, 32), (4096, 512))


def run(setting: Setting, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[CopyRow]:
    rows = []
    for shape in progress(list(shapes), "copies", "shape"):
        rows += measure_copies(shape, setting)
    return rows


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


def measure_copies(shape: tuple[int, ...], setting: Setting) -> list[CopyRow]:
    """The faster memory format counts, for torch and for ours."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
    plan = SamplePlan.from_mask(random_keep(shape[0], 0.5, generator).to(setting.device))
    calls, moved = {}, {}
    for name, own in formats(x).items():
        for op, (ours, ways, moved_bytes) in problems(own, plan).items():
            calls[op, "ours", name] = ours
            calls |= {(op, way, name): call for way, call in ways.items()}
            moved[op] = moved_bytes
    for op, moved_bytes in moved.items():
        source = x.new_empty(int(moved_bytes / 2) // x.element_size())
        calls[op, "copy", ""] = source.clone
    with torch.inference_mode():
        times = interleaved(calls, setting.device, setting.budget.scaled(0.5))
    rows = []
    dtype = str(setting.dtype).removeprefix("torch.")
    for op in moved:
        own = {key[1:]: ms for key, ms in times.items() if key[0] == op}
        copied, ours = own.pop(("copy", "")), min(ms for (way, _), ms in own.items() if way == "ours")
        ways = {f"{way}, {name}": ms for (way, name), ms in own.items() if way != "ours"}
        ways = ways if x.dim() == 4 else {name.split(",")[0]: ms for name, ms in ways.items()}
        case = ",".join(map(str, shape))
        rows.append(CopyRow(op, case, dtype, moved[op] / 1e6, copied, ways, ours))
    return rows
