"""The C++ kernels of convolutions with weights of their own for samples and regions, or mixed from a few.

Same signatures as the references in ``ops/channels/sample_conv.py`` and ``ops/channels/mixed_conv.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import ConvGeometry, as_geometry
from ...kept import kept
from ..layout import contiguous, empty_map
from .engine import ACTIVATIONS, CHANNELS_LAST, CPP, Setup, setup_of, takes_winograd
from .rows import last

# As csrc/cpu/channels/own_weights.h has it: a sample of fewer tiles of 2 x 2 pixels runs direct. Mixed weights want as
# many more as there are: Winograd's are 16/9 as large.
_WINOGRAD_TILES = 49
_WINOGRAD_TILES_A_KERNEL = 24
# Outputs are mixed instead of weights where these are large and a sample has no more pixels than this: 8 samples,
# 4 kernels of 512 -> 512, one pixel 0.10 ms instead of 0.20, two pixels 0.14 and 0.16, four 0.21 and 0.15; of
# 128 -> 128, one pixel 0.048 and 0.038.
_OUTPUT_PIXELS, _OUTPUT_WEIGHTS = 1, 1 << 17


def _tiles(g: ConvGeometry) -> int:
    return (g.out_h + 1) // 2 * ((g.out_w + 1) // 2)


def _out_map(x: Tensor, channels: int, g: ConvGeometry) -> Tensor:
    return empty_map(x, (g.batch, channels, g.out_h, g.out_w), CHANNELS_LAST)


def conv(x, weight, bias, region, geometry, activation) -> Tensor:
    """See ``ops.channels.sample_conv._conv``."""
    g = as_geometry(geometry)
    out = _out_map(x, weight.shape[2], g)
    merged = setup_of(g, weight.shape[-4:], x.dtype, False).merged
    tensors = last(x), weight.contiguous(), contiguous(bias), contiguous(region)
    CPP.weighted_conv(*tensors, g, ACTIVATIONS[activation], merged, out)
    return out


def conv_input_grad(grad, weight, region, geometry) -> Tensor:
    """See ``ops.channels.sample_conv._conv_input_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    shape = (g.batch, weight.shape[3] * g.groups, g.in_h, g.in_w)
    depthwise = setup_of(g, weight.shape[2:], grad.dtype, False).depthwise
    dtype = grad.dtype if depthwise else torch.float32
    dx = torch.empty(shape, dtype=dtype, memory_format=CHANNELS_LAST, device="cpu")
    if not depthwise:  # whose kernel writes every pixel once
        dx.zero_()
    CPP.weighted_input_grad(last(grad), weight.contiguous(), contiguous(region), g, dx)
    return dx.to(grad.dtype)


def conv_weight_grad(grad, x, region, weight_shape, geometry, bias) -> tuple[Tensor, Tensor]:
    """See ``ops.channels.sample_conv._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    dw = grad.new_empty(weight_shape)
    db = grad.new_empty(weight_shape[:3] if bias else 0)
    CPP.weighted_weight_grad(last(grad), last(x), contiguous(region), g, dw, db if bias else None)
    return dw, db


def _mixes_winograd(weight: Tensor, g: ConvGeometry, x: Tensor) -> bool:
    tiles = max(_WINOGRAD_TILES, _WINOGRAD_TILES_A_KERNEL * weight.shape[0])
    return takes_winograd(g, weight.shape[1:], x.dtype) and _tiles(g) >= tiles


def _packed(weight: Tensor, g: ConvGeometry, setup: Setup, winograd: bool) -> Tensor:
    """``[E, bytes]``: each weight as the GEMM reads it, made once for each version of all."""

    def make():
        if winograd:
            return torch.stack([CPP.pack_winograd(w) for w in weight])
        if setup.depthwise:
            return torch.stack([CPP.pack_depthwise(w) for w in weight])
        pack = CPP.pack_weight
        return torch.stack([pack(w, g.groups, False, False, setup.merged, setup.dot) for w in weight])

    return kept.get(("mixed", winograd, setup, g.groups), make, weight)


def _mix_outputs(x, packed, mix, bias, g, activation, merged: bool, out) -> None:
    """Every kernel's output times its share, added up in ``out``."""
    pixels = g.out_h * g.out_w
    index = torch.arange(g.batch * pixels, dtype=torch.int32, device="cpu")
    shares = mix.t().repeat_interleave(pixels, 1)  # [E, N * pixels]
    if bias is not None:
        out.copy_(bias.view(-1, bias.shape[-1], 1, 1).expand_as(out))
    for e in range(packed.shape[0]):
        is_last = e + 1 == packed.shape[0]
        sum_so_far = out if e or bias is not None else None
        finish = activation if is_last else 0, None, None, shares[e], sum_so_far, None
        CPP.conv(x, packed[e], None, index, None, None, g, *finish, merged, None, out)


def mixed_conv(x, weight, mix, bias, geometry, activation) -> Tensor:
    """See ``ops.channels.mixed_conv._conv``. Mixes in float32, whatever the dtype."""
    g = as_geometry(geometry)
    out = _out_map(x, weight.shape[1], g)
    setup = setup_of(g, weight.shape[1:], x.dtype, False)
    winograd = _mixes_winograd(weight, g, x)
    packed = _packed(weight, g, setup, winograd)
    mix = mix.to(torch.float32).contiguous()
    tensors = last(x), packed, mix, contiguous(bias), g, ACTIVATIONS[activation]
    few = g.out_h * g.out_w <= _OUTPUT_PIXELS and weight[0].numel() >= _OUTPUT_WEIGHTS
    if few and x.dtype == torch.float32 and not setup.depthwise:
        _mix_outputs(*tensors, setup.merged, out)
    elif x.dtype == torch.float32 and g.groups == 1 and not setup.merged and not winograd:
        CPP.mixed_in_steps(*tensors, out)
    else:
        CPP.mixed_conv(*tensors, setup.merged, winograd, out)
    return out
