"""The errors of the CPU kernels' sums: ``python -m benchmarks.errors [--out FILE]``.

For every instruction set, kind of layer, dtype and number of products in a sum: the error of our kernel against float64 and
that of the dense layer, in the more exact of its two memory formats; Euclidean norms, relative to the exact result.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dynops
from dynops import ops
from dynops.testing import random_mask, random_tensor

from .harness.text import aligned

DEPTHS = (256, 576, 1152, 2304, 4608, 9216, 18432)  # products in a sum
FORMATS = (torch.contiguous_format, torch.channels_last)
FIELDS = ("isa", "kind", "dtype", "sum", "products", "ours", "dense", "ratio")
_FEW = 24  # channels on the side of a convolution that no sum runs over


@dataclass(frozen=True)
class Layer:
    """``ours`` and ``dense`` take the tensors that ``tensors(inputs, outputs, size)`` makes, x and weight first."""

    tensors: Callable
    ours: Callable
    dense: Callable
    kernel: int = 1  # on a side
    side: int = 9  # of the map, where the sum runs over channels
    few: int = _FEW
    grads: tuple[str, ...] = ("x", "weight", "bias")

    def sizes(self, what: str, depth: int) -> tuple[int, int, tuple[int, int]]:
        """Input channels, output channels and the map, with about so many products in the sums of ``what``."""
        if what in ("weight", "bias"):
            return self.few, self.few, (16, depth // 16)
        channels, square = max(depth // self.kernel**2, 1), (self.side,) * 2
        return (channels, self.few, square) if what == "output" else (self.few, channels, square)

    @property
    def sums(self) -> tuple[str, ...]:
        """The output and the gradients; a depthwise layer has sums over its taps alone but for the weight's and bias's."""
        return ("output", *self.grads) if "x" in self.grads else self.grads


def _conv_tensors(kernel: int, samples: int = 1, weights: tuple[int, ...] = ()) -> Callable:
    def make(inputs, outputs, size):
        return {
            "x": random_tensor(samples, inputs, *size),
            "weight": random_tensor(*weights, outputs, inputs, kernel, kernel),
            "bias": random_tensor(outputs),
        }

    return make


def _pixels(kernel: int, kind: str) -> Layer:
    def mask_of(x):
        generator = torch.Generator().manual_seed(0)
        return random_mask((x.shape[0], *x.shape[2:]), 0.5, kind, generator=generator)

    def ours(x, weight, bias):
        plan = dynops.PixelPlan.from_mask(mask_of(x))
        return ops.sparse_conv2d(x, weight, bias, plan, padding=kernel // 2, backend="cpp")

    def dense(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=kernel // 2) * mask_of(x)[:, None]

    few, side = (32, 16) if kind == "full" else (_FEW, 9)  # the fewest that run as Winograd's
    return Layer(_conv_tensors(kernel), ours, dense, kernel, side, few)


def _rows() -> Layer:
    def ours(x, weight, bias):
        plan = dynops.PixelPlan.full((1, *x.shape[2:]))
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        return ops.packed_conv2d(rows, weight, bias, plan, plan, padding=1, backend="cpp")

    def dense(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1).flatten(0, 2)

    return Layer(_conv_tensors(3), ours, dense, 3)


def _channels() -> Layer:
    def plan_of(count):
        live = torch.ones(1, count, dtype=torch.bool)
        live[:, :: max(count // 8, 2)] = False
        return dynops.ChannelPlan.from_mask(live)

    def ours(x, weight, bias):
        plans = plan_of(x.shape[1]), plan_of(weight.shape[0])
        return ops.channel_conv2d(x, weight, bias, *plans, padding=1, backend="cpp")

    def dense(x, weight, bias):
        live_in, live_out = (plan_of(n).mask()[:, :, None, None] for n in (x.shape[1], weight.shape[0]))
        return F.conv2d(x * live_in, weight, bias, padding=1) * live_out

    return Layer(_conv_tensors(3), ours, dense, 3)


def _samples() -> Layer:
    def ours(x, weight, bias):
        return ops.sample_conv2d(x, weight, bias, padding=1, backend="cpp")

    def dense(x, weight, bias):
        each = zip(x.split(1), weight.unbind(), strict=True)
        return torch.cat([F.conv2d(image, w, bias, padding=1) for image, w in each])

    return Layer(_conv_tensors(3, 2, (2,)), ours, dense, 3)


def _mixed() -> Layer:
    mix = torch.tensor([[0.75, -0.5], [0.25, 1.0]])

    def ours(x, weight, bias):
        return ops.mixed_conv2d(x, weight, mix.to(x.dtype), bias, padding=1, backend="cpp")

    def dense(x, weight, bias):
        mixed = torch.einsum("ne,eoikl->noikl", mix.to(x.dtype), weight)
        each = zip(x.split(1), mixed.unbind(), strict=True)
        return torch.cat([F.conv2d(image, w, bias, padding=1) for image, w in each])

    return Layer(_conv_tensors(3, 2, (2,)), ours, dense, 3)


def _outputs() -> Layer:
    def mask_of(x, weight):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(x.shape[0], weight.shape[0], *x.shape[2:], generator=generator) < 0.5

    def ours(x, weight, bias):
        return ops.masked_output_conv2d(x, weight, mask_of(x, weight), bias=bias, padding=1, backend="cpp")

    def dense(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1) * mask_of(x, weight)

    return Layer(_conv_tensors(3), ours, dense, 3)


def _depthwise() -> Layer:
    def tensors(inputs, outputs, size):
        return {
            "x": random_tensor(1, 24, *size),
            "weight": random_tensor(24, 1, 3, 3),
            "bias": random_tensor(24),
        }

    def ours(x, weight, bias):
        plan = dynops.PixelPlan.full((1, *x.shape[2:]))
        return ops.sparse_conv2d(x, weight, bias, plan, padding=1, groups=24, backend="cpp")

    def dense(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1, groups=24)

    return Layer(tensors, ours, dense, 3, grads=("weight", "bias"))


def _experts(rows: int) -> Layer:
    """``rows`` an expert: few run as dot products, more on panels of the weight or of x."""

    def tensors(inputs, outputs, size):
        count = max(rows, size[0] * size[1] if size[0] == 16 else 0)
        return {
            "x": random_tensor(2 * count, inputs),
            "weight": random_tensor(2, outputs, inputs),
            "bias": random_tensor(2, outputs),
        }

    def ours(x, weight, bias):
        index = torch.arange(2).repeat_interleave(len(x) // 2)[:, None]
        plan = dynops.ExpertPlan.from_topk(index, 2)
        return ops.grouped_linear(x, weight, plan, bias, backend="cpp")

    def dense(x, weight, bias):
        each = zip(x.chunk(2), weight.unbind(), bias.unbind(), strict=True)
        return torch.cat([F.linear(part, w, b) for part, w, b in each])

    return Layer(tensors, ours, dense)


KINDS = {
    "pixels": _pixels(3, "random"),
    "pixels 1x1": _pixels(1, "random"),
    "pixels full": _pixels(3, "full"),
    "rows": _rows(),
    "channels": _channels(),
    "samples": _samples(),
    "mixed": _mixed(),
    "outputs": _outputs(),
    "depthwise": _depthwise(),
    "experts 8": _experts(8),
    "experts 80": _experts(80),
    "experts 250": _experts(250),
}


def sums(
    kind: str, depth: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(what, ours, exact, dense in its more exact format) of the output and the gradients, with sums of ``depth``."""
    layer = KINDS[kind]
    for what in layer.sums:
        given = {name: t.to(dtype) for name, t in layer.tensors(*layer.sizes(what, depth)).items()}
        exact, dy = _run(layer.dense, {name: t.double() for name, t in given.items()}, what, None)
        dense = [_run(layer.dense, _in_format(given, f), what, dy.to(dtype))[0] for f in FORMATS]
        ours, _ = _run(layer.ours, _in_format(given, FORMATS[1]), what, dy.to(dtype))
        yield what, ours, exact, min(dense, key=lambda d, exact=exact: float((d.double() - exact).norm()))


def _in_format(tensors: dict[str, Tensor], memory_format: torch.memory_format) -> dict[str, Tensor]:
    """Maps and weights ``[O, I, kh, kw]`` in a memory format; what has other dimensions stays."""
    return {n: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for n, t in tensors.items()}


def _run(layer: Callable, tensors: dict[str, Tensor], what: str, dy: Tensor | None) -> tuple[Tensor, Tensor]:
    if what == "output":
        with torch.no_grad():
            out = layer(**tensors)
        return out, out
    tensors = {n: t.detach().requires_grad_(n == what) for n, t in tensors.items()}
    out = layer(**tensors)
    if dy is None:
        dy = random_tensor(*out.shape, dtype=torch.bfloat16).to(out.dtype)  # exact in every dtype
    last = out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)
    upstream = dy.contiguous(memory_format=FORMATS[last])
    return torch.autograd.grad(out, tensors[what], upstream)[0], dy


def rows_here() -> list[dict]:
    """One row for each sum, on the instruction set of this process."""
    rows = []
    isa = dynops.build_info()["cpu_isa"]
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for depth in DEPTHS if dtype == torch.float32 else DEPTHS[2::4]:
                torch.manual_seed(0)
                for what, ours, exact, dense in sums(kind, depth, dtype):
                    mine, other = (float((t.double() - exact).norm() / exact.norm()) for t in (ours, dense))
                    ratio = f"{mine / other:.2f}" if other else ""
                    name = str(dtype).removeprefix("torch.")
                    values = (isa, kind, name, what, depth, f"{mine:.2e}", f"{other:.2e}", ratio)
                    rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.errors", description=__doc__)
    parser.add_argument("--out", type=Path, help="a CSV of the table")
    parser.add_argument("--here", action="store_true", help="this process's instruction set alone, as CSV")
    args = parser.parse_args()
    if args.here:
        writer = csv.DictWriter(sys.stdout, FIELDS)
        writer.writerows(rows_here())
        return
    rows = []
    for isa in dynops.build_info()["cpu_isas"]:
        command = [sys.executable, "-m", "benchmarks.errors", "--here"]
        done = subprocess.run(
            command, env={**os.environ, "DYNOPS_CPU_ISA": isa}, stdout=subprocess.PIPE, text=True
        )
        done.check_returncode()
        rows += csv.DictReader(done.stdout.splitlines(), FIELDS)
    print(aligned(list(FIELDS), [list(row.values()) for row in rows]))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
