"""Convolutions of maps that do not lie channels_last: NCHW, and strided views of either format.

The pixels that a convolution reads become packed rows. Where few channels meet in a product it runs on the planes
themselves (``csrc/cpu/pixels/planes_conv.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ..epilogue import Epilogue
from ..layout import empty_map, memory_format_of
from .engine import ACTIVATIONS, CPP
from .rows import channels_last, gather, nchw, planes, scatter

# Up to this many channels on either side of a group, and in depthwise layers, a convolution may run on planes.
_THIN = 4
# The cost of rows beside their products, in products (two cores make 150 a ns): an element of the input and one of the
# output to bring, the table of an input pixel, the calls (15 us). A product costs 1.6 times that of planes where an
# input is thin. 3 to 64 channels, 7x7, stride 2, 224 x 224: rows 0.53 ms at 10 % (planes 0.82), 1.10 at 50 % (0.95).
_GATHER, _SCATTER, _PIXEL, _CALLS, _PRODUCT = 12, 13, 300, 2e6, 1.6
_LANES = 16  # pixels that planes compute together
# Up to this share of a map the pixels that a convolution reads are gathered one by one. From there on all of them are,
# in squares of 16 x 16 registers, without a table of rows.
_FEW = 0.5


def active_rows(index: Tensor, count: Tensor | None) -> int:
    return index.shape[0] if count is None else int(count)


def _as_rows(rows: int, g: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """The index and geometry of a 1x1 convolution whose row i reads row i: of a map ``[1, C, 1, P]``."""
    index = torch.arange(rows, dtype=torch.int32, device="cpu")
    return index, ConvGeometry(1, 1, rows, 1, rows, 1, 1, 1, 1, 0, 0, 1, 1, g.groups, g.transposed)


def _needed(index: Tensor, count: Tensor | None, g: ConvGeometry, derived: Callable | None) -> Tensor | None:
    """The input pixels that the outputs read, ascending, or None where these are most of the map."""
    pixels = g.batch * g.in_h * g.in_w
    if not g.transposed:  # each output has inputs that no other one reads first
        own = min(g.kernel_h, g.stride_h) * min(g.kernel_w, g.stride_w)
        if active_rows(index, count) * own > _FEW * pixels:
            return None

    def find() -> Tensor | tuple:
        needed = torch.ops.dynops.mask_to_index.default(torch.ops.dynops.needed_mask.default(index, count, g))
        return needed if needed.shape[0] <= _FEW * pixels else ()

    found = find() if derived is None else derived(("needed", g._replace(groups=1)), find)
    return found if isinstance(found, Tensor) else None


def _input_rows(x: Tensor, index, count, g: ConvGeometry, derived) -> tuple:
    """``(x, index, source, geometry)`` of the same convolution on packed rows, or on all of the map."""
    if g.is_pointwise:
        own, of_rows = _as_rows(index.shape[0], g)
        return gather(x, index, count).t()[None, :, None], own, None, of_rows
    needed = _needed(index, count, g, derived)
    if needed is None:
        return channels_last(x), index, None, g
    source = torch.ops.dynops.inverse_index.default(needed, None, g.in_shape)
    return gather(x, needed, None), index, source, g


def is_planes(x: Tensor, out_pixels: int) -> bool:
    """True if a map does not lie as rows of channels and its output is NCHW (one pixel is both)."""
    if memory_format_of(x) != torch.contiguous_format:
        return False
    return out_pixels != 1 or not x.is_contiguous(memory_format=torch.channels_last)


def may_take_planes(weight_shape: torch.Size, g: ConvGeometry) -> bool:
    """True if a convolution of this shape can run on planes: depthwise, or few channels on one side.

    All of it is faster so than in the dense layer, which brings NCHW into an order of its own and back: depthwise 128
    channels, 56 x 56, 0.17 ms instead of 0.23; 256 channels to one 0.08 instead of 0.3; 2 to 16, 3x3, 0.10 instead of
    0.10; 3 to 64, 7x7, 0.87 instead of 0.88.
    """
    thin = 0 < min(weight_shape[1], weight_shape[0] // g.groups) <= _THIN
    return thin and not g.transposed and min(g.pad_h, g.pad_w) >= 0


def _planes_win(active: int, weight_shape: torch.Size, g: ConvGeometry) -> bool:
    """True if planes compute ``active`` scattered pixels faster than rows do."""
    pixels, in_pixels = g.batch * g.out_h * g.out_w, g.batch * g.in_h * g.in_w
    outputs, products = weight_shape[0], weight_shape[1] * g.taps
    computed = pixels * (1 - (1 - active / pixels) ** _LANES)
    needed = min(active * g.taps, in_pixels)
    moved = _GATHER * needed * weight_shape[1] * g.groups + _SCATTER * pixels * outputs
    rows = _PRODUCT * active * products * outputs + _PIXEL * needed + moved + _CALLS
    return computed * products * outputs <= rows


def conv(
    run: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor | None,
    g: ConvGeometry,
    epilogue: Epilogue,
    base: Tensor | None,
    to_rows: bool,
    derived: Callable | None,
) -> Tensor:
    """``pixels.conv`` of a map that is not channels_last; the output is NCHW, or rows.

    Args:
        run: ``pixels.conv`` itself, for rows and channels_last maps.
    """
    outputs = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
    active = active_rows(index, count)
    if active == 0:
        if to_rows:
            return x.new_zeros((index.shape[0], outputs))
        shape = (g.batch, outputs, g.out_h, g.out_w)
        return x.new_zeros(shape) if base is None else base.clone(memory_format=torch.contiguous_format)
    activation, scale, shift, gate, residual = epilogue
    bare = not to_rows and gate is None and residual is None
    if bare and may_take_planes(weight.shape, g) and _planes_win(active, weight.shape, g):
        out = empty_map(x, (g.batch, outputs, g.out_h, g.out_w), torch.contiguous_format)
        finish = ACTIVATIONS[activation], scale, shift, None if base is None else nchw(base)
        CPP.planes_conv(x, weight.to(x.dtype).contiguous(), bias, index, count, g, *finish, out)
        return out
    if residual is not None and residual.dim() == 4:
        epilogue = epilogue._replace(residual=gather(residual, index, count))
    if to_rows:
        x, own, source, geometry = _input_rows(x, index, count, g, derived)
        derived = derived if own is index else None
        return run(x, weight, bias, own, count, source, geometry, epilogue, None, True, derived)
    if g.is_pointwise:
        source = torch.ops.dynops.inverse_index.default(index, count, g.in_shape)
        x = gather(x, index, count)
    else:
        x, _, source, _ = _input_rows(x, index, count, g, derived)
    return run(x, weight, bias, index, count, source, g, epilogue, base, False, derived, True)


def input_grad(
    run: Callable, grad: Tensor, weight: Tensor, index, count, g: ConvGeometry, wide: bool
) -> Tensor:
    """``pixels.conv_input_grad`` of a gradient that is not channels_last; NCHW.

    Args:
        run: ``pixels.conv_input_grad`` itself, for packed rows.
        wide: whether all of the input's gradient is the faster to compute, as Winograd's is.
    """
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    if active_rows(index, count) == 0:
        return grad.new_zeros((g.batch, channels, g.in_h, g.in_w))
    rows = gather(grad, index, count)
    if g.is_pointwise:
        own, of_rows = _as_rows(rows.shape[0], g)
        dx = run(rows, weight, own, None, None, 0, of_rows, True)
        return scatter(dx.permute(0, 2, 3, 1).reshape(-1, channels), index, count, g.in_shape, None)
    needed = None if wide else _needed(index, count, g, None)
    if needed is None:
        return planes(run(rows, weight, index, count, None, 0, g, True))
    source = torch.ops.dynops.inverse_index.default(needed, None, g.in_shape)
    dx = run(rows, weight, index, count, source, needed.shape[0], g, True)
    return scatter(dx, needed, None, g.in_shape, None)


def weight_grad_inputs(grad: Tensor, x: Tensor, index, count, source, g: ConvGeometry, rows: bool) -> tuple:
    """``(grad, x, index, count, source, geometry)`` of the same weight gradient, where every map is channels_last."""
    if not rows and not grad.is_contiguous(memory_format=torch.channels_last):
        grad = gather(grad, index, count)
    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        if g.is_pointwise and grad.dim() == 4:
            grad = gather(grad, index, count)
        x, index, source, g = _input_rows(x, index, count, g, None)
    return grad, x, index, count, source, g
