"""The densities from which on the dense layer is the faster way, by which ``ops.dense_fallback`` decides."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops import BlockPlan, PixelPlan, ops
from dynops.kernels import configs
from dynops.nn import SparseBlocks
from dynops.ops import dense_fallback
from dynops.ops.epilogue import NOTHING

from ...harness import masks
from ...harness.rows import break_even
from ...pixels.layers import Case
from .problems import RESNET
from .tiles import first_line

PATHS = ("pixels", "rows", "tiles")
DENSITIES = (0.4, 0.6, 0.8, 1.0)
ROUNDS = 11
BLOCK = 8  # pixels; a 7x7 map is cut at its edge


class Layer(NamedTuple):
    """A convolution in a dtype; depthwise where it has as many groups as channels."""

    case: Case
    dtype: torch.dtype

    @property
    def form(self) -> str:
        return "conv" if self.case.groups == 1 else "depthwise"

    @property
    def name(self) -> str:
        return f"{self.form} {self.case.name} {str(self.dtype).removeprefix('torch.')}"


DEPTHWISE = ((144, 56), (192, 28), (576, 14), (960, 7))  # of MobileNetV2


def layers() -> list[Layer]:
    """The most important first."""
    found = []
    for dtype, batches in ((torch.bfloat16, (64, 1, 8, 256)), (torch.float32, (64, 1))):
        for n in batches:
            found += [_layer(n, c, c, h, 3, dtype) for c, h in RESNET]
            found += [_layer(n, *pair, h, 1, dtype) for c, h in RESNET for pair in ((4 * c, c), (c, 4 * c))]
    return found + [_layer(n, c, c, h, 3, torch.bfloat16, c) for n in (64, 1) for c, h in DEPTHWISE]


def small_layers() -> list[Layer]:
    """A small set for a dry run in Triton's interpreter."""
    return [_layer(1, 16, 16, 8, 1, torch.float16), _layer(1, 16, 16, 8, 3, torch.float16, 16)]


def _layer(n: int, c: int, o: int, size: int, kernel: int, dtype: torch.dtype, groups: int = 1) -> Layer:
    return Layer(Case("", n, c, o, size, size, kernel, groups=groups), dtype)


def measure(layer: Layer, device: torch.device, clock) -> dict:
    """An entry of a config's break-even table, and the times that it comes from."""
    case, options = layer.case, {"device": device, "dtype": layer.dtype}
    conv = nn.Conv2d(case.c, case.o, case.kernel, bias=False, **case.arguments, **options)
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(case.n, case.c, case.h, case.w, **options).contiguous(memory_format=torch.channels_last)
    calls, computed = {}, {}
    for density in DENSITIES:
        for path, (call, share) in _paths(conv, x, density).items():
            calls[path, density], computed[path, density] = call, share
    with torch.inference_mode():
        times = clock.medians(calls, ROUNDS)
    masked = statistics.median(times["dense", density] for density in DENSITIES[:-1])
    full = times["dense", DENSITIES[-1]]  # which has no mask
    points = {path: [(computed[path, d], times[path, d]) for d in DENSITIES] for path in PATHS}
    shares = {path: _break_even(points[path], masked) for path in PATHS}
    shares["full"] = _break_even(points["pixels"], full)
    sizes = {"taps": case.kernel**2, "inputs": case.c, "outputs": case.o, "pixels": case.n * case.h * case.w}
    entry = {"kind": configs.precision(layer.dtype), "form": layer.form, **sizes, "shares": shares}
    return {
        **entry,
        "layer": layer.name,
        "dense_ms": full,
        "masked_dense_ms": masked,
        "points": points,
    }


def _break_even(points: list[tuple[float, float]], dense: float) -> float:
    """The density at which a path, ``(density, milliseconds)``, takes as long as the dense layer."""
    return break_even(((density, dense / ms) for density, ms in points), origin=True)


def _paths(conv: nn.Conv2d, x: Tensor, density: float) -> dict[str, tuple[Callable, float]]:
    """{path: (call, the share of the output's pixels that it computes)}, the plans built before.

    "dense" is what ``dense_fallback`` runs in place of the others: the dense layer, and a mask.
    """
    n, _, size, _ = x.shape
    generator = torch.Generator().manual_seed(0)
    plan = PixelPlan.from_mask(masks.random(n, size, size, density, generator).to(x.device))
    grid = -(-size // BLOCK)
    active = masks.random(1, n, grid * grid, density, generator).view(n, grid, grid)
    blocks = BlockPlan.from_blocks(active.to(x.device), (n, size, size), BLOCK)
    covered = blocks.num_blocks * BLOCK**2 / (n * size**2)  # tiles are computed whole, also over the edge

    def pixels():
        return ops.sparse_conv2d(
            x, conv.weight, None, plan, padding=conv.padding, groups=conv.groups, backend="triton"
        )

    def dense():
        out = F.conv2d(x, conv.weight, None, padding=conv.padding, groups=conv.groups)
        return dense_fallback.finish_dense(out, plan, NOTHING, None)

    found = {"pixels": (pixels, plan.density), "dense": (dense, 1.0)}
    for path, share in (("rows", min(covered, 1.0)), ("tiles", covered)):
        found[path] = (partial(SparseBlocks(conv, BLOCK, path), x, blocks), share)
    return found


def measure_all(found: list[Layer], device: torch.device, clock, seconds: float, log) -> Iterator[dict]:
    """The entries of the break-even table, each as soon as it is there, as far as the time reaches."""
    end = clock.now() + seconds
    for i, layer in enumerate(found):
        if clock.now() > end:
            log(
                f"not reached: the break-even of {len(found) - i} of {len(found)} layers, {layer.name} the first"
            )
            break
        try:
            entry = measure(layer, device, clock)
        except RuntimeError as error:  # out of memory, or no kernel for the dense layer
            log(f"{layer.name}: not measured, {first_line(error)}")
            continue
        log(
            f"{layer.name}: break-even {', '.join(f'{path} {share:.2f}' for path, share in entry['shares'].items())}"
        )
        yield entry
