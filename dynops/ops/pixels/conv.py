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
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry, as_geometry
from ...kernels import cpu
from ...kernels.layout import empty_map, memory_format_of
from ...plans import PixelPlan
from .. import batching, checks, dense_fallback
from ..dense_conv import dense_bias_grad, dense_conv, dense_conv_grads, dense_weight_grad
from ..dispatch import Kernels
from ..epilogue import NOTHING, Epilogue, apply_epilogue
from ..registry import define, save_inputs, saved_inputs
from .rows import gather_rows, scatter_planes, scatter_rows, zero_past_count

# ---------------------------------------------------------------------------------- reference


def _dense_input(x: Tensor, source: Tensor | None, g: ConvGeometry) -> Tensor:
    """``x`` as ``[N, C, H, W]``: itself, or packed rows put in their places, zero elsewhere."""
    if source is None:
        return x
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    row = source.reshape(-1).long()
    dense = padded[torch.where(row < 0, x.shape[0], row)]
    return dense.view(*g.in_shape, x.shape[1]).permute(0, 3, 1, 2)


def _dense_grad(
    grad: Tensor, index: Tensor, count: Tensor | None, g: ConvGeometry, from_rows: bool
) -> Tensor:
    """The output gradient as ``[N, O, H, W]``, zero outside the plan."""
    if not from_rows:
        grad = torch.ops.dynops.gather_rows(grad, index, count)
    return torch.ops.dynops.scatter_rows(grad, index, count, list(g.out_shape), None)


def _conv(
    x: Tensor,  # [N, C, H, W], or [R, C] with source
    weight: Tensor,  # [O, C/groups, kh, kw]; transposed: [C, O/groups, kh, kw]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [P]
    count: Tensor | None,  # [1]
    source: Tensor | None,  # [N, in_h, in_w]: the row of x at each input pixel, or -1
    geometry: list[int],
    epilogue: Epilogue,
    base: Tensor | None,  # [N, O, out_h, out_w]
    to_rows: bool,  # whether to return packed rows
) -> Tensor:  # [P, O] if to_rows else [N, O, out_h, out_w]
    g = as_geometry(geometry)
    dense = dense_conv(_dense_input(x, source, g), weight.to(x.dtype), g)
    out = torch.ops.dynops.gather_rows(dense, index, count)
    if bias is not None:
        out = out + bias.to(out.dtype)
    out = apply_epilogue(out, *epilogue)
    if to_rows:
        return zero_past_count(out, index, count)
    return torch.ops.dynops.scatter_rows(out, index, count, list(g.out_shape), base)


def _conv_input_grad(
    grad: Tensor,  # [P, O] if from_rows else [N, O, out_h, out_w]
    weight: Tensor,
    index: Tensor,
    count: Tensor | None,
    source: Tensor | None,
    source_rows: int,  # rows of x, where it is packed
    geometry: list[int],
    from_rows: bool,
) -> Tensor:  # like x
    g = as_geometry(geometry)
    dense = _dense_grad(grad, index, count, g, from_rows)
    x = grad.new_empty(g.batch, _in_channels(weight.shape, g), g.in_h, g.in_w)  # its values are not read
    dx, _ = dense_conv_grads(dense, x, weight.to(grad.dtype), g, [True, False])
    if source is None:
        return dx
    out = dx.new_zeros(source_rows + 1, x.shape[1])
    row = source.reshape(-1).long()
    out[torch.where(row < 0, source_rows, row)] = dx.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return out[:-1].clone()


def _conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    count: Tensor | None,
    source: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    from_rows: bool,
    bias: bool = True,
) -> tuple[Tensor, Tensor]:  # dW as weight_shape; db [O], or [0] where nobody asks for it
    g = as_geometry(geometry)
    dense = _dense_grad(grad, index, count, g, from_rows)
    dw = dense_weight_grad(dense, _dense_input(x, source, g), weight_shape, g)
    return dw, dense_bias_grad(dense) if bias else grad.new_empty(0)


def _in_channels(weight_shape, g: ConvGeometry) -> int:
    return weight_shape[0] if g.transposed else weight_shape[1] * g.groups


def _out_channels(weight_shape, g: ConvGeometry) -> int:
    return weight_shape[1] * g.groups if g.transposed else weight_shape[0]


# ---------------------------------------------------------------------- backends, fakes, schema

_KERNELS = Kernels(cpu.pixels, "pixels")


def _kernels_of(backend: str, x: Tensor, weight_shape, g: ConvGeometry):
    """The module of kernels that runs, or None for the reference: without a name also for very few channels on a GPU."""
    if not backend and dense_fallback.is_thin(x, weight_shape, g):
        return None
    return _KERNELS.of(backend, x)


def _run_conv(x, weight, bias, index, count, source, geometry, *finish):
    *epilogue, base, to_rows, expected, zero_tail, same_rows, backend = finish
    kernels = _kernels_of(backend, x, weight.shape, as_geometry(geometry))
    run = _conv if kernels is None else kernels.conv
    hints = () if kernels is None or kernels is cpu.pixels else (expected, zero_tail, same_rows)
    out = run(x, weight, bias, index, count, source, geometry, Epilogue(*epilogue), base, to_rows, *hints)
    if to_rows or source is not None or kernels is cpu.pixels:
        return out
    return out.contiguous(memory_format=memory_format_of(x))


def _run_input_grad(grad, weight, index, count, source, source_rows, geometry, from_rows, backend):
    kernels = _kernels_of(backend, grad, weight.shape, as_geometry(geometry))
    run = _conv_input_grad if kernels is None else kernels.conv_input_grad
    dx = run(grad, weight, index, count, source, source_rows, geometry, from_rows)
    if source is not None:
        return dx
    return dx.contiguous(memory_format=torch.channels_last if from_rows else memory_format_of(grad))


def _run_weight_grad(grad, x, index, count, source, weight_shape, geometry, from_rows, bias, backend):
    g = as_geometry(geometry)
    kernels = _kernels_of(backend, x, weight_shape, g)
    arguments = grad, x, index, count, source, weight_shape, geometry, from_rows, bias
    if kernels is not None:
        return kernels.conv_weight_grad(*arguments)
    if backend or not dense_fallback.is_thin(x, weight_shape, g):
        return _conv_weight_grad(*arguments)
    # in its own dtype, as the dense layer's gradient is
    dense = _dense_grad(grad, index, count, g, from_rows)
    weight = grad.new_empty(weight_shape)  # its values are not read
    _, dw = dense_conv_grads(dense, _dense_input(x, source, g), weight, g, [False, True])
    return dw.contiguous(), dense_bias_grad(dense) if bias else grad.new_empty(0)


def _fake_conv(x, weight, bias, index, count, source, geometry, *finish):
    g, to_rows = as_geometry(geometry), finish[-5]
    channels = _out_channels(weight.shape, g)
    if to_rows:
        return x.new_empty(index.shape[0], channels)
    layout = memory_format_of(x) if source is None else torch.channels_last
    return empty_map(x, (g.batch, channels, g.out_h, g.out_w), layout)


def _fake_input_grad(grad, weight, index, count, source, source_rows, geometry, from_rows, backend):
    g = as_geometry(geometry)
    channels = _in_channels(weight.shape, g)
    if source is not None:
        return grad.new_empty(source_rows, channels)
    layout = torch.channels_last if from_rows else memory_format_of(grad)
    return empty_map(grad, (g.batch, channels, g.in_h, g.in_w), layout)


def _fake_weight_grad(grad, x, index, count, source, weight_shape, geometry, from_rows, bias, backend):
    channels = _out_channels(weight_shape, as_geometry(geometry))
    return grad.new_empty(weight_shape), grad.new_empty(channels if bias else 0)


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _bare_conv(x, weight, bias, plan: tuple, geometry, to_rows: bool, backend: str) -> Tensor:
    """The op without an epilogue, which has gradients; ``plan``: index, count and source."""
    return _convolution(x, weight, bias, *plan, geometry, *NOTHING, None, to_rows, None, True, False, backend)


def _input_grad_backward(ctx, dx):
    grad, weight, *plan, _, geometry, from_rows, backend = saved_inputs(ctx)
    need_grad, need_w = ctx.needs_input_grad[:2]
    d_grad = dw = None
    if need_grad:
        d_grad = _bare_conv(dx, weight, None, plan, geometry, from_rows, backend)
    if need_w:
        dw, _ = _weight_grad(grad, dx, *plan, weight.shape, geometry, from_rows, False, backend)
    return d_grad, dw, *[None] * 7


def _weight_grad_backward(ctx, dw, db):
    grad, x, *plan, _, geometry, from_rows, bias, backend = saved_inputs(ctx)
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = dx = None
    if need_grad:
        d_grad = _bare_conv(x, dw, db if bias else None, plan, geometry, from_rows, backend)
    if need_x:
        dx = _input_grad(grad, dw, *plan, _source_rows(x, plan[2]), geometry, from_rows, backend)
    return d_grad, dx, *[None] * 8


def _source_rows(x: Tensor, source: Tensor | None) -> int:
    """The rows of a packed ``x``; a dense one has none."""
    return 0 if source is None else x.shape[0]


_input_grad = define(
    "pixel_conv_input_grad(Tensor grad, Tensor weight, Tensor index, Tensor? count, Tensor? source, "
    "SymInt source_rows, SymInt[] geometry, bool rows, str backend) -> Tensor",
    _KERNELS.serve(_run_input_grad),
    _fake_input_grad,
    save_inputs,
    _input_grad_backward,
    terms="grad weight",
    vmap=batching.pixel_conv_input_grad,
)
_weight_grad = define(
    "pixel_conv_weight_grad(Tensor grad, Tensor x, Tensor index, Tensor? count, Tensor? source, "
    "SymInt[] weight_shape, SymInt[] geometry, bool rows, bool bias, str backend) -> (Tensor, Tensor)",
    _KERNELS.serve(_run_weight_grad),
    _fake_weight_grad,
    save_inputs,
    _weight_grad_backward,
    terms="grad x; grad",
    vmap=batching.pixel_conv_weight_grad,
)

# ----------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    x, weight, _, index, count, source, ctx.geometry, *epilogue, _, ctx.to_rows, _, _, _, ctx.backend = inputs
    if not Epilogue(*epilogue).is_empty:
        raise RuntimeError(
            "dynops::pixel_conv: the fused activation, scale, shift, gate and residual have no gradient; "
            "dynops.ops.sparse_conv2d composes them from ops that have one"
        )
    ctx.save_for_backward(x, weight, index, count, source)


def _backward(ctx, grad):
    x, weight, *plan = ctx.saved_tensors
    index, count, source = plan
    dx = dw = db = dbase = None
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 12))
    options = ctx.geometry, ctx.to_rows
    if need_x:
        dx = _input_grad(grad, weight, *plan, _source_rows(x, source), *options, ctx.backend)
    if need_w:
        dw, db = _weight_grad(grad, x, *plan, weight.shape, *options, need_b, ctx.backend)
    elif need_b:
        rows = grad if ctx.to_rows else gather_rows(grad, index, count)
        db = zero_past_count(rows, index, count).sum(0)
    if need_base:
        zeros = grad.new_zeros(index.shape[0], grad.shape[1])
        dbase = scatter_rows(zeros, index, count, ctx.geometry[:1] + ctx.geometry[3:5], grad)
    return dx, dw, (db if need_b else None), *[None] * 9, dbase, *[None] * 5


_convolution = define(
    "pixel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? source, "
    "SymInt[] geometry, str activation, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, "
    "Tensor? base, bool rows, SymInt? expected, bool zero_tail, bool same_rows, str backend) -> Tensor",
    _KERNELS.serve(_run_conv),
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias, base",
    vmap=batching.pixel_conv,
)


def _pixel_conv(
    x, weight, bias, plan: PixelPlan, in_plan: PixelPlan | None, g: ConvGeometry, epilogue: Epilogue, base, to_rows, backend,
    zero_tail: bool = True,
) -> Tensor:  # fmt: skip
    """Runs the op: with its gradient where one is needed, else straight to the kernel.

    Args:
        zero_tail: whether rows past the count must be zero. Else, without gradients, a kernel may leave them as they
            are, and nothing may read them: of a capacity of every pixel they are most of the rows that are written.
    """
    in_shape = g[:3]
    # a transposed one has its weight the other way round
    same_rows = to_rows and in_plan is plan and g.is_pointwise and not g.transposed and plan.num_rows > 0
    if same_rows:  # row i reads row i: a 1x1 convolution of a map [1, C, 1, P]
        plan_of_rows = plan.as_rows()
        g, source = plan_of_rows.pointwise(g.groups), None
        index, count = plan_of_rows.index, plan_of_rows.count
    else:
        index, count = plan.index, plan.count
        source = None if in_plan is None else in_plan.inverse()
    backend = backend or ""
    if base is not None:
        base = base.to(x.dtype)  # differs under autocast only
    activation, scale, shift, gate, residual = epilogue
    tensors = (x, weight, bias, scale, shift, gate, residual, base)
    # the C++ kernel takes rows [P, C] for a map [1, C, 1, P] too
    direct = x.is_cpu and modes.route(*tensors) == modes.DIRECT and _KERNELS.of(backend, x) is cpu.pixels
    if residual is not None and residual.dim() == 4:
        # read where it lies: SBNet's bottleneck of 400 x 700 x 256 takes 58.6 ms at 50 % instead of 62.9
        in_place = direct and not same_rows and residual.is_contiguous(memory_format=torch.channels_last)
        if not in_place:
            residual = gather_rows(residual, plan.index, plan.count)
            epilogue = Epilogue(activation, scale, shift, gate, residual)
    if direct:
        derived = None if same_rows else plan.derived
        compact = to_rows and in_plan is not None and plan.count is None and in_plan.shape == in_shape
        if compact and cpu.prepared.takes(x, weight, bias, g, epilogue, len(plan), len(in_plan)):
            return cpu.prepared.conv(x, weight, bias, index, source, g, epilogue, derived)
        return cpu.pixels.conv(x, weight, bias, index, count, source, g, epilogue, base, to_rows, derived)
    if same_rows:
        x = x.t()[None, :, None]
    where = index, count, source
    differentiated = modes.differentiated(*tensors)
    if epilogue.is_empty or not differentiated:
        # the graph of an export may run where gradients are on
        if not epilogue.is_empty and torch.compiler.is_exporting():
            x, weight, bias, base, *rest = (
                None if t is None else t.detach() for t in (x, weight, bias, base, *epilogue[1:])
            )
            epilogue = Epilogue(activation, *rest)
        hints = plan.expected, zero_tail or differentiated or torch.is_grad_enabled(), same_rows
        return _convolution(x, weight, bias, *where, g, *epilogue, base, to_rows, *hints, backend)
    out = _bare_conv(x, weight.to(x.dtype), bias, where, g, True, backend)
    out = apply_epilogue(out, *epilogue)
    if to_rows:
        return zero_past_count(out, index, count)
    scatter = scatter_planes if memory_format_of(x) == torch.contiguous_format else scatter_rows
    return scatter(out, index, count, list(plan.shape), base)


def convolve_into(
    out: Tensor,
    x,
    weight,
    bias,
    plan: PixelPlan,
    in_plan: PixelPlan | None,
    g: ConvGeometry,
    epilogue: Epilogue,
) -> bool:
    """Writes the op's result at a plan into a channels_last map ``[N, O, H, W]``, which stays as it is elsewhere.

    Returns False, and writes nothing, where no kernel can do it: without the binary, on a GPU, for a gradient.
    """
    tensors = (x, weight, bias, epilogue.scale, epilogue.shift, epilogue.residual)
    if not x.is_cpu or plan.count is not None or modes.route(*tensors) != modes.DIRECT:
        return False
    if _KERNELS.of("", x) is not cpu.pixels or out.dtype is not x.dtype or weight.dtype is not x.dtype:
        return False
    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        return False
    source = None if in_plan is None else in_plan.inverse()
    where = plan.index, None, source, g, epilogue, None, False, plan.derived
    cpu.pixels.conv(x, weight, bias, *where, into=out)
    return True


def _dense_or_sparse(x, weight, bias, plan: PixelPlan, g: ConvGeometry, epilogue: Epilogue, base, backend):
    """The op on a dense map, by the dense layer where that is faster and no backend is named."""
    if backend is None and dense_fallback.dense_wins(plan, x, weight, g, epilogue):
        return dense_fallback.masked_dense(x, weight, bias, plan, g, epilogue, base)
    return _pixel_conv(x, weight, bias, plan, None, g, epilogue, base, False, backend)


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
            NCHW. Not masked: every input pixel may be read. channels_last is read in place. Of NCHW a CPU gathers the
            pixels that it needs, or reads the planes in place if the layer is depthwise or has few channels on a side.
        weight: ``[O, C/groups, kh, kw]``, of ``x``'s dtype.
        bias: ``[O]`` or None.
        plan: a :class:`PixelPlan` at the output resolution.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``.
        activation: None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "relu2".
        scale, shift: ``[O]``, an affine map of each output channel (a folded norm).
        gate: ``[N, H, W]``, ``[N, 1, H, W]`` or packed ``[P]``, a multiplier for each pixel.
        residual: ``[N, O, H, W]`` or packed ``[P, O]``, added before the activation.
        base: ``[N, O, H, W]``, the output where nothing is computed; zero if None.
        backend: "cpp", "triton" or "reference"; None takes the fastest, which is the dense layer and a mask where a
            plan is nearly full.

    Returns:
        ``[N, O, H, W]``, dtype of ``x``. Every floating argument gets its gradient, where it exists
        at an active pixel (``base``: at an inactive one).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: DynConv (CVPR 2020), SBNet (CVPR 2018).
    """
    options = stride, padding, dilation, groups, padding_mode
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, options)
    epilogue = checks.epilogue(plan, x, weight.shape[0], activation, scale, shift, gate, residual, base)
    return _dense_or_sparse(x, weight, bias, plan, g, epilogue, base, backend)


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
    options = stride, padding, dilation, groups, output_padding
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, options, transposed=True)
    epilogue = checks.epilogue(plan, x, weight.shape[1] * groups, activation, scale, shift, gate, residual, base)  # fmt: skip
    return _dense_or_sparse(x, weight, bias, plan, g, epilogue, base, backend)
