"""Convolution whose output is computed at selected (channel, pixel) positions only.

The mathematics, for sample n, output channel o and pixel p, taps t and input position q(p, t)
(``geometry.ConvGeometry``)::

    out[n, o, p] = sum_(t, i) W[o, i, t] x[n, i, q(p, t)] + bias[o] + partial[n, o, p]   where mask[n, o, p]
    out[n, o, p] = partial[n, o, p] (or 0)                                               elsewhere

The gradients are those of the convolution with ``where(mask, dy, 0)``, and ``d partial = dy``. ``_conv`` is
the reference in plain PyTorch; the kernel has the same signature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry, as_geometry, is_int
from ...kernels import cpu
from ...kernels.layout import empty_map, in_format_of, memory_format_of
from ...plans.masks import check_mask_dtype
from .. import batching, checks
from ..dense_conv import dense_conv, dense_conv_grads
from ..dense_fallback import break_even
from ..dispatch import Kernels, triton_module
from ..epilogue import NOTHING
from ..registry import define

# ---------------------------------------------------------------------------------- reference


def _inputs(x: Tensor, begin: int, weight: Tensor, geometry: list[int]) -> Tensor:
    """The channels of ``x`` that the convolution reads, a view."""
    return x.narrow(1, begin, weight.shape[1] * as_geometry(geometry).groups)


def _conv(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, I/groups, kh, kw]
    bias: Tensor | None,  # [O]
    mask: Tensor,  # bool [N, O, out_h, out_w]
    partial: Tensor | None,  # [N, O, out_h, out_w]
    begin: int,  # x's channels begin to begin + I are read
    geometry: list[int],
) -> Tensor:  # [N, O, out_h, out_w]
    out = dense_conv(_inputs(x, begin, weight, geometry), weight, as_geometry(geometry), bias)
    return _selected(out, mask, partial)


def _selected(out: Tensor, mask: Tensor, partial: Tensor | None) -> Tensor:
    if partial is None:
        return torch.where(mask, out, 0)
    return torch.where(mask, out + partial, partial)


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.channel_outputs, "pixels")
# On a GPU the pixels with a selected output are counted, which waits for it, from this many MACs of the dense
# convolution on: 100 us at the peak of an H100's datasheet in half precision.
_COUNTED_MACS = 5e10
# MACs in the time of a byte, by datasheets of A100, H100 and B200 in half precision: 78 to 148.
_BYTE_MACS = 150


def _run_conv(x, weight, bias, mask, partial, begin, geometry, backend):
    run, kernels = _conv, _KERNELS.of(backend, x)
    if kernels is cpu.channel_outputs:
        if backend or kernels.wins(weight, mask, as_geometry(geometry)):
            run = kernels.conv  # unnamed, not where the dense convolution is faster
    elif kernels is not None and (backend or _few_pixels(x, weight, mask, as_geometry(geometry))):
        run = _conv_at_pixels
    out = run(x, weight, bias, mask, partial, begin, geometry)
    return out.contiguous(memory_format=memory_format_of(x))


def _conv_at_pixels(x, weight, bias, mask, partial, begin, geometry) -> Tensor:
    """``_conv`` by the kernel of pixel-sparse convolutions, at the pixels with any selected output; waits for nothing."""
    some = mask.any(1)
    index, count = torch.ops.dynops.mask_to_index_capacity(some, some.numel())
    read = _inputs(x, begin, weight, geometry)
    kernels = triton_module("pixels")
    out = kernels.conv(read, weight, bias, index, count, None, geometry, NOTHING, None, False)
    return _selected(out, mask, partial)


def _few_pixels(x: Tensor, weight: Tensor, mask: Tensor, g: ConvGeometry) -> bool:
    """True if so few pixels have a selected output that a GPU should compute these alone.

    By the break-even density of pixel-sparse convolutions where that was measured. Else by counting, as no GPU was
    measured: at most half of the pixels for which the MACs saved outweigh the bytes more that move (the mask once more,
    and the zeros of the map). Never while a CUDA graph is captured, nor in small layers: counting waits for the GPU.
    """
    channels, pixels = (weight.shape[1] * g.groups, weight.shape[0]), g.batch * g.out_h * g.out_w
    macs = g.macs(pixels, *channels)
    if not x.is_cuda or macs < _COUNTED_MACS or torch.cuda.is_current_stream_capturing():
        return False
    share = break_even("pixels", x.device, x.dtype, weight, g)
    if share is None:
        share = counted_share(macs, mask.numel() * (1 + x.element_size()))
    return int(mask.any(1).sum()) < share * pixels


def counted_share(macs: float, more_bytes: int) -> float:
    """Half of the share of ``macs`` that may be computed before the bytes cost more than the rest."""
    return max(0.0, 1 - more_bytes * _BYTE_MACS / macs) / 2


def _fake_conv(x, weight, bias, mask, partial, begin, geometry, backend):
    return empty_map(x, mask.shape)


def _setup_context(ctx, inputs, output):
    x, weight, _, mask, _, begin, geometry, _ = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.begin, ctx.geometry = begin, geometry


def _backward(ctx, grad):
    x, weight, mask = ctx.saved_tensors
    need_x, need_w, need_b, need_partial = (ctx.needs_input_grad[i] for i in (0, 1, 2, 4))
    dx = dw = db = None
    if need_x or need_w or need_b:
        live = grad.masked_fill(~mask, 0)
        db = live.sum((0, 2, 3)) if need_b else None
    if need_x or need_w:
        read = _inputs(x, ctx.begin, weight, ctx.geometry)
        dx, dw = dense_conv_grads(live, read, weight, as_geometry(ctx.geometry), [need_x, need_w])
    if need_x:
        after = x.shape[1] - ctx.begin - read.shape[1]
        dx = in_format_of(F.pad(dx, (0, 0, 0, 0, ctx.begin, after)), x)
    return dx, dw, db, None, (grad if need_partial else None), None, None, None


_convolution = define(
    "masked_output_conv(Tensor x, Tensor weight, Tensor? bias, Tensor mask, Tensor? partial, SymInt begin, "
    "SymInt[] geometry, str backend) -> Tensor",
    _KERNELS.serve(_run_conv),
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias, partial",
    vmap=batching.samples("x", "mask", "partial"),
)

# ------------------------------------------------------------------------------ public functions


def masked_output_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    partial: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    in_channels: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution that computes the selected outputs only: any pixels of any channels.

    Equals ``where(mask, conv2d(x, weight, bias, …) + (partial or 0), partial or 0)``. On a CPU each selected
    output is a dot product of its patch and its channel's weights; where so much of the mask is selected that
    the dense convolution is faster, that runs. On a GPU the dense convolution and a mask run. Named, "triton" computes
    every output of the pixels with a selected one; so do layers of 5e10 MACs and more in which these are few. Such a
    layer waits for the GPU to count them, but not while a CUDA graph is captured.

    Args:
        x: ``[N, C, H, W]``, either memory format (channels_last is the fast one: another is copied); the output
            has the same one.
        weight: ``[O, C/groups, kh, kw]``, of ``x``'s dtype.
        mask: ``[N, O, out_H, out_W]``, bool, integer or floating, nonzero = computed. It has no gradient.
        partial: ``[N, O, out_H, out_W]``: the convolution is added to it, and it is the output elsewhere; zero if
            None.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``.
        in_channels: (begin, end): only these channels of ``x`` are read, in place; the weight is then
            ``[O, (end - begin)/groups, kh, kw]``.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[N, O, out_H, out_W]``, dtype of ``x``. ``x``, ``weight``, ``bias`` and ``partial`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Paper: CGNet (NeurIPS 2019).
    """
    checks.tensor(x, "x", 4, "[N, C, H, W]")
    x, weight, bias = checks.conv_tensors(x, weight, bias)
    begin, end = _channel_range(in_channels, x.shape[1])
    in_shape = (x.shape[0], end - begin, *x.shape[2:])
    options = stride, padding, dilation, groups, padding_mode
    g, fill = checks.conv_geometry(in_shape, weight.shape, options, bias)
    out_shape = (g.batch, weight.shape[0], g.out_h, g.out_w)
    mask = _output_mask(mask, out_shape, x)
    partial = _partial(partial, out_shape, x)
    if fill is not None:
        x, begin = F.pad(x[:, begin:end], fill, mode=padding_mode), 0
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return _convolution(x, weight, bias, mask, partial, begin, g, backend or "")


def _channel_range(in_channels, channels: int) -> tuple[int, int]:
    if in_channels is None:
        return 0, channels
    pair = isinstance(in_channels, (tuple, list)) and len(in_channels) == 2
    if (
        not pair
        or not all(is_int(c, 0) for c in in_channels)
        or not in_channels[0] < in_channels[1] <= channels
    ):
        raise ValueError(
            f"in_channels: expected (begin, end) with 0 <= begin < end <= {channels}, got {in_channels!r}"
        )
    return in_channels[0], in_channels[1]


def _output_mask(mask, out_shape: tuple[int, ...], x: Tensor) -> Tensor:
    check_mask_dtype(mask, "mask", "[N, O, out_H, out_W]")
    checks.shaped(mask, "mask", out_shape, what="the output's shape ")
    checks.same(mask, "mask", x, dtype=False)
    return mask if mask.dtype == torch.bool else mask.detach() != 0


def _partial(partial, out_shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    if partial is None:
        return None
    checks.tensor(partial, "partial", 4, "[N, O, out_H, out_W]")
    checks.shaped(partial, "partial", out_shape, what="the output's shape ")
    checks.same(partial, "partial", x, dtype=modes.autocast_dtype(x) is None)
    return partial.to(x.dtype)  # differs under autocast only


__all__ = ["masked_output_conv2d"]
