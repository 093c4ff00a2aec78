"""The C++ kernels for CPU tensors: prepares memory for ``csrc/cpu``, and keeps packed weights.

Same signatures as the references in ``ops/pixels.py``, ``ops/rows.py`` and ``ops/blocks.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...geometry import ConvGeometry, as_block_geometry, as_geometry
from ...kept import kept
from ..layout import memory_format_of
from . import planes as cpp_planes

_CHANNELS_LAST = torch.channels_last
# The order of csrc/cpu/engine/engine.h's Activation.
_NAMES = (
    "",
    "relu",
    "relu6",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "relu2",
)  # csrc/cpu/engine/engine.h: Activation
_ACTIVATIONS = {name: i for i, name in enumerate(_NAMES)}
# Below this many channels the taps of a kernel row are read as one run of the input: 3 channels would
# leave the GEMM's inner loop with 3 iterations, a 7 x 3 run gives it 21.
_MERGED_CHANNELS = 16
# Winograd pays from here on: 56 x 56 pixels of 32 channels take 234 us instead of 286, of 16 channels 133 of 141.
_WINOGRAD_CHANNELS = 32
_WINOGRAD_ROWS = (
    96  # fewer make no 24 full tiles, and the look at them costs 2 us (csrc/cpu/pixels/winograd.cpp)
)


if backends.has_binary():  # the overloads themselves: looking one up costs 0.6 us a call
    _cpu_conv = torch.ops.dynops.cpu_conv.default
    _cpu_input_grad = torch.ops.dynops.cpu_conv_input_grad.default
    _cpu_weight_grad = torch.ops.dynops.cpu_conv_weight_grad.default
    _cpu_quads = torch.ops.dynops.cpu_winograd_quads.default
    _cpu_gather = torch.ops.dynops.cpu_gather.default
    _cpu_scatter = torch.ops.dynops.cpu_scatter.default
    _cpu_gather_samples = torch.ops.dynops.cpu_gather_samples.default
    _cpu_scatter_samples = torch.ops.dynops.cpu_scatter_samples.default
    _cpu_merge = torch.ops.dynops.cpu_merge.default
    _cpu_gather_tiles = torch.ops.dynops.cpu_gather_tiles.default
    _cpu_scatter_tiles = torch.ops.dynops.cpu_scatter_tiles.default


@functools.cache
def _bf16_dot() -> bool:
    return backends.build_info()["bf16_dot"]


class _Setup(NamedTuple):
    """What a convolution of this shape needs to know before it runs."""

    out_channels: int
    merged: bool  # the taps of a kernel row are read as one run of the input
    depthwise: bool
    dot: bool  # bfloat16 pairs
    winograd: bool  # may run as Winograd's F(2x2, 3x3) where active pixels lie side by side


@functools.lru_cache(maxsize=4096)
def _setup(g: ConvGeometry, weight_shape: torch.Size, dtype: torch.dtype, packed_in: bool) -> _Setup:
    out_channels = weight_shape[1] * g.groups if g.transposed else weight_shape[0]
    merges = not packed_in and not g.transposed and g.groups == 1 and g.dil_w == 1 and g.kernel_w > 1
    depthwise = g.groups > 1 and weight_shape[0] == g.groups and weight_shape[1] == 1
    dot = dtype == torch.bfloat16 and _bf16_dot()
    winograd = takes_winograd(g, weight_shape, dtype)
    return _Setup(out_channels, merges and weight_shape[1] < _MERGED_CHANNELS, depthwise, dot, winograd)


def takes_winograd(g: ConvGeometry, weight_shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether this convolution runs as Winograd's F(2x2, 3x3) where active pixels lie side by side."""
    square = g.kernel_h == g.kernel_w == 3 and g.stride_h == g.stride_w == g.dil_h == g.dil_w == 1
    wide = min(weight_shape[0], weight_shape[1]) >= _WINOGRAD_CHANNELS
    return square and wide and g.groups == 1 and not g.transposed and dtype == torch.float32


def _packed_weight(weight: Tensor, g: ConvGeometry, setup: _Setup, input_grad: bool) -> Tensor:
    """The weight as the GEMM reads it, made once for each version of the weight."""

    def make():
        if setup.depthwise:
            return torch.ops.dynops.cpu_pack_depthwise(weight)
        merged = setup.merged and not input_grad
        return torch.ops.dynops.cpu_pack_weight(
            weight, g.groups, bool(g.transposed), input_grad, merged, setup.dot
        )

    return kept.get((setup, g.groups, g.transposed, input_grad), make, weight)


def _winograd_weight(weight: Tensor, input_grad: bool) -> Tensor:
    """The weight as Winograd's products read it, made once for each version of the weight."""

    def make():
        turned = weight.flip(2, 3).transpose(0, 1).contiguous() if input_grad else weight
        return torch.ops.dynops.cpu_pack_winograd(turned)

    return kept.get(("winograd", input_grad), make, weight)


def _quads(
    index: Tensor, count: Tensor | None, g: ConvGeometry, derived: Callable | None = None
) -> Tensor | None:
    """The tiles of 2 x 2 pixels that hold the active ones, or None where these are too few or too scattered.

    ``derived``: a plan's, for its next convolution: 18 us of the 320 of one of 32 channels at 16 x 16, batch 16.
    """
    if index.shape[0] < _WINOGRAD_ROWS:
        return None
    if derived is None:
        quads = _cpu_quads(index, count, g)
    else:
        quads = derived("quads", lambda: _cpu_quads(index, count, g))
    return quads if quads.shape[0] else None


def _last(x: Tensor) -> Tensor:
    """A map in channels_last, rows contiguous."""
    if x.dim() != 4:
        return x.contiguous()
    return x if x.is_contiguous(memory_format=_CHANNELS_LAST) else cpp_planes.channels_last(x)


def conv(
    x,
    weight,
    bias,
    index,
    count,
    source,
    geometry,
    activation,
    scale,
    shift,
    gate,
    residual,
    base,
    rows,
    derived=None,
    planes=False,
):
    """See ``ops.pixels._conv``. The output has the format of ``x``.

    ``derived``: that of the plan, where there is one. ``planes``: the output is NCHW, whatever ``x`` is.
    """
    g = as_geometry(geometry)
    if x.dim() == 4 and cpp_planes.is_planes(x, g.out_h * g.out_w):
        return cpp_planes.conv(conv, x, weight, bias, index, count, g, activation, scale, shift, gate, residual, base, rows, derived, _ACTIVATIONS[activation])  # fmt: skip
    setup = _setup(g, weight.shape, x.dtype, source is not None)
    quads = _quads(index, count, g, derived) if setup.winograd else None
    packed = _packed_weight(weight, g, setup, False) if quads is None else _winograd_weight(weight, False)
    if rows:
        out = x.new_empty((index.shape[0], setup.out_channels))
    else:
        shape = (g.batch, setup.out_channels, g.out_h, g.out_w)
        layout = torch.contiguous_format if planes else _CHANNELS_LAST
        out = torch.empty(shape, dtype=x.dtype, memory_format=layout, device="cpu")
    if base is not None:
        base = cpp_planes.nchw(base) if planes else _last(base)
    if gate is not None:
        gate = gate.to(torch.float32).contiguous()
    _cpu_conv(
        _last(x),
        packed,
        bias,
        index,
        count,
        source,
        geometry,
        _ACTIVATIONS[activation],
        scale,
        shift,
        gate,
        None if residual is None else _last(residual),
        base,
        setup.merged,
        quads,
        out,
    )
    return out


def conv_input_grad(grad, weight, index, count, source, source_rows, geometry, rows):
    """See ``ops.pixels._conv_input_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    setup = _setup(g, weight.shape, grad.dtype, True)
    if not rows and cpp_planes.is_planes(grad, g.in_h * g.in_w):
        if source is None:
            return cpp_planes.input_grad(conv_input_grad, grad, weight, index, count, g, setup.winograd)
        grad, rows = cpp_planes.gather(grad, index, count), True
    shape = (g.batch, channels, g.in_h, g.in_w)
    if setup.winograd and source is None:
        dx = _winograd_input_grad(grad, weight, index, count, g, rows)
        if dx is not None:
            return dx
    packed = _packed_weight(weight, g, setup, True)
    if g.is_pointwise and source is None:  # each input is read once: a 1x1 convolution of the gradient
        if rows and not (count is None and grad.shape[0] == g.batch * g.out_h * g.out_w):
            source = torch.ops.dynops.inverse_index(index, count, g.out_shape)
        dx = torch.empty(shape, dtype=grad.dtype, memory_format=_CHANNELS_LAST, device="cpu")
        no_epilogue = (0, None, None, None, None, None)
        _cpu_conv(_last(grad), packed, None, index, count, source, g, *no_epilogue, False, None, dx)
        return dx
    if source is not None:
        dx = torch.zeros(
            (source_rows, channels), dtype=grad.dtype if setup.depthwise else torch.float32, device="cpu"
        )
    elif setup.depthwise:  # writes every pixel once, in the gradient's dtype
        dx = torch.empty(shape, dtype=grad.dtype, memory_format=_CHANNELS_LAST, device="cpu")
    else:
        dx = torch.empty(shape, dtype=torch.float32, memory_format=_CHANNELS_LAST, device="cpu").zero_()
    _cpu_input_grad(_last(grad), packed, index, count, source, g, dx)
    return dx.to(grad.dtype)


def _winograd_input_grad(grad, weight, index, count, g, rows) -> Tensor | None:
    """The convolution of the gradient's rows with the turned kernel, at the pixels that any of them reached.

    None where those are too scattered.
    """
    if max(g.pad_h, g.pad_w) > 2 or _quads(index, count, g) is None:
        return None
    back = g._replace(
        in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w, pad_h=2 - g.pad_h, pad_w=2 - g.pad_w
    )
    reached = torch.ops.dynops.mask_to_index.default(torch.ops.dynops.needed_mask(index, count, g))
    quads = _quads(reached, None, back)
    if quads is None:
        return None
    source = torch.ops.dynops.inverse_index(index, count, g.out_shape)
    packed_grad = grad.contiguous() if rows else gather_rows(grad, index, count)
    shape = (g.batch, weight.shape[1], g.in_h, g.in_w)
    dx = torch.empty(shape, dtype=grad.dtype, memory_format=_CHANNELS_LAST, device="cpu")
    no_epilogue = (0, None, None, None, None, None)
    packed = _winograd_weight(weight, True)
    _cpu_conv(packed_grad, packed, None, reached, None, source, back, *no_epilogue, False, quads, dx)
    return dx


def conv_weight_grad(grad, x, index, count, source, weight_shape, geometry, rows, bias=True):
    """See ``ops.pixels._conv_weight_grad``. Accumulates in float32, whatever the dtype."""
    g = as_geometry(geometry)
    grad, x, index, count, source, g = cpp_planes.weight_grad_inputs(grad, x, index, count, source, g, rows)
    dw = grad.new_empty(weight_shape)
    channels = weight_shape[1] * g.groups if g.transposed else weight_shape[0]
    db = grad.new_empty(channels if bias else 0)
    out = db if bias else None
    _cpu_weight_grad(_last(grad), _last(x), index, count, source, g, dw, out)
    return dw, db


def gather_rows(x: Tensor, index: Tensor, count: Tensor | None) -> Tensor:
    """See ``ops.rows._gather_rows``."""
    if not x.is_contiguous(memory_format=_CHANNELS_LAST):
        return cpp_planes.gather(x, index, count)
    out = x.new_empty((index.shape[0], x.shape[1]))
    _cpu_gather(x, index, count, out)
    return out


def scatter_rows(rows: Tensor, index: Tensor, count: Tensor | None, shape, base: Tensor | None) -> Tensor:
    """See ``ops.rows._scatter_rows``."""
    size = (shape[0], rows.shape[1], shape[1], shape[2])
    out = torch.empty(size, dtype=rows.dtype, memory_format=_CHANNELS_LAST, device="cpu")
    _cpu_scatter(rows.contiguous(), index, count, None if base is None else _last(base), out)
    return out


def scatter_planes(rows: Tensor, index: Tensor, count: Tensor | None, shape, base: Tensor | None) -> Tensor:
    """See ``ops.rows._scatter_planes``."""
    if shape[1] * shape[2] == 1:  # a pixel's row is its planes
        return scatter_rows(rows, index, count, shape, base)
    return cpp_planes.scatter(rows, index, count, shape, base)


def keep_pixels(out: Tensor, index: Tensor, count: Tensor | None, base: Tensor | None) -> Tensor:
    """``out``, channels_last, with ``base`` (or zero) written at the pixels that are not in the index."""
    torch.ops.dynops.cpu_keep.default(index, count, None if base is None else _last(base), out)
    return out


def merge_rows(
    rows: Tensor, index: Tensor, count: Tensor | None, base: Tensor, scale: Tensor | None, mix: bool
) -> Tensor:
    """See ``ops.rows._merge_rows``. float32, bfloat16 and float16."""
    out = torch.empty(base.shape, dtype=base.dtype, device="cpu")
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
    _cpu_merge(rows.contiguous(), index, count, base.contiguous(), scale, mix, out)
    return out


def gather_samples(x: Tensor, index: Tensor, count: Tensor | None, layout: torch.memory_format) -> Tensor:
    """``[N, ...]`` to ``[K, ...]``, both in ``layout``; samples past the count are zero."""
    out = torch.empty((index.shape[0], *x.shape[1:]), dtype=x.dtype, memory_format=layout, device="cpu")
    _cpu_gather_samples(x.contiguous(memory_format=layout), index, count, out)
    return out


def scatter_samples(
    rows: Tensor, index: Tensor, count: Tensor | None, batch: int, base: Tensor | None, layout
) -> Tensor:
    """``[K, ...]`` to ``[N, ...]``, both in ``layout``; elsewhere ``base``, or zero."""
    out = torch.empty((batch, *rows.shape[1:]), dtype=rows.dtype, memory_format=layout, device="cpu")
    base = None if base is None else base.contiguous(memory_format=layout)
    _cpu_scatter_samples(rows.contiguous(memory_format=layout), index, count, base, out)
    return out


def gather_tiles(x: Tensor, index: Tensor, count: Tensor | None, geometry) -> Tensor:
    """See ``ops.blocks._gather_tiles``."""
    g, layout = as_block_geometry(geometry), memory_format_of(x)
    shape = (index.shape[0], x.shape[1], g.tile_h, g.tile_w)
    out = torch.empty(shape, dtype=x.dtype, memory_format=layout, device="cpu")
    _cpu_gather_tiles(x.contiguous(memory_format=layout), index, count, g, out)
    return out


def scatter_tiles(
    tiles: Tensor, index: Tensor, count: Tensor | None, geometry, base: Tensor | None, add: bool
) -> Tensor:
    """See ``ops.blocks._scatter_tiles``. Copies any dtype, adds float32, bfloat16 and float16."""
    g, layout = as_block_geometry(geometry), memory_format_of(tiles)
    shape = (g.batch, tiles.shape[1], g.height, g.width)
    out = torch.empty(shape, dtype=tiles.dtype, memory_format=layout, device="cpu")
    base = None if base is None else base.contiguous(memory_format=layout)
    _cpu_scatter_tiles(tiles.contiguous(memory_format=layout), index, count, g, base, add, out)
    return out
