"""The geometry of a convolution module on an input of a given size."""

from __future__ import annotations

from torch import nn

from ..geometry import ConvGeometry


def conv_geometry(conv: nn.Conv2d, in_shape: tuple[int, int, int], padded: bool = False) -> ConvGeometry:
    """The geometry of ``conv`` on ``in_shape = (N, H, W)``; ``padded``: the input carries its padding already.

    Raises:
        ValueError: the input is smaller than the kernel's reach.
    """
    n, *in_size = in_shape
    if padded:
        before = after = (0, 0)
    elif isinstance(conv.padding, str):  # 'same' gives the odd one after, as torch does; 'valid' is zero
        right, bottom = conv._reversed_padding_repeated_twice[1::2]
        left, top = conv._reversed_padding_repeated_twice[::2]
        before, after = (top, left), (bottom, right)
    else:
        before = after = conv.padding
    out_size = []
    for i in (0, 1):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
        room = in_size[i] + before[i] + after[i] - reach
        if room < 0 and n > 0:
            raise ValueError(
                f"x: expected an input at least as large as the kernel's reach, got {tuple(in_size)}"
            )
        out_size.append(max(room // conv.stride[i] + 1, 0))
    return ConvGeometry(
        n, *in_size, *out_size, *conv.kernel_size, *conv.stride, *before, *conv.dilation, conv.groups, 0
    )


def conv_transpose_geometry(
    conv: nn.ConvTranspose2d, in_shape: tuple[int, int, int], output_padding: tuple[int, int] | None = None
) -> ConvGeometry:
    """The geometry of a transposed convolution on ``in_shape = (N, H, W)``."""
    n, *in_size = in_shape
    extra = conv.output_padding if output_padding is None else output_padding
    out_size = [
        (in_size[i] - 1) * conv.stride[i]
        - 2 * conv.padding[i]
        + conv.dilation[i] * (conv.kernel_size[i] - 1)
        + extra[i]
        + 1
        for i in (0, 1)
    ]
    return ConvGeometry(
        n, *in_size, *out_size, *conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation, conv.groups, 1
    )


def geometry_of(conv: nn.Conv2d | nn.ConvTranspose2d, in_shape: tuple[int, int, int]) -> ConvGeometry:
    """The geometry of either kind of convolution, with zero padding."""
    if isinstance(conv, nn.ConvTranspose2d):
        return conv_transpose_geometry(conv, in_shape)
    return conv_geometry(conv, in_shape)
