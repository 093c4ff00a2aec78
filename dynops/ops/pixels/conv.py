"""Pixel-sparse convolution: compute only the output pixels of a plan.

The mathematics, for output pixel p = (n, y, x) of the plan, taps t and input position q(p, t)
(``geometry.ConvGeometry``)::

    z[p]   = scale * (sum_t W[t] x[q(p, t)] + bias) + shift
    out[p] = activation(gate[p] * z[p] + residual[p])          and base (or 0) where no p is

The gradients, with dy gathered at the plan's pixels::

    dx[q]  = sum over (p, t) with q(p, t) = q of W[t]^T dy[p]
    dW[t]  = sum_p dy[p] x[q(p, t)]^T        db = sum_p dy[p]

Inputs are read wherever the kernel reaches, active or not. ``_conv``, ``_conv_input_grad`` and
``_conv_weight_grad`` are the reference in plain PyTorch; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends, modes
from ...geometry import ConvGeometry, as_geometry
from ...kernels.cpu import pixels as cpp
from ...kernels.cpu import planes as cpp_planes
from ...plans import PixelPlan
from .. import batching, checks
from .. import dense_fallback as auto
from ..epilogue import ACTIVATIONS, apply_epilogue
from ..registry import define
from .rows import (
    gather_pixels,
    gather_rows,
    in_format_of,
    memory_format_of,
    scatter_pixels,
    scatter_planes,
    scatter_rows,
    zero_past_count,
)

# ---------------------------------------------------------------------------------- reference


def dense_input(x: Tensor, source: Tensor | None, g: ConvGeometry) -> Tensor:
    """``x`` as ``[N, C, H, W]``: itself, or packed rows put in their places, zero elsewhere."""
    if source is None:
        return x
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    row = source.reshape(-1).long()
    dense = padded[torch.where(row < 0, x.shape[0], row)]
    return dense.view(*g.in_shape, x.shape[1]).permute(0, 3, 1, 2)


def _margins(g: ConvGeometry) -> tuple[int, int, int, int]:
    """What ``F.pad`` adds around the input (transposed: takes off the full output) of this geometry."""
    reach_h, reach_w = g.dil_h * (g.kernel_h - 1) + 1, g.dil_w * (g.kernel_w - 1) + 1
    small_h, small_w, large_h, large_w = g.out_h, g.out_w, g.in_h, g.in_w
    if g.transposed:
        small_h, small_w, large_h, large_w = g.in_h, g.in_w, g.out_h, g.out_w
    bottom = (small_h - 1) * g.stride_h + reach_h - large_h - g.pad_h
    right = (small_w - 1) * g.stride_w + reach_w - large_w - g.pad_w
    return g.pad_w, right, g.pad_h, bottom


def dense_conv(x: Tensor, weight: Tensor, g: ConvGeometry, bias: Tensor | None = None) -> Tensor:
    """The dense convolution of this geometry, ``[N, O, out_h, out_w]``."""
    stride, dilation = (g.stride_h, g.stride_w), (g.dil_h, g.dil_w)
    left, right, top, bottom = _margins(g)
    if g.transposed:
        full = F.conv_transpose2d(x, weight, None, stride, 0, 0, g.groups, dilation)
        full = F.pad(full, (-left, -right, -top, -bottom))  # may add rows that only the bias reaches
        return full if bias is None else full + bias.view(-1, 1, 1)
    if 0 <= left - right < g.stride_w and 0 <= top - bottom < g.stride_h:  # equal paddings give this size
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, g.groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, g.groups)


def dense_conv_grads(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, wanted: list[bool]):
    """(dx, dW) of :func:`dense_conv`. Not by autograd, which is off where a dispatch mode calls an op."""
    stride, dilation = [g.stride_h, g.stride_w], [g.dil_h, g.dil_w]
    left, right, top, bottom = _margins(g)
    if g.transposed:
        grad = F.pad(grad, (left, right, top, bottom))
    else:
        x = F.pad(x, (left, right, top, bottom))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        [0, 0],
        dilation,
        bool(g.transposed),
        [0, 0],
        g.groups,
        [*wanted, False],
    )
    if wanted[0] and not g.transposed:
        dx = F.pad(dx, (-left, -right, -top, -bottom))
    return dx, dw


def dense_weight_grad(grad: Tensor, x: Tensor, weight_shape: list[int], g: ConvGeometry) -> Tensor:
    """dW of :func:`dense_conv`, summed in the next wider dtype: torch's own sum over the pixels of a map of another shape
    than the layer's was up to 2.3 times as far from the exact one as the layer's."""
    wide = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else torch.float64
    weight = grad.new_empty(weight_shape, dtype=wide)  # its values are not read
    _, dw = dense_conv_grads(grad.to(wide), x.to(wide), weight, g, [False, True])
    return dw.to(grad.dtype).contiguous()


def _conv(
    x: Tensor,  # [N, C, H, W], or [R, C] with source
    weight: Tensor,  # [O, C/groups, kh, kw]; transposed: [C, O/groups, kh, kw]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [P]
    count: Tensor | None,  # [1]
    source: Tensor | None,  # [N, in_h, in_w]: the row of x at each input pixel, or -1
    geometry: list[int],
    activation: str,
    scale: Tensor | None,  # [O]
    shift: Tensor | None,  # [O]
    gate: Tensor | None,  # [P]
    residual: Tensor | None,  # [P, O]
    base: Tensor | None,  # [N, O, out_h, out_w]
    rows: bool,  # whether to return packed rows
) -> Tensor:  # [P, O] if rows else [N, O, out_h, out_w]
    g = as_geometry(geometry)
    dense = dense_conv(dense_input(x, source, g), weight.to(x.dtype), g)
    out = torch.ops.dynops.gather_rows(dense, index, count)
    if bias is not None:
        out = out + bias.to(out.dtype)
    out = apply_epilogue(out, activation, scale, shift, gate, residual)
    if rows:
        return zero_past_count(out, index, count)
    out = torch.ops.dynops.scatter_rows(out, index, count, list(g.out_shape), base)
    return out


def _dense_grad(grad: Tensor, index: Tensor, count: Tensor | None, g: ConvGeometry, rows: bool) -> Tensor:
    """The output gradient as ``[N, O, H, W]``, zero outside the plan."""
    if not rows:
        grad = torch.ops.dynops.gather_rows(grad, index, count)
    return torch.ops.dynops.scatter_rows(grad, index, count, list(g.out_shape), None)


def _conv_input_grad(
    grad: Tensor,  # [P, O] if rows else [N, O, out_h, out_w]
    weight: Tensor,
    index: Tensor,
    count: Tensor | None,
    source: Tensor | None,
    source_rows: int,  # rows of x, where it is packed
    geometry: list[int],
    rows: bool,
) -> Tensor:  # like x
    g = as_geometry(geometry)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    dense = _dense_grad(grad, index, count, g, rows)
    x = grad.new_empty(g.batch, channels, g.in_h, g.in_w)  # its values are not read
    dx, _ = dense_conv_grads(dense, x, weight.to(grad.dtype), g, [True, False])
    if source is None:
        return dx
    out = dx.new_zeros(source_rows + 1, channels)
    row = source.reshape(-1).long()
    out[torch.where(row < 0, source_rows, row)] = dx.permute(0, 2, 3, 1).reshape(-1, channels)
    return out[:-1].clone()


def _conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    count: Tensor | None,
    source: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    rows: bool,
    bias: bool = True,
) -> tuple[Tensor, Tensor]:  # dW as weight_shape; db [O], or [0] where nobody asks for it
    g = as_geometry(geometry)
    dense = _dense_grad(grad, index, count, g, rows)
    dw = dense_weight_grad(dense, dense_input(x, source, g), weight_shape, g)
    return dw, dense.sum((0, 2, 3)) if bias else grad.new_empty(0)


# ---------------------------------------------------------------------- backends, fakes, schema


def _kernels(backend: str, x: Tensor):
    """The kernel module for ``x``, or None for the reference above."""
    name = backends.choose(backend, x.device, x.dtype)
    if name == "cpp":
        return cpp
    if name == "triton":
        from ...kernels.triton import pixels

        return pixels
    return None


def _run_conv(x, weight, bias, index, count, source, geometry, activation, scale, shift, gate, residual, base, rows, backend):  # fmt: skip
    kernels = _kernels(backend, x)
    run = _conv if kernels is None else kernels.conv
    out = run(x, weight, bias, index, count, source, geometry, activation, scale, shift, gate, residual, base, rows)  # fmt: skip
    if rows or source is not None or kernels is cpp:
        return out
    return out.contiguous(memory_format=memory_format_of(x))


def _run_input_grad(grad, weight, index, count, source, source_rows, geometry, rows, backend):
    kernels = _kernels(backend, grad)
    run = _conv_input_grad if kernels is None else kernels.conv_input_grad
    dx = run(grad, weight, index, count, source, source_rows, geometry, rows)
    if source is not None:
        return dx
    return dx.contiguous(memory_format=torch.channels_last if rows else memory_format_of(grad))


def _run_weight_grad(grad, x, index, count, source, weight_shape, geometry, rows, bias, backend):
    kernels = _kernels(backend, grad)
    run = _conv_weight_grad if kernels is None else kernels.conv_weight_grad
    return run(grad, x, index, count, source, weight_shape, geometry, rows, bias)


def _fake_conv(x, weight, bias, index, count, source, geometry, activation, scale, shift, gate, residual, base, rows, backend):  # fmt: skip
    g = as_geometry(geometry)
    channels = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
    if rows:
        return x.new_empty(index.shape[0], channels)
    out = x.new_empty(g.batch, channels, g.out_h, g.out_w)
    return out.contiguous(memory_format=torch.channels_last if source is not None else memory_format_of(x))


def _fake_input_grad(grad, weight, index, count, source, source_rows, geometry, rows, backend):
    g = as_geometry(geometry)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    if source is not None:
        return grad.new_empty(source_rows, channels)
    out = grad.new_empty(g.batch, channels, g.in_h, g.in_w)
    return out.contiguous(memory_format=torch.channels_last if rows else memory_format_of(grad))


def _fake_weight_grad(grad, x, index, count, source, weight_shape, geometry, rows, bias, backend):
    g = as_geometry(geometry)
    channels = weight_shape[1] * g.groups if g.transposed else weight_shape[0]
    return grad.new_empty(weight_shape), grad.new_empty(channels if bias else 0)


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _input_grad_setup(ctx, inputs, output):
    grad, weight, index, count, source, _, ctx.geometry, ctx.rows, ctx.backend = inputs
    ctx.save_for_backward(grad, weight, index, count, source)


def _input_grad_backward(ctx, dx):
    grad, weight, *plan = ctx.saved_tensors
    need_grad, need_w = ctx.needs_input_grad[:2]
    options = (ctx.geometry, "", None, None, None, None, None, ctx.rows, ctx.backend)
    d_grad = _convolution(dx, weight, None, *plan, *options) if need_grad else None
    if need_w:
        dw, _ = _weight_grad(grad, dx, *plan, weight.shape, ctx.geometry, ctx.rows, False, ctx.backend)
    return d_grad, dw if need_w else None, *[None] * 7


def _weight_grad_setup(ctx, inputs, output):
    grad, x, index, count, source, _, ctx.geometry, ctx.rows, ctx.bias, ctx.backend = inputs
    ctx.save_for_backward(grad, x, index, count, source)


def _weight_grad_backward(ctx, dw, db):
    grad, x, index, count, source = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    plan, d_grad, dx = (index, count, source), None, None
    if need_grad:
        options = (ctx.geometry, "", None, None, None, None, None, ctx.rows, ctx.backend)
        d_grad = _convolution(x, dw, db if ctx.bias else None, *plan, *options)
    if need_x:
        source_rows = 0 if source is None else x.shape[0]
        dx = _input_grad(grad, dw, *plan, source_rows, ctx.geometry, ctx.rows, ctx.backend)
    return d_grad, dx, *[None] * 8


_input_grad = define(
    "pixel_conv_input_grad(Tensor grad, Tensor weight, Tensor index, Tensor? count, Tensor? source, "
    "SymInt source_rows, SymInt[] geometry, bool rows, str backend) -> Tensor",
    _run_input_grad,
    _fake_input_grad,
    _input_grad_setup,
    _input_grad_backward,
    terms="grad weight",
    vmap=batching.pixel_conv_input_grad,
)
_weight_grad = define(
    "pixel_conv_weight_grad(Tensor grad, Tensor x, Tensor index, Tensor? count, Tensor? source, "
    "SymInt[] weight_shape, SymInt[] geometry, bool rows, bool bias, str backend) -> (Tensor, Tensor)",
    _run_weight_grad,
    _fake_weight_grad,
    _weight_grad_setup,
    _weight_grad_backward,
    terms="grad x; grad",
    vmap=batching.pixel_conv_weight_grad,
)

# ----------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    x, weight, bias, index, count, source, geometry, activation, scale, shift, gate, residual, base, rows, backend = inputs  # fmt: skip
    epilogue = (scale, shift, gate, residual)
    if activation or any(t is not None and t.requires_grad for t in epilogue):
        raise RuntimeError(
            "dynops::pixel_conv: the fused activation, scale, shift, gate and residual have no gradient; "
            "dynops.ops.sparse_conv2d composes them from ops that have one"
        )
    if any(t is not None for t in epilogue):
        raise RuntimeError("dynops::pixel_conv: a fused epilogue cannot be differentiated")
    ctx.save_for_backward(x, weight, index, count, source)
    ctx.geometry, ctx.rows, ctx.backend = geometry, rows, backend


def _backward(ctx, grad):
    x, weight, index, count, source = ctx.saved_tensors
    dx = dw = db = dbase = None
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 12))
    if need_x:
        source_rows = 0 if source is None else x.shape[0]
        dx = _input_grad(grad, weight, index, count, source, source_rows, ctx.geometry, ctx.rows, ctx.backend)
    if need_w:
        dw, db = _weight_grad(
            grad, x, index, count, source, weight.shape, ctx.geometry, ctx.rows, need_b, ctx.backend
        )
    elif need_b:
        rows = grad if ctx.rows else gather_rows(grad, index, count)
        db = zero_past_count(rows, index, count).sum(0)
    if need_base:
        zeros = grad.new_zeros(index.shape[0], grad.shape[1])
        dbase = scatter_rows(zeros, index, count, ctx.geometry[:1] + ctx.geometry[3:5], grad)
    return dx, dw, (db if need_b else None), *[None] * 9, dbase, None, None


_convolution = define(
    "pixel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? source, "
    "SymInt[] geometry, str activation, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, "
    "Tensor? base, bool rows, str backend) -> Tensor",
    _run_conv,
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias, base",
    vmap=batching.pixel_conv,
)

# ------------------------------------------------------------------------------ public functions


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution computed at the pixels of ``plan`` only.

    Equals ``where(mask, activation(gate * (scale * conv2d(x, …) + shift) + residual), base or 0)``.

    Args:
        x: ``[N, C, H, W]``, either memory format, or a strided view; the output is channels_last where ``x`` is, else
            NCHW. Not masked: every input pixel may be read. channels_last is read in place, also where it is nearly full;
            of NCHW on a CPU the pixels that are needed are gathered, or, where the layer is depthwise or has few channels
            on a side, the planes are read in place.
        weight: ``[O, C/groups, kh, kw]``, of ``x``'s dtype.
        bias: ``[O]`` or None.
        plan: a :class:`PixelPlan` at the output resolution.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``.
        activation: None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "relu2".
        scale, shift: ``[O]``, an affine map of each output channel (a folded norm).
        gate: ``[N, H, W]``, ``[N, 1, H, W]`` or packed ``[P]``, a multiplier for each pixel.
        residual: ``[N, O, H, W]`` or packed ``[P, O]``, added before the activation.
        base: ``[N, O, H, W]``, the output where nothing is computed; zero if None.
        backend: "cpp", "triton" or "reference"; None takes the fastest. That is the dense layer and a mask where
            a compact plan has a higher density than the break-even that was measured for such a layer on this
            architecture of GPU, or where a CPU, a channels_last map and no gradient make the dense layer the faster one
            by the cost model of ``ops.auto``; where neither is, and under torch.compile, where it holds every pixel.

    Returns:
        ``[N, O, H, W]``, dtype of ``x``. Every floating argument gets its gradient, where it exists
        at an active pixel (``base``: at an inactive one).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: DynConv (CVPR 2020), SBNet (CVPR 2018), PerforatedCNNs (NIPS 2016).
    """
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, stride, padding, dilation, groups, padding_mode)  # fmt: skip
    epilogue = checks.epilogue(plan, x, weight.shape[0], activation, scale, shift, gate, residual, base)
    if backend is None and _dense_wins(plan, x, weight, g, epilogue):
        return _masked_dense(x, weight, bias, plan, g, epilogue, base)
    return _pixel_conv(x, weight, bias, plan, None, g, epilogue, base, False, backend)


def sparse_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Transposed 2-D convolution computed at the pixels of ``plan`` only.

    As :func:`sparse_conv2d`, with ``weight`` ``[C, O/groups, kh, kw]`` and the arguments of
    ``nn.ConvTranspose2d``; ``plan`` is at the output resolution.
    """
    x, weight, bias, g = checks.conv_transpose_arguments(x, weight, bias, plan, stride, padding, output_padding, groups, dilation)  # fmt: skip
    epilogue = checks.epilogue(plan, x, weight.shape[1] * groups, activation, scale, shift, gate, residual, base)  # fmt: skip
    if backend is None and _dense_wins(plan, x, weight, g, epilogue):
        return _masked_dense(x, weight, bias, plan, g, epilogue, base)
    return _pixel_conv(x, weight, bias, plan, None, g, epilogue, base, False, backend)


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_plan: PixelPlan | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolution from one plan's rows to another's.

    Args:
        x: packed rows ``[in_plan.num_rows, C]``, or ``[N, C, H, W]`` where ``in_plan`` is None.
        in_plan: the pixels that ``x`` holds; the convolution reads zero at all others.
        plan: the output pixels, at the output resolution.
        residual: packed ``[P, O]`` or ``[N, O, H, W]``.
        weight, bias, and the rest: as in :func:`sparse_conv2d`.

    Returns:
        ``[plan.num_rows, O]``; in the capacity form rows past the count are zero.
    """
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, stride, padding, dilation, groups, "zeros", in_plan)  # fmt: skip
    epilogue = checks.epilogue(plan, x, weight.shape[0], activation, scale, shift, gate, residual, None)
    return _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, None, True, backend)


def packed_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_plan: PixelPlan | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The transposed convolution from one plan's rows to another's; see :func:`packed_conv2d`."""
    x, weight, bias, g = checks.conv_transpose_arguments(x, weight, bias, plan, stride, padding, output_padding, groups, dilation, in_plan)  # fmt: skip
    epilogue = checks.epilogue(plan, x, weight.shape[1] * groups, activation, scale, shift, gate, residual, None)  # fmt: skip
    return _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, None, True, backend)


# From this many pixels on, the dense layer is the faster way to compute all of them. Below, it spends as much
# time on bringing its weight into the order of its kernel, in every call, as ours on some 50 pixels.
_DENSE_PIXELS = 1024


def _dense_wins(plan: PixelPlan, x: Tensor, weight: Tensor, g: ConvGeometry, epilogue) -> bool:
    measured = auto.dense_is_faster(plan, x, weight, g)
    if measured is not None:
        return measured
    if plan.count is not None or plan.num_pixels < _DENSE_PIXELS or not checks.epilogue_is_plain(epilogue):
        return False
    if beats_dense(x, weight, g):
        return False
    planes = memory_format_of(x) == torch.contiguous_format
    on_cpu = modes.plain(x, weight) and _kernels("", x) is cpp
    if plan.is_full:  # where a gradient is needed, its dense form is the faster one too
        return not (on_cpu and planes and cpp_planes.may_take_planes(weight.shape, g))
    # with a gradient the plan's own pixels are computed: backward they save more than the dense layer does
    return on_cpu and not planes and not g.transposed and auto.cpu_dense_is_faster(plan.num_rows, weight, g)


def beats_dense(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether all of this convolution is faster than the dense layer: Winograd's on a CPU.

    On maps thinner than 5 pixels too many of its tiles hang over the edge.
    """
    winograd = _kernels("", x) is cpp and cpp.takes_winograd(g, weight.shape, x.dtype)
    return winograd and min(g.out_h, g.out_w) >= 5


def dense_layer(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, activation: str) -> Tensor:
    """The dense layer itself, for a plan that holds every pixel."""
    out = dense_conv(x, weight.to(x.dtype), g, None if bias is None else bias.to(x.dtype))
    # a channels_last weight turns an NCHW input's output into channels_last
    return in_format_of(ACTIVATIONS[activation](out), x)


def _masked_dense(x, weight, bias, plan, g, epilogue, base) -> Tensor:
    """The op by the dense layer: all pixels are computed, those of the plan kept."""
    if plan.is_full and checks.epilogue_is_plain(epilogue):
        return dense_layer(x, weight, bias, g, epilogue[0])
    out = auto.finish_dense(
        dense_layer(x, weight, bias, g, ""), plan, epilogue, None if base is None else base.to(x.dtype)
    )
    return in_format_of(out, x)


def _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, base, rows, backend) -> Tensor:
    """Runs the op: with its gradient where one is needed, else straight to the kernel."""
    # a transposed one has its weight the other way round
    same_rows = rows and in_plan is plan and g.is_pointwise and not g.transposed and len(plan) > 0
    if same_rows:  # row i reads row i: a 1x1 convolution of a map [1, C, 1, P]
        plan_of_rows = plan.as_rows()
        g, source = plan_of_rows.pointwise(g.groups), None
        index, count = plan_of_rows.index, plan_of_rows.count
    else:
        index, count = plan.index, plan.count
        source = None if in_plan is None else in_plan.inverse()
    activation, scale, shift, gate, residual = epilogue
    backend = backend or ""
    if base is not None:
        base = base.to(x.dtype)  # differs under autocast only
    tensors = (x, weight, bias, scale, shift, gate, residual, base)
    # which takes rows [P, C] for such a map too
    direct = modes.plain(*tensors) and _kernels(backend, x) is cpp
    if residual is not None and residual.dim() == 4:
        # read where it lies: SBNet's bottleneck of 400 x 700 x 256 takes 58.6 ms at 50 % instead of 62.9
        in_place = direct and not same_rows and residual.is_contiguous(memory_format=torch.channels_last)
        residual = residual if in_place else gather_rows(residual, plan.index, plan.count)
    if direct:
        return cpp.conv(x, weight, bias, index, count, source, g, activation, scale, shift, gate, residual, base, rows, None if same_rows else plan.derived)  # fmt: skip
    if same_rows:
        x = x.t()[None, :, None]
    if modes.differentiated(*tensors) and not checks.epilogue_is_empty(epilogue):
        weight = weight.to(x.dtype)
        out = _convolution(x, weight, bias, index, count, source, g, "", None, None, None, None, None, True, backend)  # fmt: skip
        out = apply_epilogue(out, activation, scale, shift, gate, residual)
        if rows:
            return zero_past_count(out, index, count)
        scatter = scatter_planes if memory_format_of(x) == torch.contiguous_format else scatter_rows
        return scatter(out, index, count, list(plan.shape), base)
    return _convolution(x, weight, bias, index, count, source, g, activation, scale, shift, gate, residual, base, rows, backend)  # fmt: skip


__all__ = [
    "gather_pixels",
    "packed_conv2d",
    "packed_conv_transpose2d",
    "scatter_pixels",
    "sparse_conv2d",
    "sparse_conv_transpose2d",
]
