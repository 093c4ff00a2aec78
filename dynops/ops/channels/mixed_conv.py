"""Convolution of each sample with a mixture of a few weights.

The mathematics, for sample n with its shares of E weights::

    out[n] = activation(conv(x[n], W[n]) + bias[n])        with W[n] = sum_e mix[n, e] weight[e]

The gradients, with each sample's own dW[n] (``sample_conv.py``)::

    dweight[e] = sum_n mix[n, e] dW[n]        dmix[n, e] = <dW[n], weight[e]>

``_conv`` is the reference in plain PyTorch; the kernel has the same signature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...geometry import as_geometry
from ...kernels.layout import empty_map
from .. import batching
from ..registry import define
from . import sample_checks as checks
from .sample_conv import KERNELS, _input_grad, _weight_grad, finished, like_bias, refuse_activation
from .sample_conv import _conv as _sample_conv


def _as_rows(weight: Tensor) -> Tensor:
    """``flatten(1)``, which the vmap of batched gradients does not know."""
    return weight.reshape(weight.shape[0], weight.shape[1:].numel())


def _mix(mix: Tensor, weight: Tensor) -> Tensor:
    """``[N, 1, O, C/groups, kh, kw]``: each sample's sum of the ``weight[e]``."""
    return (mix.to(weight.dtype) @ _as_rows(weight)).view(-1, 1, *weight.shape[1:])


def _conv(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [E, O, C/groups, kh, kw]
    mix: Tensor,  # [N, E]
    bias: Tensor | None,  # [N or 1, 1, O]
    geometry: list[int],
    activation: str,
) -> Tensor:  # [N, O, out_h, out_w]
    return _sample_conv(x, _mix(mix, weight), bias, None, geometry, activation)


def _fake(x, weight, mix, bias, geometry, activation, backend):
    g = as_geometry(geometry)
    return empty_map(x, (g.batch, weight.shape[1], g.out_h, g.out_w))


def _setup_context(ctx, inputs, output):
    x, weight, mix, bias, geometry, activation, backend = inputs
    refuse_activation(activation, "mixed_conv")
    ctx.save_for_backward(x, weight, mix)
    ctx.geometry, ctx.backend, ctx.bias_batch = geometry, backend, 0 if bias is None else bias.shape[0]


def _inner_products(each: Tensor, weight: Tensor) -> Tensor:
    """``each @ weight.flatten(1).t()``, ``[N, E]``, output by output: one float32 sum over the 14400 numbers of a weight
    was 2.5 times as far from the exact one."""
    per_output = each.view(each.shape[0], weight.shape[1], math.prod(weight.shape[2:])).transpose(0, 1)
    by_output = weight.reshape(*weight.shape[:2], math.prod(weight.shape[2:]))
    return torch.bmm(per_output, by_output.permute(1, 2, 0)).sum(0)


def _backward(ctx, grad):
    x, weight, mix = ctx.saved_tensors
    need_x, need_w, need_mix, need_b = ctx.needs_input_grad[:4]
    dx = dw = dmix = db = None
    if need_x:
        dx = _input_grad(grad, _mix(mix, weight), None, ctx.geometry, ctx.backend)
    if need_w or need_mix or need_b:
        shape = [grad.shape[0], 1, *weight.shape[1:]]
        each, db = _weight_grad(grad, x, None, shape, ctx.geometry, need_b, ctx.backend)
        each = _as_rows(each)
        dw = (mix.to(each.dtype).t() @ each).view_as(weight) if need_w else None
        dmix = _inner_products(each, weight).to(mix.dtype) if need_mix else None
        db = like_bias(db, ctx.bias_batch) if need_b else None
    return dx, dw, dmix, db, None, None, None


_mixed = define(
    "mixed_conv(Tensor x, Tensor weight, Tensor mix, Tensor? bias, SymInt[] geometry, str activation, "
    "str backend) -> Tensor",
    KERNELS.run("mixed_conv", _conv, like_first=True),
    _fake,
    _setup_context,
    _backward,
    terms="x weight mix, bias",
    vmap=batching.samples("x", "mix", one_or_each=("bias",)),
)


def mixed_conv2d(
    x: Tensor,
    weights: Tensor,
    mix: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution of each sample with its own mixture of a few weights.

    Equals ``sample_conv2d(x, einsum("ne,eoikl->noikl", mix, weights), mix @ bias, …)``. On a CPU the weights are
    mixed as the kernel reads them, without ``[N, O, C, kh, kw]`` in memory; where a sample has one pixel and a weight
    2**17 elements or more, the outputs of all weights are, which then takes half of the time.

    Args:
        x: ``[N, C, H, W]``, either memory format (channels_last is the fast one); the output has the same one.
        weights: ``[E, O, C/groups, kh, kw]``, of ``x``'s dtype.
        mix: ``[N, E]``, any floating dtype: how much of each weight a sample takes.
        bias: ``[E, O]`` (mixed as the weights are), ``[O]`` (added as it is) or None.
        stride, padding, dilation, groups, padding_mode, activation, backend: as in :func:`sample_conv2d`.

    Returns:
        ``[N, O, out_H, out_W]``, dtype of ``x``. ``x``, ``weights``, ``mix`` and ``bias`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Papers: CondConv (NeurIPS 2019), dynamic convolution (CVPR 2020).
    """
    x, weights, bias = checks.tensors(x, weights, "weights", {5: "[E, O, C/groups, kh, kw]"}, bias)
    checks.not_empty(weights, "to mix")
    x, g = checks.geometry(x, weights, (stride, padding, dilation, groups, padding_mode))
    experts, outputs = weights.shape[:2]
    checks.mix_of(mix, x, experts)
    bias = checks.bias_of(bias, {"[E, O]": (experts, outputs), "[O]": (outputs,)})
    if bias is not None:
        bias = (mix.to(bias.dtype) @ bias if bias.dim() == 2 else bias).view(-1, 1, outputs)
    return finished(_mixed, (x, weights, mix, bias, g), activation, backend)


__all__ = ["mixed_conv2d"]
