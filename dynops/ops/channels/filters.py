"""Local convolution: a filter of its own for each pixel, shared by the channels of a group.

The mathematics, for output pixel p, taps t, input position q(p, t) (``geometry.ConvGeometry``, at pixel
p // upsample) and g(c) the group of channel c::

    out[n, c, p] = sum_t kernels[n, g(c) * T + t, p] x[n, c, q(p, t)]

The gradients::

    dx[n, c, q]              = sum over (p, t) with q(p, t) = q of kernels[n, g(c) * T + t, p] dy[n, c, p]
    dkernels[n, g * T + t, p] = sum over c in g of dy[n, c, p] x[n, c, q(p, t)]

``_conv``, ``_conv_input_grad`` and ``_conv_kernel_grad`` are the reference in plain PyTorch, tap by tap; the
kernels have the same signatures. The geometry is that of the output before it is upsampled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry, as_geometry, is_int, pair
from ...kernels import cpu
from ...kernels.layout import empty_map
from .. import batching, checks
from ..dispatch import Kernels
from ..registry import define, save_inputs, saved_inputs

# ---------------------------------------------------------------------------------- reference


def _wide(x: Tensor) -> Tensor:
    """The dtype of sums: half precision becomes float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _taps(padded: Tensor, g: ConvGeometry) -> Iterator[tuple[int, Tensor]]:
    """Returns for each tap the view ``[N, C, out_h, out_w]`` of the padded input that the outputs read."""
    for t in range(g.taps):
        y, x = t // g.kernel_w * g.dil_h, t % g.kernel_w * g.dil_w
        rows = padded[:, :, y : y + (g.out_h - 1) * g.stride_h + 1 : g.stride_h]
        yield t, rows[..., x : x + (g.out_w - 1) * g.stride_w + 1 : g.stride_w]


def _pads(g: ConvGeometry) -> tuple[int, int, int, int]:
    """The margins that the taps read; none is negative: a stride may leave some of the input over."""
    return tuple(max(margin, 0) for margin in g.margins)


def _padded(x: Tensor, g: ConvGeometry) -> Tensor:
    return F.pad(x, _pads(g))


def _upsampled(x: Tensor, scale: int) -> Tensor:
    return x if scale == 1 else x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _summed(x: Tensor, scale: int) -> Tensor:
    """The sums over each ``scale x scale`` pixels: the gradient of :func:`_upsampled`."""
    return x if scale == 1 else x.unflatten(3, (-1, scale)).sum(4).unflatten(2, (-1, scale)).sum(3)


def _conv(
    x: Tensor,  # [N, C, H, W]
    kernels: Tensor,  # [N, groups * T, out_h * upsample, out_w * upsample]
    geometry: list[int],
    upsample: int,
) -> Tensor:  # [N, C, out_h * upsample, out_w * upsample]
    g = as_geometry(geometry)
    filters = _wide(kernels).unflatten(1, (g.groups, 1, g.taps))
    out = 0
    for t, patch in _taps(_padded(_wide(x), g), g):
        out = out + filters[:, :, :, t] * _upsampled(patch, upsample).unflatten(1, (g.groups, -1))
    return out.flatten(1, 2).to(x.dtype)


def _conv_input_grad(
    grad: Tensor,  # [N, C, out_h * upsample, out_w * upsample]
    kernels: Tensor,
    geometry: list[int],
    upsample: int,
) -> Tensor:  # [N, C, H, W]
    g = as_geometry(geometry)
    filters = _wide(kernels).unflatten(1, (g.groups, 1, g.taps))
    dy = _wide(grad).unflatten(1, (g.groups, -1))
    padded = _padded(dy.new_zeros(g.batch, grad.shape[1], g.in_h, g.in_w), g)
    for t, patch in _taps(padded, g):
        patch += _summed((filters[:, :, :, t] * dy).flatten(1, 2), upsample)
    inside = padded[:, :, g.pad_h : g.pad_h + g.in_h, g.pad_w : g.pad_w + g.in_w]
    return inside.to(grad.dtype)


def _conv_kernel_grad(
    grad: Tensor,
    x: Tensor,
    geometry: list[int],
    upsample: int,
) -> Tensor:  # [N, groups * T, out_h * upsample, out_w * upsample]
    g = as_geometry(geometry)
    dy = _wide(grad).unflatten(1, (g.groups, -1))
    sums = [
        (dy * _upsampled(patch, upsample).unflatten(1, (g.groups, -1))).sum(2)
        for _, patch in _taps(_padded(_wide(x), g), g)
    ]
    return torch.stack(sums, 2).flatten(1, 2).to(grad.dtype)


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.channel_filters, "channel_filters")


def _fake_conv(x, kernels, geometry, upsample, backend):
    return empty_map(x, (*x.shape[:2], *kernels.shape[2:]))


def _fake_input_grad(grad, kernels, geometry, upsample, backend):
    g = as_geometry(geometry)
    return empty_map(grad, (*grad.shape[:2], g.in_h, g.in_w))


def _fake_kernel_grad(grad, x, geometry, upsample, backend):
    g = as_geometry(geometry)
    return empty_map(grad, (grad.shape[0], g.groups * g.taps, *grad.shape[2:]))


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _input_grad_backward(ctx, dx):
    grad, kernels, *options = saved_inputs(ctx)
    need_grad, need_kernels = ctx.needs_input_grad[:2]
    d_grad = _convolution(dx, kernels, *options) if need_grad else None
    return d_grad, (_kernel_grad(grad, dx, *options) if need_kernels else None), None, None, None


def _kernel_grad_backward(ctx, d_kernels):
    grad, x, *options = saved_inputs(ctx)
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = _convolution(x, d_kernels, *options) if need_grad else None
    return d_grad, (_input_grad(grad, d_kernels, *options) if need_x else None), None, None, None


def _backward(ctx, grad):
    x, kernels, *options = saved_inputs(ctx)
    need_x, need_kernels = ctx.needs_input_grad[:2]
    dx = _input_grad(grad, kernels, *options) if need_x else None
    return dx, (_kernel_grad(grad, x, *options) if need_kernels else None), None, None, None


_input_grad = define(
    "local_conv_input_grad(Tensor grad, Tensor kernels, SymInt[] geometry, SymInt upsample, str backend) -> Tensor",
    _KERNELS.run("conv_input_grad", _conv_input_grad, like_first=True),
    _fake_input_grad,
    save_inputs,
    _input_grad_backward,
    terms="grad kernels",
    vmap=batching.samples("grad", "kernels"),
)
_kernel_grad = define(
    "local_conv_kernel_grad(Tensor grad, Tensor x, SymInt[] geometry, SymInt upsample, str backend) -> Tensor",
    _KERNELS.run("conv_kernel_grad", _conv_kernel_grad, like_first=True),
    _fake_kernel_grad,
    save_inputs,
    _kernel_grad_backward,
    terms="grad x",
    vmap=batching.samples("grad", "x"),
)


_convolution = define(
    "local_conv(Tensor x, Tensor kernels, SymInt[] geometry, SymInt upsample, str backend) -> Tensor",
    _KERNELS.run("conv", _conv, like_first=True),
    _fake_conv,
    save_inputs,
    _backward,
    terms="x kernels",
    vmap=batching.samples("x", "kernels"),
)

# ------------------------------------------------------------------------------ public functions


def local_conv2d(
    x: Tensor,
    kernels: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    upsample: int = 1,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution with filters of its own at each output pixel: one filter for the channels of a group.

    Equals ``(k * u).sum(3)`` with ``u = unfold(x, kernel_size, …)`` as ``[N, groups, C/groups, T, out_H, out_W]`` and
    ``k = kernels`` as ``[N, groups, 1, T, out_H, out_W]``. Nothing is unfolded. Involution and dynamic
    filters are this with their own kernels, CARAFE with ``upsample`` and kernels that sum to one.

    Args:
        x: ``[N, C, H, W]``, either memory format; the output has the same one. channels_last is the fast one,
            for the kernels too: another is copied.
        kernels: ``[N, groups * kh * kw, out_H, out_W]``, of ``x``'s dtype; tap ``(r, s)`` of group g is channel
            ``(g * kh + r) * kw + s``.
        kernel_size: (kh, kw).
        stride, padding, dilation, padding_mode: as in ``nn.Conv2d``.
        groups: how many filters a pixel has; each is applied to C/groups adjacent channels.
        upsample: s makes the output s times as high and wide; output pixel ``(y, x)`` reads the input pixels of
            ``(y // s, x // s)`` in an output without it.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[N, C, out_H, out_W]``, dtype of ``x``. ``x`` and ``kernels`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: dynamic filter networks (NIPS 2016), CARAFE (ICCV 2019), involution (CVPR 2021).
    """
    checks.tensor(x, "x", 4, "[N, C, H, W]")
    checks.tensor(kernels, "kernels", 4, "[N, groups * kh * kw, out_H, out_W]")
    checks.floating(x)
    if (dtype := modes.autocast_dtype(x)) is not None:
        x, kernels = x.to(dtype), kernels.to(dtype)
    checks.same(kernels, "kernels", x)
    if not is_int(upsample, 1):
        raise ValueError(f"upsample: expected an int >= 1, got {upsample!r}")
    if not is_int(groups, 1) or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups!r}")
    kernel = pair(kernel_size, "kernel_size", 1)
    options = stride, padding, dilation, groups, padding_mode
    g, fill = checks.conv_geometry(x.shape, (x.shape[1], x.shape[1] // groups, *kernel), options)
    expected = (g.batch, groups * g.taps, g.out_h * upsample, g.out_w * upsample)
    checks.shaped(kernels, "kernels", expected, f", as kernel_size {kernel} with groups={groups} has it")
    x = x if fill is None else F.pad(x, fill, mode=padding_mode)
    return _convolution(x, kernels, g, upsample, backend or "")


__all__ = ["local_conv2d"]
