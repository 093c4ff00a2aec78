"""The common parts of the C++ convolutions: the setup of a shape, packed weights, Winograd's tiles, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...geometry import ConvGeometry
from ...kept import kept


class _Overloads:
    """The CPU ops of the binary: ``CPP.conv`` is ``torch.ops.dynops.cpu_conv``, looked up once, as that takes 0.6 us."""

    def __getattr__(self, name: str):
        overload = getattr(torch.ops.dynops, f"cpu_{name}").default
        setattr(self, name, overload)
        return overload


CPP = _Overloads()
CHANNELS_LAST = torch.channels_last
# csrc/cpu/engine/engine.h: Activation
_NAMES = ("", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2", "clamped_swiglu")
ACTIVATIONS = {name: i for i, name in enumerate(_NAMES)}
# Below this many channels the taps of a kernel row are read as one run of the input: 3 channels would
# leave the GEMM's inner loop with 3 iterations, a 7 x 3 run gives it 21.
_MERGED_CHANNELS = 16
# Winograd pays from here on: 56 x 56 pixels of 32 channels take 234 us instead of 286, of 16 channels 133 of 141.
WINOGRAD_CHANNELS = 32
_WINOGRAD_ROWS = 96  # fewer make no 24 full tiles, and the look at them costs 2 us


@functools.cache
def bf16_dot() -> bool:
    """True if this CPU multiplies pairs of bfloat16 in one instruction."""
    return backends.build_info()["bf16_dot"]


class Setup(NamedTuple):
    """The choices for convolutions of one shape."""

    out_channels: int
    merged: bool  # the taps of a kernel row are read as one run of the input
    depthwise: bool
    dot: bool  # bfloat16 pairs
    winograd: bool  # may run as Winograd's F(2x2, 3x3) where active pixels lie side by side


@functools.lru_cache(maxsize=4096)
def setup_of(g: ConvGeometry, weight_shape: torch.Size, dtype: torch.dtype, packed_in: bool) -> Setup:
    """The setup of a convolution; ``packed_in``: its input is not a dense map."""
    out_channels = weight_shape[1] * g.groups if g.transposed else weight_shape[0]
    merges = not packed_in and not g.transposed and g.groups == 1 and g.dil_w == 1 and g.kernel_w > 1
    depthwise = g.groups > 1 and weight_shape[0] == g.groups and weight_shape[1] == 1
    dot = dtype == torch.bfloat16 and bf16_dot()
    winograd = takes_winograd(g, weight_shape, dtype)
    return Setup(out_channels, merges and weight_shape[1] < _MERGED_CHANNELS, depthwise, dot, winograd)


def takes_winograd(g: ConvGeometry, weight_shape: torch.Size, dtype: torch.dtype) -> bool:
    """True if this convolution runs as Winograd's F(2x2, 3x3) where active pixels lie side by side."""
    square = g.kernel_h == g.kernel_w == 3 and g.stride_h == g.stride_w == g.dil_h == g.dil_w == 1
    wide = min(weight_shape[0], weight_shape[1]) >= WINOGRAD_CHANNELS
    return square and wide and g.groups == 1 and not g.transposed and dtype == torch.float32


def packed_weight(weight: Tensor, g: ConvGeometry, setup: Setup, input_grad: bool) -> Tensor:
    """The weight as the GEMM reads it, made once for each version of the weight."""

    def make():
        if setup.depthwise:
            return CPP.pack_depthwise(weight)
        merged = setup.merged and not input_grad
        return CPP.pack_weight(weight, g.groups, bool(g.transposed), input_grad, merged, setup.dot)

    return kept.get((setup, g.groups, g.transposed, input_grad), make, weight)


def winograd_weight(weight: Tensor, input_grad: bool) -> Tensor:
    """The weight as Winograd's products read it, made once for each version of the weight."""

    def make():
        turned = weight.flip(2, 3).transpose(0, 1).contiguous() if input_grad else weight
        return CPP.pack_winograd(turned)

    return kept.get(("winograd", input_grad), make, weight)


def quads_of(
    index: Tensor, count: Tensor | None, g: ConvGeometry, derived: Callable | None = None
) -> Tensor | None:
    """The tiles of 2 x 2 pixels that hold the active ones, or None where these are too few or too scattered.

    ``derived``: a plan's, which keeps the tiles: 18 us of the 320 of a layer of 32 channels at 16 x 16, batch 16.
    """
    if index.shape[0] < _WINOGRAD_ROWS:
        return None
    if derived is None:
        quads = CPP.winograd_quads(index, count, g)
    else:
        quads = derived("quads", lambda: CPP.winograd_quads(index, count, g))
    return quads if quads.shape[0] else None
