"""The geometry of a convolution module on an input of a given size."""

from __future__ import annotations

from torch import nn

from .. import geometry
from ..geometry import ConvGeometry


def two(size) -> tuple[int, int]:
    """An attribute of a convolution as a pair: it may have been set to one int since, which torch takes."""
    return size if type(size) is tuple else geometry.pair(size, "kernel_size, stride, padding or dilation")


def conv_geometry(conv: nn.Conv2d, in_shape: tuple[int, int, int], padded: bool = False) -> ConvGeometry:
    """The geometry of ``conv`` on ``in_shape = (N, H, W)``; ``padded``: the input carries its padding already.

    Raises:
        ValueError: the input is smaller than the kernel's reach.
    """
    if padded:
        before = after = (0, 0)
    elif isinstance(conv.padding, str):  # 'same' gives the odd one after, as torch does; 'valid' is zero
        right, bottom = conv._reversed_padding_repeated_twice[1::2]
        left, top = conv._reversed_padding_repeated_twice[::2]
        before, after = (top, left), (bottom, right)
    else:
        before = after = two(conv.padding)
    sizes = two(conv.kernel_size), two(conv.stride), before, two(conv.dilation)
    return geometry.conv_geometry(in_shape, *sizes, conv.groups, after)


def conv_transpose_geometry(
    conv: nn.ConvTranspose2d, in_shape: tuple[int, int, int], output_padding: tuple[int, int] | None = None
) -> ConvGeometry:
    """The geometry of a transposed convolution on ``in_shape = (N, H, W)``."""
    extra = two(conv.output_padding if output_padding is None else output_padding)
    sizes = two(conv.kernel_size), two(conv.stride), two(conv.padding), two(conv.dilation)
    return geometry.conv_transpose_geometry(in_shape, *sizes, conv.groups, extra)


def geometry_of(
    conv: nn.Conv2d | nn.ConvTranspose2d, in_shape: tuple[int, int, int], padded: bool = False
) -> ConvGeometry:
    """The geometry of either kind of convolution; ``padded`` as in :func:`conv_geometry`."""
    if isinstance(conv, nn.ConvTranspose2d):
        return conv_transpose_geometry(conv, in_shape)
    return conv_geometry(conv, in_shape, padded)
