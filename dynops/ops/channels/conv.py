"""Convolution and linear layer on a subset of channels, another one for each sample of the batch.

The mathematics, for sample n with live input channels I(n) and live output channels O(n), taps t::

    z[n, o]   = scale[n, o] * (sum_(t, i in I(n)) W[o, i, t] x[n, i] shifted by t + bias[o])
    out[n, o] = activation(z[n, o])  for o in O(n), and base (or 0) for the others

so ``conv2d(x * in_mask, …)`` finished and masked, where only live channels of ``x`` and live rows and columns
of the weight are read. The gradients, with dy at live outputs::

    dx[n, i]   = sum_(t, o in O(n)) W[o, i, t] dy[n, o] shifted back by t,  for i in I(n), else 0
    dW[o, i, t] = sum over the samples n that have both of <dy[n, o], x[n, i] shifted by t>
    db[o]       = sum over the samples n that have o of dy[n, o]

With heads the output channels fall into as many groups, each with inputs I(n, head) of its own.

Packed maps hold the live channels only: ``[N, width, H, W]``, channel j of sample n being the j-th of its
list, zero past the list's end. ``_conv``, ``_conv_input_grad``, ``_conv_weight_grad``, ``_gather`` and
``_scatter`` are the reference in plain PyTorch; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends, modes
from ...geometry import ConvGeometry, as_geometry
from ...kernels.cpu import channels as cpp_channels
from ...kernels.layout import memory_format_of
from ...plans import ChannelPlan
from .. import batching, checks
from ..epilogue import ACTIVATIONS
from ..pixels.conv import dense_conv, dense_conv_grads, dense_layer, dense_weight_grad
from ..registry import define
from . import checks as channel_checks

# ---------------------------------------------------------------------------------- reference


def _slots(index: Tensor, count: Tensor, batch: int, channels: int) -> Tensor:
    """int64 ``[N, L]``: the channel of each packed one; those past the count go to the spare slot C."""
    valid = torch.arange(index.shape[1], device=index.device) < count[:, None]
    return torch.where(valid, index, channels).long().expand(batch, -1)


def _gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """``[N, C, H, W]`` to ``[N, width, H, W]``: the live channels of each sample, then zeros."""
    slots = _slots(index[:, :width], count, x.shape[0], x.shape[1])
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    out = padded.gather(1, slots[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    return out.contiguous(memory_format=memory_format_of(x))


def _scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """``[N, width, H, W]`` to ``[N, channels, H, W]``; ``base``, or zero, where a channel is not live."""
    n, width, *size = packed.shape
    slots = _slots(index[:, :width], count, n, channels)
    out = packed.new_zeros(n, channels + 1, *size)
    if base is not None:
        out[:, :-1] = base
    out.scatter_(1, slots[:, :, None, None].expand(-1, -1, *size), packed)
    return out[:, :-1].clone(memory_format=memory_format_of(packed))


def _live(index: Tensor | None, count: Tensor | None, channels: int, heads: int = 1) -> Tensor | None:
    """bool ``[N or 1, heads, C, 1, 1]``, or None where all are."""
    if index is None:
        return None
    return _channel_mask(index, count, channels).view(-1, heads, channels, 1, 1)


def _dense_input(x, index, count, channels: int, heads: int, packed: bool) -> Tensor:
    """``[N, heads * C, H, W]``: each head's own inputs, zero where they are not live."""
    if packed:
        x = _scatter(x, index, count, channels, None)
    live = _live(index, count, channels, heads)
    if heads == 1:
        return (
            x if live is None else torch.where(live[:, 0], x, 0)
        )  # keeps the format, as masked_fill does not
    headed = torch.where(live, x[:, None], 0).flatten(1, 2)
    return headed.contiguous(memory_format=memory_format_of(x))


def _dense_grad(grad: Tensor, index, count, channels: int, packed: bool) -> Tensor:
    """The output gradient as ``[N, O, H, W]``, zero at outputs that are not live."""
    if packed:
        return _scatter(grad, index, count, channels, None)
    live = _live(index, count, channels)
    return grad if live is None else torch.where(live[:, 0], grad, 0)


def _headed(g: ConvGeometry, heads: int) -> ConvGeometry:
    return g if heads == 1 else g._replace(groups=heads)


def _conv(
    x: Tensor,  # [N, C, H, W]; packed_in: [N, width, H, W]
    weight: Tensor,  # [O, C/groups, kh, kw]
    bias: Tensor | None,  # [O]
    in_index: Tensor | None,  # [N * heads, L] or [heads, L]; None: all channels
    in_count: Tensor | None,
    out_index: Tensor | None,  # [N, M] or [1, M]
    out_count: Tensor | None,
    geometry: list[int],
    heads: int,
    activation: str,
    scale: Tensor | None,  # [N, O]
    base: Tensor | None,  # [N, O, out_h, out_w]
    packed_in: bool,
    out_width: int,  # channels of a packed result, or -1 for a dense one
) -> Tensor:  # [N, O, out_h, out_w] or [N, out_width, out_h, out_w]
    g = as_geometry(geometry)
    channels, outputs = weight.shape[1] * g.groups, weight.shape[0]
    dense = _dense_input(x, in_index, in_count, channels, heads, packed_in)
    out = dense_conv(dense, weight, _headed(g, heads), bias)
    if scale is not None:
        out = out * scale.to(out.dtype)[:, :, None, None]
    out = ACTIVATIONS[activation](out)
    if out_width >= 0:
        return _gather(out, out_index, out_count, out_width)
    live = _live(out_index, out_count, outputs)
    if live is None:
        return out
    return torch.where(live[:, 0], out, 0 if base is None else base)


def _conv_input_grad(
    grad: Tensor,  # [N, O, out_h, out_w]; packed_out: [N, width, out_h, out_w]
    weight: Tensor,
    in_index: Tensor | None,
    in_count: Tensor | None,
    out_index: Tensor | None,
    out_count: Tensor | None,
    geometry: list[int],
    heads: int,
    in_width: int,  # channels of a packed input, or -1 for a dense one
    packed_out: bool,
) -> Tensor:  # [N, C, H, W] or [N, in_width, H, W]
    g = as_geometry(geometry)
    channels = weight.shape[1] * g.groups
    dense = _dense_grad(grad, out_index, out_count, weight.shape[0], packed_out)
    x = grad.new_empty(g.batch, heads * channels, g.in_h, g.in_w)  # its values are not read
    dx, _ = dense_conv_grads(dense, x, weight, _headed(g, heads), [True, False])
    dx = dx.reshape(g.batch, heads, channels, g.in_h, g.in_w)
    live = _live(in_index, in_count, channels, heads)
    dx = (dx if live is None else dx.masked_fill(~live, 0)).sum(1)
    return dx if in_width < 0 else _gather(dx, in_index, in_count, in_width)


def _conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    in_index: Tensor | None,
    in_count: Tensor | None,
    out_index: Tensor | None,
    out_count: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    heads: int,
    packed_in: bool,
    packed_out: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:  # dW as weight_shape; db [O], or [0] where nobody asks for it
    g = as_geometry(geometry)
    dense = _dense_grad(grad, out_index, out_count, weight_shape[0], packed_out)
    dense_x = _dense_input(x, in_index, in_count, weight_shape[1] * g.groups, heads, packed_in)
    dw = dense_weight_grad(dense, dense_x, weight_shape, _headed(g, heads))
    return dw, dense.sum((0, 2, 3)) if bias else grad.new_empty(0)


# ---------------------------------------------------------------------- backends, fakes, schema


def _kernels(backend: str, x: Tensor):
    """The kernel module for ``x``, or None for the reference above."""
    name = backends.choose(backend, x.device, x.dtype)
    if name == "cpp":
        return cpp_channels
    if name == "triton":
        from ...kernels.triton import channels

        return channels
    return None


def _channel_mask(index: Tensor, count: Tensor, channels: int) -> Tensor:
    return torch.ops.dynops.channel_mask(index, count, channels)


def _run_gather(x, index, count, width):
    kernels = _kernels("", x)
    return (_gather if kernels is None else kernels.gather)(x, index, count, width)


def _run_scatter(packed, index, count, channels, base):
    kernels = _kernels("", packed)
    return (_scatter if kernels is None else kernels.scatter)(packed, index, count, channels, base)


def _run_conv(x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, activation, scale, base, packed_in, out_width, backend):  # fmt: skip
    kernels = _kernels(backend, x)
    run = _conv if kernels is None else kernels.conv
    out = run(x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, activation, scale, base, packed_in, out_width)  # fmt: skip
    return out.contiguous(memory_format=memory_format_of(x))


def _run_input_grad(grad, weight, in_index, in_count, out_index, out_count, geometry, heads, in_width, packed_out, backend):  # fmt: skip
    kernels = _kernels(backend, grad)
    run = _conv_input_grad if kernels is None else kernels.conv_input_grad
    dx = run(grad, weight, in_index, in_count, out_index, out_count, geometry, heads, in_width, packed_out)
    return dx.contiguous(memory_format=memory_format_of(grad))


def _run_weight_grad(grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, packed_in, packed_out, bias, backend):  # fmt: skip
    kernels = _kernels(backend, grad)
    run = _conv_weight_grad if kernels is None else kernels.conv_weight_grad
    return run(grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, packed_in, packed_out, bias)  # fmt: skip


def _fake_map(like: Tensor, batch, channels, height, width) -> Tensor:
    return like.new_empty(batch, channels, height, width).contiguous(memory_format=memory_format_of(like))


def _fake_gather(x, index, count, width):
    return _fake_map(x, x.shape[0], width, *x.shape[2:])


def _fake_scatter(packed, index, count, channels, base):
    return _fake_map(packed, packed.shape[0], channels, *packed.shape[2:])


def _fake_conv(x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, activation, scale, base, packed_in, out_width, backend):  # fmt: skip
    g = as_geometry(geometry)
    return _fake_map(x, g.batch, weight.shape[0] if out_width < 0 else out_width, g.out_h, g.out_w)


def _fake_input_grad(grad, weight, in_index, in_count, out_index, out_count, geometry, heads, in_width, packed_out, backend):  # fmt: skip
    g = as_geometry(geometry)
    return _fake_map(grad, g.batch, weight.shape[1] * g.groups if in_width < 0 else in_width, g.in_h, g.in_w)


def _fake_weight_grad(grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, packed_in, packed_out, bias, backend):  # fmt: skip
    return grad.new_empty(weight_shape), grad.new_empty(weight_shape[0] if bias else 0)


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _input_grad_setup(ctx, inputs, output):
    *tensors, ctx.geometry, ctx.heads, ctx.in_width, ctx.packed_out, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _input_grad_backward(ctx, dx):
    grad, weight, *lists = ctx.saved_tensors
    need_grad, need_w = ctx.needs_input_grad[:2]
    packed_in, d_grad, dw = ctx.in_width >= 0, None, None
    if need_grad:
        out_width = grad.shape[1] if ctx.packed_out else -1
        d_grad = _convolution(dx, weight, None, *lists, ctx.geometry, ctx.heads, "", None, None, packed_in, out_width, ctx.backend)  # fmt: skip
    if need_w:
        dw, _ = _weight_grad(grad, dx, *lists, weight.shape, ctx.geometry, ctx.heads, packed_in, ctx.packed_out, False, ctx.backend)  # fmt: skip
    return d_grad, dw, *[None] * 9


def _weight_grad_setup(ctx, inputs, output):
    *tensors, _, ctx.geometry, ctx.heads, ctx.packed_in, ctx.packed_out, ctx.bias, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _weight_grad_backward(ctx, dw, db):
    grad, x, *lists = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = dx = None
    if need_grad:
        out_width = grad.shape[1] if ctx.packed_out else -1
        d_grad = _convolution(x, dw, db if ctx.bias else None, *lists, ctx.geometry, ctx.heads, "", None, None, ctx.packed_in, out_width, ctx.backend)  # fmt: skip
    if need_x:
        in_width = x.shape[1] if ctx.packed_in else -1
        dx = _input_grad(grad, dw, *lists, ctx.geometry, ctx.heads, in_width, ctx.packed_out, ctx.backend)
    return d_grad, dx, *[None] * 11


_input_grad = define(
    "channel_conv_input_grad(Tensor grad, Tensor weight, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] geometry, int heads, SymInt in_width, bool packed_out, str backend) -> Tensor",
    _run_input_grad,
    _fake_input_grad,
    _input_grad_setup,
    _input_grad_backward,
    terms="grad weight",
    vmap=batching.samples("grad", lists=("in_index", "in_count", "out_index", "out_count")),
)
_weight_grad = define(
    "channel_conv_weight_grad(Tensor grad, Tensor x, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] weight_shape, SymInt[] geometry, int heads, bool packed_in, bool packed_out, "
    "bool bias, str backend) -> (Tensor, Tensor)",
    _run_weight_grad,
    _fake_weight_grad,
    _weight_grad_setup,
    _weight_grad_backward,
    terms="grad x; grad",
)

# ----------------------------------------------------------------------------------- autograd


def _gather_setup(ctx, inputs, output):
    x, index, count, _ = inputs
    ctx.save_for_backward(index, count)
    ctx.channels = x.shape[1]


def _gather_backward(ctx, grad):
    return _scatter_op(grad, *ctx.saved_tensors, ctx.channels, None), None, None, None


def _scatter_setup(ctx, inputs, output):
    packed, index, count, _, _ = inputs
    ctx.save_for_backward(index, count)
    ctx.width = packed.shape[1]


def _without_live(grad: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The gradient of a base: that of the channels that are not live."""
    return grad.masked_fill(_channel_mask(index, count, grad.shape[1])[:, :, None, None], 0)


def _scatter_backward(ctx, grad):
    index, count = ctx.saved_tensors
    dpacked = _gather_op(grad, index, count, ctx.width) if ctx.needs_input_grad[0] else None
    return dpacked, None, None, None, _without_live(grad, index, count) if ctx.needs_input_grad[4] else None


_gather_op = define(
    "gather_channels(Tensor x, Tensor index, Tensor count, SymInt width) -> Tensor",
    _run_gather,
    _fake_gather,
    _gather_setup,
    _gather_backward,
    terms="x",
    vmap=batching.passive(2, "x"),
)
_scatter_op = define(
    "scatter_channels(Tensor packed, Tensor index, Tensor count, SymInt channels, Tensor? base) -> Tensor",
    _run_scatter,
    _fake_scatter,
    _scatter_setup,
    _scatter_backward,
    terms="packed, base",
    vmap=batching.passive(2, "packed", "base"),
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, activation, scale, base, packed_in, out_width, backend = inputs  # fmt: skip
    if activation or scale is not None:
        raise RuntimeError(
            "dynops::channel_conv: the fused activation and scale have no gradient; "
            "dynops.ops.channel_conv2d composes them from ops that have one"
        )
    ctx.save_for_backward(x, weight, in_index, in_count, out_index, out_count)
    ctx.geometry, ctx.heads, ctx.backend = geometry, heads, backend
    ctx.packed_in, ctx.packed_out = packed_in, out_width >= 0


def _backward(ctx, grad):
    x, weight, *lists = ctx.saved_tensors
    dx = dw = db = dbase = None
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 11))
    if need_x:
        in_width = x.shape[1] if ctx.packed_in else -1
        dx = _input_grad(grad, weight, *lists, ctx.geometry, ctx.heads, in_width, ctx.packed_out, ctx.backend)
    if need_w or need_b:
        dw, db = _weight_grad(grad, x, *lists, weight.shape, ctx.geometry, ctx.heads, ctx.packed_in, ctx.packed_out, need_b, ctx.backend)  # fmt: skip
    if need_base:
        out_index, out_count = lists[2:]
        dbase = torch.zeros_like(grad) if out_index is None else _without_live(grad, out_index, out_count)
    return dx, (dw if need_w else None), (db if need_b else None), *[None] * 8, dbase, None, None, None


_convolution = define(
    "channel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] geometry, int heads, str activation, Tensor? scale, Tensor? base, "
    "bool packed_in, SymInt out_width, str backend) -> Tensor",
    _run_conv,
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias, base",
    vmap=batching.samples("x", "scale", "base", lists=("in_index", "in_count", "out_index", "out_count")),
)

# ------------------------------------------------------------------------------ public functions


def gather_channels(x: Tensor, plan: ChannelPlan) -> Tensor:
    """The live channels of each sample, packed.

    Args:
        x: ``[N, C]`` or ``[N, C, ...]``, any floating dtype; a 4-D one in either memory format, which the result
            has too.

    Returns:
        ``[N, plan.width, ...]``, zero past the end of a sample's list.

    Raises:
        TypeError, ValueError: ``x`` does not fit the plan.
    """
    channel_checks.plan_of(plan, "plan", x, None, "x", 1)
    shape = (x.shape[0], plan.width, *x.shape[2:])
    return _gather_op(_as_map(x), plan.index, plan.count, plan.width).view(shape)


def scatter_channels(packed: Tensor, plan: ChannelPlan, base: Tensor | None = None) -> Tensor:
    """The dense tensor with the packed channels in their places and ``base`` (or zero) at all others.

    Args:
        packed: ``[N, plan.width, ...]``.
        base: ``[N, C, ...]`` of the same dtype, or None.

    Returns:
        ``[N, C, ...]``, memory format of ``packed``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the plan.
    """
    width = plan.width if isinstance(plan, ChannelPlan) else None
    channel_checks.plan_of(plan, "plan", packed, width, "packed", 1)
    shape = (packed.shape[0], plan.channels, *packed.shape[2:])
    if base is not None:
        channel_checks.base_of(base, shape, packed)
        base = _as_map(base)
    return _scatter_op(_as_map(packed), plan.index, plan.count, plan.channels, base).view(shape)


def _as_map(x: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, x.shape[2:].numel())


def channel_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_plan: ChannelPlan | None = None,
    out_plan: ChannelPlan | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution on the live channels of each sample only.

    Equals ``where(out_mask, activation(scale * conv2d(where(in_mask, x, 0), …)), base or 0)`` and reads only
    live input channels and live rows and columns of the weight.

    Args:
        x: ``[N, C, H, W]``, either memory format (channels_last is the fast one); the output has the same one.
        weight: ``[O, C/groups, kh, kw]``, of ``x``'s dtype.
        bias: ``[O]`` or None.
        in_plan: the live input channels; None: all. With heads (``from_mask(mask[N, G, C])``) the outputs fall
            into G groups of O/G, each with inputs of its own (dynamic group convolution); ``groups`` is 1 then.
        out_plan: the live output channels; None: all.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``.
        activation: None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "relu2".
        scale: ``[N, O]``, a soft gate: multiplies a sample's channels, before the activation.
        base: ``[N, O, out_H, out_W]``, the output at channels that are not live; zero if None.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[N, O, out_H, out_W]``, dtype of ``x``. Every floating argument gets its gradient, where it exists
        at a live channel (``base``: at one that is not).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: FBS (ICLR 2019), RNP (NIPS 2017), dynamic group convolution (ECCV 2020).
    """
    checks.tensor(x, "x", 4, "[N, C, H, W]")
    return _channel_conv(x, weight, bias, in_plan, out_plan, False, False, (stride, padding, dilation, groups, padding_mode), activation, scale, base, backend)  # fmt: skip


def packed_channel_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_plan: ChannelPlan | None = None,
    out_plan: ChannelPlan | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolution from one plan's packed channels to another's: a chain of layers that stays compact.

    Args:
        x: ``[N, in_plan.width, H, W]``, or ``[N, C, H, W]`` where ``in_plan`` is None.
        weight, bias, scale (``[N, O]``) and the rest: as in :func:`channel_conv2d`.

    Returns:
        ``[N, out_plan.width, out_H, out_W]``, zero past the end of a sample's list; ``[N, O, out_H, out_W]``
        where ``out_plan`` is None.
    """
    checks.tensor(x, "x", 4, "[N, width, H, W]")
    packed_in, packed_out = in_plan is not None, out_plan is not None
    return _channel_conv(x, weight, bias, in_plan, out_plan, packed_in, packed_out, (stride, padding, dilation, groups, padding_mode), activation, scale, None, backend)  # fmt: skip


def channel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_plan: ChannelPlan | None = None,
    out_plan: ChannelPlan | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer on the live features of each sample only.

    Equals ``where(out_mask, activation(scale * linear(where(in_mask, x, 0), …)), base or 0)``.

    Args:
        x: ``[N, ..., I]``: the plans' lists are those of the N samples of the first dimension.
        weight: ``[O, I]``, of ``x``'s dtype.
        bias: ``[O]`` or None.
        in_plan, out_plan: the live input and output features; None: all.
        activation, backend: as in :func:`channel_conv2d`.
        scale: ``[N, O]``.
        base: ``[N, ..., O]``.

    Returns:
        ``[N, ..., O]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: conditional computation (Bengio et al., 2015), FBS (ICLR 2019).
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(
            f"x: expected a tensor [N, ..., I], got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    checks.tensor(weight, "weight", 2, "[O, I]")
    rows = x.shape[1:-1].numel()
    if base is not None:
        channel_checks.base_of(base, (*x.shape[:-1], weight.shape[0]), x)
        base = base.reshape(x.shape[0], 1, rows, weight.shape[0]).permute(0, 3, 1, 2)
    if rows == 0:  # a convolution takes no empty map
        return F.linear(x, weight, bias)
    as_map = x.reshape(x.shape[0], 1, rows, x.shape[-1]).permute(0, 3, 1, 2)  # channels_last, no copy
    out = _channel_conv(as_map, weight[:, :, None, None], bias, in_plan, out_plan, False, False, (1, 0, 1, 1, "zeros"), activation, scale, base, backend)  # fmt: skip
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _channel_conv(x, weight, bias, in_plan, out_plan, packed_in, packed_out, options, activation, scale, base, backend):  # fmt: skip
    """Checks the arguments and runs the op: with its gradient where one is needed, else straight."""
    x, weight, bias, g, activation = channel_checks.conv_arguments(
        x, weight, bias, in_plan, out_plan, packed_in, options, activation, scale, base
    )
    in_plan, out_plan = (None if plan is not None and not packed and plan.is_full else plan for plan, packed in ((in_plan, packed_in), (out_plan, packed_out)))  # fmt: skip
    if backend is None and in_plan is None and out_plan is None and scale is None and x.shape[0]:
        return dense_layer(x, weight, bias, g, activation)
    heads = 1 if in_plan is None else in_plan.heads
    in_lists = (None, None) if in_plan is None else (in_plan.index, in_plan.count)
    out_lists = (None, None) if out_plan is None else (out_plan.index, out_plan.count)
    out_width = out_plan.width if packed_out else -1
    base = None if base is None else base.to(x.dtype)  # differs under autocast only
    differentiated = modes.differentiated(x, weight, bias, scale, base)
    lists = (*in_lists, *out_lists, g, heads)
    if not differentiated or (not activation and scale is None):
        weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
        return _convolution(x, weight, bias, *lists, activation, scale, base, packed_in, out_width, backend or "")  # fmt: skip
    out = _convolution(x, weight.to(x.dtype), bias, *lists, "", None, None, packed_in, out_width, backend or "")  # fmt: skip
    if scale is not None:
        if packed_out:
            scale = gather_channels(scale, out_plan)
        out = out * scale.to(out.dtype)[:, :, None, None]
    out = ACTIVATIONS[activation](out)  # each is zero at zero
    if base is None or out_plan is None:
        return out
    return torch.where(_channel_mask(*out_lists, out.shape[1])[:, :, None, None], out, base)


__all__ = [
    "channel_conv2d",
    "channel_linear",
    "gather_channels",
    "packed_channel_conv2d",
    "scatter_channels",
]
