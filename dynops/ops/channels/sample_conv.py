"""Convolution with weights of its own for each sample, or for each region of a map.

The mathematics, for output pixel p of sample n, taps t, with the weight that region r of p names::

    out[n, o, p] = activation(sum_(t, i) W[n, r(p), o, i, t] x[n, i, q(p, t)] + bias[n, r(p), o])

The gradients, with dy, sum over the pixels p of region r::

    dx[n, i, q]     = sum over (p, t) with q(p, t) = q of W[n, r(p), :, i, t] . dy[n, :, p]
    dW[n, r, o, i, t] = sum_p dy[n, o, p] x[n, i, q(p, t)]        db[n, r, o] = sum_p dy[n, o, p]

``_conv``, ``_conv_input_grad`` and ``_conv_weight_grad`` are the reference in plain PyTorch; the kernels have the
same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry, as_geometry
from ...kernels import cpu
from ...kernels.layout import empty_map
from .. import batching
from .. import checks as tensor_checks
from ..dense_conv import dense_conv, dense_conv_grads
from ..dispatch import Kernels
from ..epilogue import ACTIVATIONS
from ..registry import define, save_inputs, saved_inputs
from . import sample_checks as checks

# ---------------------------------------------------------------------------------- reference


def _as_groups(x: Tensor, g: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """Samples as groups of one sample's channels: ``[1, N * C, H, W]``, as a weight for each needs them."""
    return x.reshape(1, -1, *x.shape[2:]), g._replace(batch=1, groups=g.groups * g.batch)


def _sample_conv(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """The convolution with ``weight`` ``[N or 1, O, C/groups, kh, kw]``."""
    if weight.shape[0] == 1 or g.batch == 0:
        return dense_conv(x, weight.new_zeros(weight.shape[1:]) if g.batch == 0 else weight[0], g)
    # not as groups: torch sums those in an order that is 2.8 times less exact where there is one output
    one = g._replace(batch=1)
    return torch.cat(
        [dense_conv(image, w, one) for image, w in zip(x.split(1), weight.unbind(), strict=True)]
    )


def _sample_conv_grads(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, wanted: list[bool]):
    """(dx, dW) of :func:`_sample_conv`."""
    if g.batch == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    if weight.shape[0] == 1:
        dx, dw = dense_conv_grads(grad, x, weight[0], g, wanted)
        return dx, None if dw is None else dw[None]
    (grouped, gg), (dy, _) = _as_groups(x, g), _as_groups(grad, g)
    dx, dw = dense_conv_grads(dy, grouped, weight.flatten(0, 1), gg, wanted)
    return (dx if dx is None else dx.view_as(x)), (dw if dw is None else dw.view_as(weight))


def _in_region(region: Tensor | None, r: int):
    """bool ``[N, 1, out_h, out_w]``, or True where there are no regions."""
    return True if region is None else (region == r)[:, None]


def _conv(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [N, R, O, C/groups, kh, kw], or [1, R, ...]: shared by all samples
    bias: Tensor | None,  # [N or 1, R, O]
    region: Tensor | None,  # int32 [N, out_h, out_w]; None: R is 1
    geometry: list[int],
    activation: str,
) -> Tensor:  # [N, O, out_h, out_w]; zero where a region is not in [0, R)
    g = as_geometry(geometry)
    out = x.new_zeros(g.batch, weight.shape[2], g.out_h, g.out_w)
    for r in range(weight.shape[1]):
        every = _sample_conv(x, weight[:, r], g)
        if bias is not None:
            every = every + bias[:, r, :, None, None]
        out = every if region is None else torch.where(_in_region(region, r), every, out)
    return ACTIVATIONS[activation](out)


def _conv_input_grad(
    grad: Tensor,  # [N, O, out_h, out_w]
    weight: Tensor,
    region: Tensor | None,
    geometry: list[int],
) -> Tensor:  # [N, C, H, W]
    g = as_geometry(geometry)
    x = grad.new_empty(g.batch, weight.shape[3] * g.groups, g.in_h, g.in_w)  # its values are not read
    dx = torch.zeros_like(x)
    for r in range(weight.shape[1]):
        part = grad * _in_region(region, r)
        dx += _sample_conv_grads(part, x, weight[:, r], g, [True, False])[0]
    return dx


def _conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    region: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    bias: bool,
) -> tuple[Tensor, Tensor]:  # dW as weight_shape; db [N or 1 as the weight, R, O], or [0] where nobody asks
    g = as_geometry(geometry)
    shape = [weight_shape[0], *weight_shape[2:]]
    dw, db = [], []
    for r in range(weight_shape[1]):
        part = grad * _in_region(region, r)
        weight = grad.new_empty(shape)  # its values are not read
        dw.append(_sample_conv_grads(part, x, weight, g, [False, True])[1])
        db.append(part.sum((2, 3)) if weight_shape[0] == g.batch else part.sum((0, 2, 3))[None])
    return torch.stack(dw, 1), torch.stack(db, 1) if bias else grad.new_empty(0)


# ---------------------------------------------------------------------- backends, fakes, schema


KERNELS = Kernels(cpu.sample_conv, "sample_conv")


def _fake_conv(x, weight, bias, region, geometry, activation, backend):
    g = as_geometry(geometry)
    return empty_map(x, (g.batch, weight.shape[2], g.out_h, g.out_w))


def _fake_input_grad(grad, weight, region, geometry, backend):
    g = as_geometry(geometry)
    return empty_map(grad, (g.batch, weight.shape[3] * g.groups, g.in_h, g.in_w))


def _fake_weight_grad(grad, x, region, weight_shape, geometry, bias, backend):
    return grad.new_empty(weight_shape), grad.new_empty(weight_shape[:3] if bias else 0)


# Convolution and its two gradients are bilinear, and the derivatives of each are the other two.


def _input_grad_backward(ctx, dx):
    grad, weight, region, geometry, backend = saved_inputs(ctx)
    need_grad, need_w = ctx.needs_input_grad[:2]
    d_grad = _convolution(dx, weight, None, region, geometry, "", backend) if need_grad else None
    dw = _weight_grad(grad, dx, region, weight.shape, geometry, False, backend)[0] if need_w else None
    return d_grad, dw, None, None, None


def _weight_grad_backward(ctx, dw, db):
    grad, x, region, _, geometry, bias, backend = saved_inputs(ctx)
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = dx = None
    if need_grad:
        d_grad = _convolution(x, dw, db if bias else None, region, geometry, "", backend)
    if need_x:
        dx = _input_grad(grad, dw, region, geometry, backend)
    return d_grad, dx, *[None] * 5


_input_grad = define(
    "weighted_conv_input_grad(Tensor grad, Tensor weight, Tensor? region, SymInt[] geometry, str backend) -> Tensor",
    KERNELS.run("conv_input_grad", _conv_input_grad, like_first=True),
    _fake_input_grad,
    save_inputs,
    _input_grad_backward,
    terms="grad weight",
    vmap=batching.samples("grad", "region", one_or_each=("weight",)),
)
_weight_grad = define(
    "weighted_conv_weight_grad(Tensor grad, Tensor x, Tensor? region, SymInt[] weight_shape, SymInt[] geometry, "
    "bool bias, str backend) -> (Tensor, Tensor)",
    KERNELS.run("conv_weight_grad", _conv_weight_grad),
    _fake_weight_grad,
    save_inputs,
    _weight_grad_backward,
    terms="grad x; grad",
    vmap=batching.sample_weight_grad,
)

# ----------------------------------------------------------------------------------- autograd


def refuse_activation(activation: str, name: str) -> None:
    if activation:
        raise RuntimeError(
            f"dynops::{name}: the fused activation has no gradient; the public functions of dynops.ops "
            "compose it from ops that have one"
        )


def like_bias(db: Tensor, batch: int) -> Tensor:
    """The gradient ``[N or 1, R, O]`` of a bias of ``batch`` samples."""
    return db.sum(0, keepdim=True) if batch == 1 and db.shape[0] != 1 else db


def _setup_context(ctx, inputs, output):
    x, weight, bias, region, geometry, activation, backend = inputs
    refuse_activation(activation, "weighted_conv")
    ctx.save_for_backward(x, weight, region)
    ctx.geometry, ctx.backend, ctx.bias_batch = geometry, backend, 0 if bias is None else bias.shape[0]


def _backward(ctx, grad):
    x, weight, region = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    dx = dw = db = None
    if need_x:
        dx = _input_grad(grad, weight, region, ctx.geometry, ctx.backend)
    if need_w or need_b:
        dw, db = _weight_grad(grad, x, region, weight.shape, ctx.geometry, need_b, ctx.backend)
        db = like_bias(db, ctx.bias_batch) if need_b else None
    return dx, dw if need_w else None, db, None, None, None, None


_convolution = define(
    "weighted_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? region, SymInt[] geometry, str activation, "
    "str backend) -> Tensor",
    KERNELS.run("conv", _conv, like_first=True),
    _fake_conv,
    _setup_context,
    _backward,
    terms="x weight, bias",
    vmap=batching.samples("x", "region", one_or_each=("weight", "bias")),
)
# ------------------------------------------------------------------------------ public functions


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
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
    """2-D convolution of each sample with a weight of its own.

    Equals ``activation(stack([conv2d(x[n], weight[n], bias[n], …) for n in range(N)]))``.

    Args:
        x: ``[N, C, H, W]``, either memory format (channels_last is the fast one); the output has the same one.
        weight: ``[N, O, C/groups, kh, kw]``, of ``x``'s dtype.
        bias: ``[N, O]``, ``[O]`` or None.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``.
        activation: None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "relu2".
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[N, O, out_H, out_W]``, dtype of ``x``. ``x``, ``weight`` and ``bias`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Paper: dynamic filter networks (NIPS 2016).
    """
    x, weight, bias = checks.tensors(x, weight, "weight", {5: "[N, O, C/groups, kh, kw]"}, bias)
    checks.batch_of(weight, "weight", x)
    x, g = checks.geometry(x, weight, (stride, padding, dilation, groups, padding_mode))
    bias = checks.bias_of(bias, {"[N, O]": (x.shape[0], weight.shape[1]), "[O]": weight.shape[1:2]})
    bias = None if bias is None else bias.view(-1, 1, weight.shape[1])
    return finished(_convolution, (x, weight[:, None], bias, None, g), activation, backend)


def region_conv2d(
    x: Tensor,
    weights: Tensor,
    region: Tensor,
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
    """2-D convolution of each output pixel with the weight that its region names.

    Equals ``conv2d(x, weights[:, r], bias[:, r], …)`` at the pixels with ``region == r``; computes each once.

    Args:
        x: ``[N, C, H, W]``, either memory format (channels_last is the fast one); the output has the same one.
        weights: ``[N, R, O, C/groups, kh, kw]``, or ``[R, O, C/groups, kh, kw]`` for all samples; ``x``'s dtype.
        region: integers ``[N, out_H, out_W]`` in ``[0, R)``: each output pixel's region. Any other value is
            an error on a CPU; on a GPU, where the values are not looked at, the pixel's sum and bias are zero.
        bias: ``[N, R, O]`` (with weights of each sample), ``[R, O]`` or None.
        stride, padding, dilation, groups, padding_mode, activation, backend: as in :func:`sample_conv2d`.

    Returns:
        ``[N, O, out_H, out_W]``, dtype of ``x``. ``x``, ``weights`` and ``bias`` get their gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
        RuntimeError: a named backend that cannot run here.

    Paper: dynamic region-aware convolution (DRConv, CVPR 2021).
    """
    shapes = {6: "[N, R, O, C/groups, kh, kw]", 5: "[R, O, C/groups, kh, kw]"}
    x, weights, bias = checks.tensors(x, weights, "weights", shapes, bias)
    checks.not_empty(weights, "region's")
    each = weights.dim() == 6
    if each:
        checks.batch_of(weights, "weights", x)
    weights = weights if each else weights[None]
    x, g = checks.geometry(x, weights, (stride, padding, dilation, groups, padding_mode))
    regions, outputs = weights.shape[1:3]
    region = checks.region_of(region, g, regions, x)
    shapes = {"[N, R, O]": (x.shape[0], regions, outputs)} if each else {}
    bias = checks.bias_of(bias, shapes | {"[R, O]": (regions, outputs)})
    bias = bias[None] if bias is not None and bias.dim() == 2 else bias
    return finished(_convolution, (x, weights, bias, region, g), activation, backend)


def finished(op, arguments: tuple, activation: str | None, backend: str | None) -> Tensor:
    """Runs the op with its activation, fused where no gradient is needed."""
    activation = tensor_checks.activation(activation)
    if not modes.differentiated(*arguments):
        return op(*arguments, activation, backend or "")
    return ACTIVATIONS[activation](op(*arguments, "", backend or ""))


__all__ = ["region_conv2d", "sample_conv2d"]
