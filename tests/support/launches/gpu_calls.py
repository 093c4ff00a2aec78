"""Calls of every op that has Triton kernels, at the sizes of real layers, and how many launches each may take."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from driver.watch import watch
from torch import Tensor

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops
from dynops.geometry import conv_geometry
from dynops.ops.block_conv import block_conv
from dynops.ops.epilogue import NOTHING
from dynops.testing import random_mask


@dataclass(frozen=True)
class Call:
    """``run(plan, *maps, *others)``.

    Attributes:
        run: the call of an op.
        plan: makes its plan on a device, in the exact form or in that of a capacity.
        maps: the shapes of the maps, which are channels_last.
        others: the shapes of the other floating tensors.
    """

    run: Callable
    plan: Callable[[str, bool], object]
    maps: tuple = ()
    others: tuple = ()

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        last = torch.channels_last
        made = [torch.empty(shape, dtype=dtype, device=device, memory_format=last) for shape in self.maps]
        made += [torch.empty(shape, dtype=dtype, device=device) for shape in self.others]
        return [x.requires_grad_() for x in made]


def _pixels(n: int, h: int, w: int, density: float = 0.25):
    def make(device: str, capacity: bool) -> PixelPlan:
        mask = random_mask((n, h, w), density)
        return PixelPlan.from_mask(mask, 2 * int(mask.sum()) if capacity else None).to(device)

    return make


def _pixel_pair(n: int, size: int, stride: int):
    """The plans of a map and of what a convolution of 3x3 reads of the map before it."""

    def make(device: str, capacity: bool) -> tuple[PixelPlan, PixelPlan]:
        plan = _pixels(n, size // stride, size // stride, 0.1)("cpu", capacity)
        return plan.needed(3, stride, 1, in_size=(size, size)).to(device), plan.to(device)

    return make


def _blocks(n: int, h: int, w: int, block: int):
    def make(device: str, capacity: bool) -> BlockPlan:
        mask = random_mask((n, h, w), 0.1, "square")
        return BlockPlan.from_mask(mask, block, capacity=n * h * w // block**2 if capacity else None).to(
            device
        )

    return make


def _channels(n: int, *channels: int):
    """A plan of half of the channels of each of a convolution's sides; a capacity of three quarters."""

    def make(device: str, capacity: bool) -> list[ChannelPlan]:
        masks = [torch.rand(n, c) < 0.5 for c in channels]
        return [ChannelPlan.from_mask(m, 3 * m.shape[1] // 4 if capacity else None).to(device) for m in masks]

    return make


def _experts(tokens: int, topk: int, experts: int):
    def make(device: str, capacity: bool) -> ExpertPlan:
        index = torch.rand(tokens, experts).topk(topk).indices
        return ExpertPlan.from_topk(
            index, experts, 2 * tokens * topk // experts + 1 if capacity else None
        ).to(device)

    return make


def _samples(n: int):
    def make(device: str, capacity: bool) -> SamplePlan:
        return SamplePlan.from_mask(torch.arange(n) % 2 == 0, 3 * n // 4 if capacity else None).to(device)

    return make


def _pixel_calls() -> dict[str, Call]:
    plan, pair = _pixels(32, 56, 56), _pixel_pair(16, 56, 2)

    def conv(plan, x, weight, bias):
        return ops.sparse_conv2d(x, weight, bias, plan, padding=1)

    def fused(plan, x, residual, base, weight, bias):
        extra = {"residual": residual, "base": base, "activation": "silu"}
        return ops.sparse_conv2d(x, weight, bias, plan, scale=bias, shift=bias, **extra)

    def depthwise(plan, x, weight):
        return ops.sparse_conv2d(x, weight, None, plan, padding=1, groups=x.shape[1])

    def stem(plan, x, weight):
        return ops.sparse_conv2d(x, weight, None, plan, stride=2, padding=3)

    def transposed(plan, x, weight):
        return ops.sparse_conv_transpose2d(x, weight, None, plan, stride=2)

    def packed(plans, rows, weight, bias):
        return ops.packed_conv2d(rows[: plans[0].num_rows], weight, bias, *plans, stride=2, padding=1)

    def same_rows(plan, rows, residual, weight, bias):
        return ops.packed_conv2d(
            *(rows[: plan.num_rows], weight, bias, plan, plan), residual=residual[: plan.num_rows]
        )

    def packed_transposed(plans, rows, weight):
        down, up = plans[::-1]
        options = {"stride": 2, "padding": 1, "output_padding": 1}
        return ops.packed_conv_transpose2d(rows[: down.num_rows], weight, None, down, up, **options)

    def rows(plan, x):
        return ops.scatter_pixels(ops.gather_pixels(x, plan), plan)

    def interpolate(plan, x):
        return ops.interpolate_pixels(x, plan, "gaussian")

    many = 16 * 56 * 56
    return {
        "sparse_conv2d": Call(conv, plan, ((32, 256, 56, 56),), ((256, 256, 3, 3), (256,))),
        "sparse_conv2d, few pixels": Call(
            conv, _pixels(1, 7, 7), ((1, 512, 7, 7),), ((512, 512, 3, 3), (512,))
        ),
        "sparse_conv2d, fused": Call(
            fused, plan, ((32, 256, 56, 56), (32, 64, 56, 56), (32, 64, 56, 56)), ((64, 256, 1, 1), (64,))
        ),
        "sparse_conv2d, depthwise": Call(depthwise, plan, ((32, 144, 56, 56),), ((144, 1, 3, 3),)),
        "sparse_conv2d, stem": Call(stem, _pixels(8, 112, 112), ((8, 3, 224, 224),), ((64, 3, 7, 7),)),
        "sparse_conv_transpose2d": Call(
            transposed, _pixels(8, 112, 112), ((8, 128, 56, 56),), ((128, 64, 2, 2),)
        ),
        "packed_conv2d": Call(packed, pair, (), ((many, 128), (256, 128, 3, 3), (256,))),
        "packed_conv2d, same rows": Call(
            same_rows, plan, (), (*[(2 * many, 256)] * 2, (256, 256, 1, 1), (256,))
        ),
        "packed_conv_transpose2d": Call(packed_transposed, pair, (), ((many // 2, 256), (256, 128, 3, 3))),
        "gather_pixels, scatter_pixels": Call(rows, plan, ((32, 256, 56, 56),)),
        "interpolate_pixels": Call(interpolate, _pixels(4, 56, 56), ((4, 64, 56, 56),)),
    }


def _block_calls() -> dict[str, Call]:
    def tiles(plan, x, base):
        return ops.scatter_blocks(ops.gather_blocks(x, plan), plan, base)

    def overlapping(plan, x):
        return ops.scatter_blocks(ops.gather_blocks(x, plan, halo=1)[:, :, 1:-1, 1:-1], plan, add=True)

    def conv(plan, x, base, weight, bias):
        g = conv_geometry((1, 400, 704), (3, 3), before=(1, 1))
        return block_conv(x, weight, bias, plan, g, NOTHING, base)

    size = (1, 64, 400, 704)
    return {
        "gather_blocks, scatter_blocks": Call(tiles, _blocks(1, 400, 704, 8), (size, size)),
        "SparseBlocks of a convolution": Call(
            conv, _blocks(1, 400, 704, 16), (size, size), ((64, 64, 3, 3), (64,))
        ),
        "gather_blocks with a halo": Call(overlapping, _blocks(1, 400, 704, 16), (size,)),
    }


def _channel_calls() -> dict[str, Call]:
    def conv(plans, x, weight, bias):
        return ops.channel_conv2d(x, weight, bias, *plans, padding=1)

    def packed(plans, x, weight):
        rows = ops.packed_channel_conv2d(x, weight, None, None, plans[1], padding=1, activation="relu")
        return ops.scatter_channels(rows, plans[1])

    def linear(plans, x, weight):
        return ops.channel_linear(x, weight, None, *plans)

    def copies(plans, x):
        return ops.scatter_channels(ops.gather_channels(x, plans[0]), plans[0])

    both = _channels(32, 128, 128)
    return {
        "channel_conv2d": Call(conv, both, ((32, 128, 56, 56),), ((128, 128, 3, 3), (128,))),
        "channel_conv2d, few pixels": Call(
            conv, _channels(8, 512, 512), ((8, 512, 7, 7),), ((512, 512, 3, 3), (512,))
        ),
        "packed_channel_conv2d": Call(packed, both, ((32, 128, 56, 56),), ((128, 128, 3, 3),)),
        "channel_linear": Call(linear, _channels(64, 1024, 4096), (), ((64, 197, 1024), (4096, 1024))),
        "gather_channels, scatter_channels": Call(copies, both, ((32, 128, 56, 56),)),
    }


def _weight_calls() -> dict[str, Call]:
    """Weights of samples, regions, mixtures and pixels: the plan is a map of regions, a mask of outputs or nothing."""

    def sample(_, x, weight):
        return ops.sample_conv2d(x, weight, padding=1)

    def mixed(_, x, weights, mix):
        return ops.mixed_conv2d(x, weights, mix, padding=1)

    def region(regions, x, weights):
        return ops.region_conv2d(x, weights, regions, padding=1)

    def local(_, x, kernels):
        return ops.local_conv2d(x, kernels, 3, padding=1, groups=8)

    def masked(mask, x, weight):
        return ops.masked_output_conv2d(x, weight, mask, padding=1)

    def nothing(device: str, capacity: bool) -> None:
        return None

    def regions(device: str, capacity: bool) -> Tensor:
        return torch.randint(0, 4, (32, 28, 28)).to(device)

    def outputs(device: str, capacity: bool) -> Tensor:
        return (random_mask((32, 28, 28), 0.1)[:, None] & (torch.rand(128, 1, 1) < 0.5)).to(device)

    size = (32, 128, 28, 28)
    return {
        "sample_conv2d": Call(sample, nothing, (size,), ((32, 128, 128, 3, 3),)),
        "mixed_conv2d": Call(mixed, nothing, (size,), ((8, 128, 128, 3, 3), (32, 8))),
        "region_conv2d": Call(region, regions, (size,), ((4, 128, 128, 3, 3),)),
        "local_conv2d": Call(local, nothing, ((8, 64, 56, 56),), ((8, 72, 56, 56),)),
        "masked_output_conv2d": Call(masked, outputs, (size,), ((128, 128, 3, 3),)),
    }


def _expert_calls() -> dict[str, Call]:
    hidden, inner, experts, topk = 2048, 1024, 64, 8

    def linear(plan, x, weight):
        return ops.grouped_linear(x, weight, plan)

    def mlp(plan, x, up, down, share):
        return ops.experts_mlp(x, up, down, plan, share)

    def pairs(plan, x, share):
        return ops.combine_pairs(ops.gather_pairs(x, plan), plan, share)

    def activation(plan, z):
        return ops.expert_activation(z, "clamped_swiglu", interleaved=True)

    calls = {
        "grouped_linear": Call(linear, _experts(4096, 2, 8), (), ((4096, hidden), (8, inner, hidden))),
        "gather_pairs, combine_pairs": Call(pairs, _experts(4096, 2, 8), (), ((4096, hidden), (4096, 2))),
        "expert_activation": Call(activation, _experts(8, 1, 2), (), ((32768, 2 * inner),)),
    }
    weights = ((experts, 2 * inner, hidden), (experts, hidden, inner))
    for tokens in (1, 16, 512, 8192):
        shapes = ((tokens, hidden), *weights, (tokens, topk))
        calls[f"experts_mlp, {tokens} tokens"] = Call(mlp, _experts(tokens, topk, experts), (), shapes)
    return calls


def _sample_calls() -> dict[str, Call]:
    def rows(plan, x, base):
        return ops.scatter_samples(ops.gather_samples(x, plan), plan, base)

    def added(plan, x, share):
        return ops.scatter_samples(
            ops.gather_samples(x, plan) * 2, plan, x, add=True, scale=share[: plan.num_rows]
        )

    size = (64, 256, 56, 56)
    return {
        "gather_samples, scatter_samples": Call(rows, _samples(64), (size, size)),
        "scatter_samples, added": Call(added, _samples(64), (size,), ((64,),)),
    }


def check(name: str, form: str, dtype: torch.dtype, gpu: int = 0) -> None:
    """The launches of a call, forward and backward, against the most that it may take.

    A call of an exact plan is its second, which finds packed weights and what was derived from the plan; one of a
    capacity plan is captured in a graph.
    """
    call, device = CALLS[name], f"cuda:{gpu}"
    plan, tensors = call.plan(device, form == "capacity"), call.tensors(device, dtype)
    if form == "exact":
        run(call, plan, tensors)
    with watch.capture() if form == "capacity" else contextlib.nullcontext():
        counts = run(call, plan, tensors)
    for counted in counts:  # of weights, for TF32
        counted["kernels"] -= counted["round_kernel"]
    found = [counted[kind] for counted in counts for kind in ("kernels", "torch")]
    most = LAUNCHES[name][form]
    assert all(f <= m for f, m in zip(found, most, strict=True)), f"{found}, documented are {most}: {counts}"


def run(call: Call, plan, tensors: list[Tensor]) -> list[Counter]:
    """The counts of a forward and of its backward."""
    with watch.fresh() as forward:
        out = call.run(plan, *tensors)
        counts = [forward.counts]
    upstream = torch.empty_like(out)
    with watch.fresh() as backward:
        torch.autograd.grad(out, tensors, upstream, allow_unused=True)
        return [*counts, backward.counts]


CALLS = {
    **_pixel_calls(),
    **_block_calls(),
    **_channel_calls(),
    **_weight_calls(),
    **_expert_calls(),
    **_sample_calls(),
}

# The most launches of a call: Triton's kernels and PyTorch's ops of the forward, and both of the backward.
# fmt: off
LAUNCHES = {
    "sparse_conv2d":                     {"exact": (2, 0, 4, 12), "capacity": (2, 1, 4, 13)},
    "sparse_conv2d, few pixels":         {"exact": (2, 1, 4, 11), "capacity": (2, 2, 4, 12)},
    "sparse_conv2d, fused":              {"exact": (3, 5, 6, 19), "capacity": (3, 5, 6, 22)},
    "sparse_conv2d, depthwise":          {"exact": (2, 1, 2, 10), "capacity": (2, 1, 2, 10)},  # float32: large
    "sparse_conv2d, stem":               {"exact": (2, 2, 4, 11), "capacity": (2, 2, 4, 11)},  # cuDNN's convolution
    "sparse_conv_transpose2d":           {"exact": (2, 2, 4, 12), "capacity": (2, 3, 4, 13)},
    "packed_conv2d":                     {"exact": (1, 0, 3, 15), "capacity": (1, 9, 3, 19)},
    "packed_conv2d, same rows":          {"exact": (1, 1, 2, 8), "capacity": (1, 7, 3, 13)},
    "packed_conv_transpose2d":           {"exact": (2, 1, 4, 15), "capacity": (2, 10, 4, 16)},
    "gather_pixels, scatter_pixels":     {"exact": (2, 1, 2, 1), "capacity": (2, 1, 2, 1)},
    "interpolate_pixels":                {"exact": (3, 23, 3, 11), "capacity": (5, 56, 3, 18)},
    "gather_blocks, scatter_blocks":     {"exact": (2, 8, 2, 41), "capacity": (2, 8, 2, 41)},
    "SparseBlocks of a convolution":     {"exact": (2, 0, 4, 140), "capacity": (2, 48, 4, 141)},  # float32, A100: by pixels
    "gather_blocks with a halo":         {"exact": (2, 9, 2, 12), "capacity": (2, 9, 2, 12)},
    "channel_conv2d":                    {"exact": (3, 0, 11, 4), "capacity": (3, 1, 11, 5)},
    "channel_conv2d, few pixels":        {"exact": (2, 0, 10, 4), "capacity": (2, 1, 10, 5)},
    "packed_channel_conv2d":             {"exact": (2, 1, 7, 2), "capacity": (2, 2, 7, 3)},
    "channel_linear":                    {"exact": (2, 0, 14, 1), "capacity": (2, 0, 12, 1)},
    "gather_channels, scatter_channels": {"exact": (2, 0, 2, 0), "capacity": (2, 0, 2, 0)},
    "sample_conv2d":                     {"exact": (1, 1, 2, 3), "capacity": (1, 1, 2, 3)},  # the last a sum of parts, on 148 SMs
    "mixed_conv2d":                      {"exact": (1, 1, 2, 6), "capacity": (1, 2, 2, 6)},
    "region_conv2d":                     {"exact": (2, 16, 3, 17), "capacity": (2, 16, 3, 17)},  # 15 sort, without CUDA C++
    "local_conv2d":                      {"exact": (1, 0, 2, 0), "capacity": (1, 0, 2, 0)},
    "masked_output_conv2d":              {"exact": (0, 4, 0, 8), "capacity": (0, 4, 0, 8)},
    "grouped_linear":                    {"exact": (1, 0, 3, 0), "capacity": (1, 0, 3, 0)},
    "gather_pairs, combine_pairs":       {"exact": (2, 0, 3, 1), "capacity": (2, 0, 3, 1)},
    "expert_activation":                 {"exact": (1, 0, 1, 0), "capacity": (1, 0, 1, 0)},
    "experts_mlp, 1 tokens":             {"exact": (4, 0, 7, 8), "capacity": (4, 0, 7, 8)},
    "experts_mlp, 16 tokens":            {"exact": (4, 0, 7, 8), "capacity": (4, 0, 7, 8)},
    "experts_mlp, 512 tokens":           {"exact": (4, 0, 7, 8), "capacity": (4, 0, 7, 8)},
    "experts_mlp, 8192 tokens":          {"exact": (4, 0, 7, 8), "capacity": (4, 0, 7, 8)},
    "gather_samples, scatter_samples":   {"exact": (2, 1, 3, 3), "capacity": (2, 1, 3, 3)},
    "scatter_samples, added":            {"exact": (2, 9, 2, 8), "capacity": (2, 9, 2, 14)},
}
# fmt: on
