"""The problems of the tuner: one op on one shape, with the kernel whose tile is looked for. The most used come first.

The layers of ResNet-50, of which the batch and the density give the rows, and layers of experts from a token to
8192. A shape that is not listed takes the tile of the nearest one (``kernels.configs``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, ops
from dynops.geometry import conv_geometry
from dynops.ops.block_conv import block_conv
from dynops.ops.epilogue import NOTHING

Call = Callable[[], Tensor]


class Problem(NamedTuple):
    """One op on one shape.

    Attributes:
        family: of the kernel whose tile is looked for, as ``configs.Config.tile`` names it.
        dtype: of the tensors.
        make: draws the tensors on a device, and returns a function of a dtype and a backend that returns the call.
    """

    name: str
    family: str
    dtype: torch.dtype
    make: Callable[[torch.device], Callable[[torch.dtype, str], Call]]


SBNET = ((400, 700, 64), (200, 350, 128), (100, 175, 256), (50, 88, 512))  # h, w and channels of its 3x3
RESNET = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels of the 3x3, its map


def problems(dtype: torch.dtype = torch.bfloat16) -> list[Problem]:
    """All problems of a dtype, the most important first."""
    layers = [(c, c, h, 3) for c, h in RESNET]
    narrow = [layer for c, h in RESNET for layer in ((4 * c, c, h, 1), (c, 4 * c, h, 1))]
    # the first eight are those of the headline: a wide layer, half of the channels, two counts of tokens, ResNet-50
    found = [_pixels(32, 256, 256, 56, 3, 0.25, dtype), _channels(32, 128, 128, 56, 3, dtype)]
    found += [_experts(tokens, EXPERTS[0], dtype) for tokens in (8192, 512)]
    found += [_pixels(64, *layer, 0.25, dtype) for layer in layers]
    found += [_experts(8192, EXPERTS[1], dtype)]
    found += [_pixels(64, *layer, 0.25, dtype) for layer in narrow]
    found += [_pixels(1, *layer, 0.5, dtype) for layer in layers]
    found += [_experts(tokens, layer, dtype) for tokens in (1, 128) for layer in EXPERTS]
    found += [_blocks(*layer, 16, 0.1, dtype) for layer in SBNET]
    found += [_channels(32, *layer, dtype) for layer in layers + narrow]
    found += [_pixels(64, *layer, 0.5, dtype, wanted="weight") for layer in layers + narrow]
    found += [_pixels(64, *layer, 0.5, dtype, wanted="input") for layer in layers]
    found += [_pixels(n, *layer, 0.5, dtype) for n in (256, 8) for layer in layers]
    found += [_pixels(1, *layer, 0.5, dtype) for layer in narrow]
    found += [_pixels(1, 64, 64, 512, 3, 0.25, dtype), _pixels(1, 128, 128, 256, 3, 0.25, dtype)]
    found += [_experts(8192, layer, dtype, wanted="weight") for layer in EXPERTS]
    found += [_channels(32, *layer, dtype, wanted="weight") for layer in layers]
    return found


def every_problem() -> list[Problem]:
    """The problems of bfloat16, and the first ones of TF32."""
    return problems() + [problem for problem in problems(torch.float32) if problem.family == "pixels"][:12]


def small_problems(dtype: torch.dtype = torch.float16) -> list[Problem]:
    """One of each family, for a dry run in Triton's interpreter, whose products of bfloat16 are wrong."""
    experts = Experts(32, 32, 2, 1)
    return [
        _pixels(1, 16, 32, 6, 3, 0.5, dtype),
        _pixels(1, 16, 32, 6, 1, 0.5, dtype, wanted="weight"),
        _channels(2, 32, 32, 4, 1, dtype),
        _channels(2, 32, 32, 4, 1, dtype, wanted="weight"),
        _experts(8, experts, dtype),
        _experts(8, experts, dtype, wanted="weight"),
    ]


def _pixels(
    n: int, c: int, o: int, size: int, kernel: int, density: float, dtype, wanted: str = ""
) -> Problem:
    """A convolution ``[n, c, size, size]`` to o channels at random pixels; ``wanted``: a gradient instead."""

    def bound(device: torch.device):
        plan = PixelPlan.from_mask(torch.rand(n, size, size, device=device) < density)
        return partial(ops.sparse_conv2d, bias=None, plan=plan, padding=kernel // 2)

    name = f"pixels {n},{c},{o},{size} {kernel}x{kernel} at {density:.0%}"
    return _conv(name, "pixels", (n, c, o, size, kernel), dtype, wanted, bound)


def _blocks(h: int, w: int, c: int, block: int, density: float, dtype) -> Problem:
    """A 3x3 convolution ``[1, c, h, w]`` at random blocks."""

    def make(device: torch.device):
        grid = torch.rand(1, -(-h // block), -(-w // block), device=device) < density
        plan = BlockPlan.from_blocks(grid, (1, h, w), block)
        g = conv_geometry((1, h, w), (3, 3), before=(1, 1))

        def run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
            if backend == "reference":
                return ops.sparse_conv2d(x, weight, None, plan.pixels(), padding=1, backend=backend)
            return block_conv(x, weight, None, plan, g, NOTHING, None)

        x, weight, dy = _maps(device, dtype, (1, c, h, w), (c, c, 3, 3), (1, c, h, w))
        return partial(_call, run, (x, weight), dy, "")

    return Problem(f"blocks {h}x{w},{c} of {block} pixels at {density:.0%}", "blocks", dtype, make)


def _channels(n: int, c: int, o: int, size: int, kernel: int, dtype, wanted: str = "") -> Problem:
    """A convolution of which half of the channels of either side are live in each sample."""

    def bound(device: torch.device):
        inputs, outputs = (ChannelPlan.from_mask(_half(n, channels, device)) for channels in (c, o))
        plans = {"in_plan": inputs, "out_plan": outputs}
        return partial(ops.channel_conv2d, bias=None, **plans, padding=kernel // 2)

    name = f"channels {n},{c},{o},{size} {kernel}x{kernel}, half of them"
    return _conv(name, "channels", (n, c, o, size, kernel), dtype, wanted, bound)


def _conv(name: str, family: str, sizes: tuple[int, ...], dtype, wanted: str, bound: Callable) -> Problem:
    """``bound``: returns a function ``(x, weight, backend=)`` on a device."""
    n, c, o, size, kernel = sizes

    def make(device: torch.device):
        x, weight, dy = _maps(device, dtype, (n, c, size, size), (o, c, kernel, kernel), (n, o, size, size))
        return partial(_call, bound(device), (x, weight), dy, wanted)

    return _named(name, family, dtype, wanted, make)


def _named(name: str, family: str, dtype: torch.dtype, wanted: str, make: Callable) -> Problem:
    name += f", gradient of {wanted}" if wanted else ""
    return Problem(name, f"{family}_weight" if wanted == "weight" else family, dtype, make)


class Experts(NamedTuple):
    hidden: int
    inner: int
    experts: int
    topk: int


EXPERTS = (Experts(1024, 512, 64, 8), Experts(4096, 4096, 8, 2))


def _experts(tokens: int, layer: Experts, dtype, wanted: str = "") -> Problem:
    """The gated MLP of random experts; ``wanted``: the gradient of one product's weight instead."""

    def make(device: torch.device):
        hidden, inner, experts, topk = layer
        scores = torch.rand(tokens, experts, device=device)
        plan = ExpertPlan.from_topk(scores.topk(topk, 1).indices, experts)
        options = {"device": device, "dtype": dtype}
        x = torch.randn(tokens, hidden, **options)
        if wanted:
            weight = torch.randn(experts, inner, hidden, **options) / hidden**0.5
            dy = torch.randn(tokens * topk, inner, **options)
            return partial(_call, partial(ops.grouped_linear, plan=plan), (x, weight), dy, wanted)
        up = torch.randn(experts, 2 * inner, hidden, **options) / hidden**0.5
        down = torch.randn(experts, hidden, inner, **options) / inner**0.5
        weights = torch.rand(tokens, topk, device=device)
        run = partial(ops.experts_mlp, plan=plan, topk_weight=weights)
        return partial(_call, run, (x, up, down), None, "")

    name = f"experts {tokens} tokens, H {layer.hidden}, I {layer.inner}, {layer.experts} top-{layer.topk}"
    return _named(name, "experts", dtype, wanted, make)


def _maps(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random ``[x, weight, dy]``, channels_last; the weight's values keep the output's size about 1."""
    x, weight, dy = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    weight /= weight[0].numel() ** 0.5
    return [t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy)]


def _half(n: int, channels: int, device: torch.device) -> Tensor:
    """Bool ``[n, channels]``, half of each sample's set."""
    order = torch.rand(n, channels, device=device).argsort(1)
    return order < channels // 2


def _call(
    run: Callable,
    leaves: tuple[Tensor, ...],
    dy: Tensor | None,
    wanted: str,
    dtype: torch.dtype,
    backend: str,
) -> Call:
    """A call of ``run`` on leaves of a dtype, or of the backward of one of them ("input" or "weight")."""
    leaves = [t.to(dtype) for t in leaves]  # of the problem's dtype: in float64 the same values
    if not wanted:
        return torch.no_grad()(partial(run, *leaves, backend=backend))
    leaf = leaves[["input", "weight"].index(wanted)].requires_grad_()
    with torch.enable_grad():
        out = run(*leaves, backend=backend)
    return lambda: torch.autograd.grad(out, leaf, dy.to(dtype), retain_graph=True)[0]
