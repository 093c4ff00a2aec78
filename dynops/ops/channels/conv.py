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

Packed maps hold the live channels only (``rows.py``). ``_conv``, ``_conv_input_grad`` and ``_conv_weight_grad`` are
the reference in plain PyTorch; the kernels have the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry, as_geometry
from ...kernels import cpu
from ...kernels.layout import empty_map, memory_format_of
from ...kernels.lists import Lists
from ...plans import ChannelPlan
from .. import batching
from .. import checks as tensor_checks
from ..dense_conv import dense_bias_grad, dense_conv, dense_conv_grads, dense_layer, dense_weight_grad
from ..dispatch import Kernels
from ..epilogue import ACTIVATIONS
from ..registry import define, save_inputs, saved_inputs
from . import checks
from .rows import _gather, _scatter, channel_mask, gather_channels, without_live

# ---------------------------------------------------------------------------------- reference


def _live(index: Tensor | None, count: Tensor | None, channels: int, heads: int = 1) -> Tensor | None:
    """bool ``[N or 1, heads, C, 1, 1]``, or None where all are."""
    if index is None:
        return None
    return channel_mask(index, count, channels).view(-1, heads, channels, 1, 1)


def _dense_input(x, index, count, channels: int, heads: int, packed: bool) -> Tensor:
    """``[N, heads * C, H, W]``: each head's own inputs, zero where they are not live."""
    if packed:
        x = _scatter(x, index, count, channels, None)
    live = _live(index, count, channels, heads)
    if heads == 1:  # where keeps the format, which masked_fill does not
        return x if live is None else torch.where(live[:, 0], x, 0)
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
    lists: Lists,
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
    dense = _dense_input(x, *lists.ins, channels, heads, packed_in)
    out = dense_conv(dense, weight, _headed(g, heads), bias)
    if scale is not None:
        out = out * scale.to(out.dtype)[:, :, None, None]
    out = ACTIVATIONS[activation](out)
    if out_width >= 0:
        return _gather(out, *lists.outs, out_width)
    live = _live(*lists.outs, outputs)
    if live is None:
        return out
    return torch.where(live[:, 0], out, 0 if base is None else base)


def _conv_input_grad(
    grad: Tensor,  # [N, O, out_h, out_w]; packed_out: [N, width, out_h, out_w]
    weight: Tensor,
    lists: Lists,
    geometry: list[int],
    heads: int,
    in_width: int,  # channels of a packed input, or -1 for a dense one
    packed_out: bool,
) -> Tensor:  # [N, C, H, W] or [N, in_width, H, W]
    g = as_geometry(geometry)
    channels = weight.shape[1] * g.groups
    dense = _dense_grad(grad, *lists.outs, weight.shape[0], packed_out)
    x = grad.new_empty(g.batch, heads * channels, g.in_h, g.in_w)  # its values are not read
    dx, _ = dense_conv_grads(dense, x, weight, _headed(g, heads), [True, False])
    dx = dx.reshape(g.batch, heads, channels, g.in_h, g.in_w)
    live = _live(*lists.ins, channels, heads)
    dx = (dx if live is None else dx.masked_fill(~live, 0)).sum(1)
    return dx if in_width < 0 else _gather(dx, *lists.ins, in_width)


def _conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    lists: Lists,
    weight_shape: list[int],
    geometry: list[int],
    heads: int,
    packed_in: bool,
    packed_out: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:  # dW as weight_shape; db [O], or [0] where nobody asks for it
    g = as_geometry(geometry)
    dense = _dense_grad(grad, *lists.outs, weight_shape[0], packed_out)
    dense_x = _dense_input(x, *lists.ins, weight_shape[1] * g.groups, heads, packed_in)
    dw = dense_weight_grad(dense, dense_x, weight_shape, _headed(g, heads))
    return dw, dense_bias_grad(dense) if bias else grad.new_empty(0)


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.channels, "channels")


def _pack(at: int) -> Callable:
    """Makes one :class:`Lists` of the four arguments from ``at`` on."""
    return lambda *arguments: (*arguments[:at], Lists(*arguments[at : at + 4]), *arguments[at + 4 :])


def _fake_conv(x, weight, bias, in_index, in_count, out_index, out_count, geometry, *options):
    g, out_width = as_geometry(geometry), options[-2]
    return empty_map(x, (g.batch, weight.shape[0] if out_width < 0 else out_width, g.out_h, g.out_w))


def _fake_input_grad(grad, weight, in_index, in_count, out_index, out_count, geometry, heads, in_width, *options):  # fmt: skip
    g = as_geometry(geometry)
    return empty_map(
        grad, (g.batch, weight.shape[1] * g.groups if in_width < 0 else in_width, g.in_h, g.in_w)
    )


def _fake_weight_grad(grad, x, in_index, in_count, out_index, out_count, weight_shape, *options):
    bias = options[-2]
    return grad.new_empty(weight_shape), grad.new_empty(weight_shape[0] if bias else 0)


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _bare_conv(
    x, weight, bias, lists: tuple, geometry, heads: int, packed_in: bool, out_width: int, backend: str
):
    """The op without an epilogue, which has gradients; ``lists``: index and count of inputs and outputs."""
    epilogue = "", None, None  # activation, scale, base
    return _convolution(x, weight, bias, *lists, geometry, heads, *epilogue, packed_in, out_width, backend)


def _width(x: Tensor, packed: bool) -> int:
    return x.shape[1] if packed else -1


def _input_grad_backward(ctx, dx):
    grad, weight, *lists, geometry, heads, in_width, packed_out, backend = saved_inputs(ctx)
    need_grad, need_w = ctx.needs_input_grad[:2]
    shared, packed_in, d_grad, dw = (geometry, heads), in_width >= 0, None, None
    if need_grad:
        d_grad = _bare_conv(dx, weight, None, lists, *shared, packed_in, _width(grad, packed_out), backend)
    if need_w:
        options = *shared, packed_in, packed_out, False, backend
        dw, _ = _weight_grad(grad, dx, *lists, weight.shape, *options)
    return d_grad, dw, *[None] * 9


def _weight_grad_backward(ctx, dw, db):
    grad, x, *lists, _, geometry, heads, packed_in, packed_out, bias, backend = saved_inputs(ctx)
    need_grad, need_x = ctx.needs_input_grad[:2]
    shared, d_grad, dx = (geometry, heads), None, None
    if need_grad:
        widths = packed_in, _width(grad, packed_out)
        d_grad = _bare_conv(x, dw, db if bias else None, lists, *shared, *widths, backend)
    if need_x:
        dx = _input_grad(grad, dw, *lists, *shared, _width(x, packed_in), packed_out, backend)
    return d_grad, dx, *[None] * 11


_input_grad = define(
    "channel_conv_input_grad(Tensor grad, Tensor weight, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] geometry, int heads, SymInt in_width, bool packed_out, str backend) -> Tensor",
    _KERNELS.run("conv_input_grad", _conv_input_grad, like_first=True, pack=_pack(2)),
    _fake_input_grad,
    save_inputs,
    _input_grad_backward,
    terms="grad weight",
    vmap=batching.samples("grad", lists=("in_index", "in_count", "out_index", "out_count")),
)
_weight_grad = define(
    "channel_conv_weight_grad(Tensor grad, Tensor x, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] weight_shape, SymInt[] geometry, int heads, bool packed_in, bool packed_out, "
    "bool bias, str backend) -> (Tensor, Tensor)",
    _KERNELS.run("conv_weight_grad", _conv_weight_grad, pack=_pack(2)),
    _fake_weight_grad,
    save_inputs,
    _weight_grad_backward,
    terms="grad x; grad",
)

# ----------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    x, weight, _, *lists, geometry, heads, activation, scale, _, packed_in, out_width, backend = inputs
    if activation or scale is not None:
        raise RuntimeError(
            "dynops::channel_conv: the fused activation and scale have no gradient; "
            "dynops.ops.channel_conv2d composes them from ops that have one"
        )
    ctx.save_for_backward(x, weight, *lists)
    ctx.geometry, ctx.heads, ctx.backend = geometry, heads, backend
    ctx.packed_in, ctx.packed_out = packed_in, out_width >= 0


def _backward(ctx, grad):
    x, weight, *lists = ctx.saved_tensors
    dx = dw = db = dbase = None
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 11))
    shared = ctx.geometry, ctx.heads
    if need_x:
        dx = _input_grad(grad, weight, *lists, *shared, _width(x, ctx.packed_in), ctx.packed_out, ctx.backend)
    if need_w or need_b:
        options = *shared, ctx.packed_in, ctx.packed_out, need_b, ctx.backend
        dw, db = _weight_grad(grad, x, *lists, weight.shape, *options)
    if need_base:
        outs = Lists(*lists).outs
        dbase = torch.zeros_like(grad) if outs[0] is None else without_live(grad, *outs)
    return dx, (dw if need_w else None), (db if need_b else None), *[None] * 8, dbase, None, None, None


_convolution = define(
    "channel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
    "Tensor? out_count, SymInt[] geometry, int heads, str activation, Tensor? scale, Tensor? base, "
    "bool packed_in, SymInt out_width, str backend) -> Tensor",
    _KERNELS.run("conv", _conv, like_first=True, pack=_pack(3)),
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias, base",
    vmap=batching.samples("x", "scale", "base", lists=("in_index", "in_count", "out_index", "out_count")),
)

# ------------------------------------------------------------------------------ public functions


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
    tensor_checks.tensor(x, "x", 4, "[N, C, H, W]")
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
    tensor_checks.tensor(x, "x", 4, "[N, width, H, W]")
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
    tensor_checks.tensor(weight, "weight", 2, "[O, I]")
    rows = x.shape[1:-1].numel()
    if base is not None:
        checks.base_of(base, (*x.shape[:-1], weight.shape[0]), x)
        base = base.reshape(x.shape[0], 1, rows, weight.shape[0]).permute(0, 3, 1, 2)
    if rows == 0:  # a convolution takes no empty map
        return F.linear(x, weight, bias)
    as_map = x.reshape(x.shape[0], 1, rows, x.shape[-1]).permute(0, 3, 1, 2)  # channels_last, no copy
    out = _channel_conv(as_map, weight[:, :, None, None], bias, in_plan, out_plan, False, False, (1, 0, 1, 1, "zeros"), activation, scale, base, backend)  # fmt: skip
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _channel_conv(x, weight, bias, in_plan, out_plan, packed_in, packed_out, options, activation, scale, base, backend):  # fmt: skip
    """Checks the arguments and runs the op: with its gradient where one is needed, else straight."""
    x, weight, bias, g, activation = checks.conv_arguments(
        x, weight, bias, in_plan, out_plan, packed_in, options, activation, scale, base
    )
    if in_plan is not None and not packed_in and in_plan.is_full:
        in_plan = None
    if out_plan is not None and not packed_out and out_plan.is_full:
        out_plan = None
    if backend is None and in_plan is None and out_plan is None and scale is None and x.shape[0]:
        return dense_layer(x, weight, bias, g, activation)
    heads = 1 if in_plan is None else in_plan.heads
    in_list = (None, None) if in_plan is None else (in_plan.index, in_plan.count)
    out_list = (None, None) if out_plan is None else (out_plan.index, out_plan.count)
    lists = Lists(*in_list, *out_list)
    widths = packed_in, out_plan.width if packed_out else -1
    base = None if base is None else base.to(x.dtype)  # differs under autocast only
    backend = backend or ""
    finishes = bool(activation) or scale is not None
    if not (finishes and modes.differentiated(x, weight, bias, scale, base)):
        weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
        return _convolution(x, weight, bias, *lists, g, heads, activation, scale, base, *widths, backend)
    out = _bare_conv(x, weight.to(x.dtype), bias, lists, g, heads, *widths, backend)
    if scale is not None:
        if packed_out:
            scale = gather_channels(scale, out_plan)
        out = out * scale.to(out.dtype)[:, :, None, None]
    out = ACTIVATIONS[activation](out)  # each is zero at zero
    if base is None or out_plan is None:
        return out
    return torch.where(channel_mask(*lists.outs, out.shape[1])[:, :, None, None], out, base)


__all__ = ["channel_conv2d", "channel_linear", "packed_channel_conv2d"]
