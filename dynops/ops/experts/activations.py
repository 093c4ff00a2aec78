"""expert_activation: the activation between the two GEMMs of an expert, gated or not.

The mathematics, of a row z that holds gate and up side by side, or interleaved (g0, u0, g1, u1, …)::

    gated:            h = activation(gate) * up           (SwiGLU, GeGLU, ReGLU: silu, gelu, relu)
    clamped_swiglu:   h = (min(max(up, -limit), limit) + 1) * gate' * sigmoid(alpha * gate'), gate' = min(gate, limit)
    not gated:        h = activation(z)

``_activation`` and ``_activation_grad`` are the reference; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import modes
from ...kernels import cpu
from ..dispatch import Kernels
from ..epilogue import ACTIVATION_GRADS, ACTIVATIONS, DIFFERENTIABLE_GRADS
from ..registry import define
from . import checks

# ---------------------------------------------------------------------------------- reference


def _halves(z: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, each ``[P, I]``."""
    return (z[:, ::2], z[:, 1::2]) if interleaved else z.chunk(2, 1)


def _activation(
    z: Tensor,  # [P, 2 * I], not gated [P, I]
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,  # of clamped_swiglu, as limit
    limit: float,
) -> Tensor:  # [P, I]
    if not gated:
        return ACTIVATIONS[activation](z)
    gate, up = _halves(z, interleaved)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    return ACTIVATIONS[activation](gate) * up


def _activation_grad(
    grad: Tensor, z: Tensor, activation, gated, interleaved, alpha, limit, grads=ACTIVATION_GRADS
) -> Tensor:
    """dz ``[P, 2 * I]`` from ``grad`` ``[P, I]``."""
    if not gated:
        return grads[activation](grad, z)
    gate, up = _halves(z, interleaved)
    if activation == "clamped_swiglu":
        clamped = gate.clamp(max=limit)
        s = torch.sigmoid(alpha * clamped)
        slope = s * (1 + alpha * clamped * (1 - s))
        d_gate = torch.where(gate <= limit, grad * (up.clamp(-limit, limit) + 1) * slope, 0)
        d_up = torch.where(up.abs() <= limit, grad * clamped * s, 0)
    else:
        d_gate, d_up = grads[activation](grad * up, gate), grad * ACTIVATIONS[activation](gate)
    return torch.stack((d_gate, d_up), 2).reshape(z.shape) if interleaved else torch.cat((d_gate, d_up), 1)


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.experts, "experts")


def _fake(z, activation, gated, interleaved, alpha, limit, backend):
    return z.new_empty(z.shape[0], z.shape[1] // 2 if gated else z.shape[1])


def _fake_grad(grad, z, activation, gated, interleaved, alpha, limit, backend):
    return z.new_empty(z.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _derivative(grad: Tensor, z: Tensor, options: tuple) -> Tensor:
    """dz by the kernel; where a derivative of it may be asked for, in plain PyTorch, which has them of any order."""
    if modes.differentiated(grad, z):
        return _activation_grad(grad, z, *options[:-1], DIFFERENTIABLE_GRADS)
    return _grad(grad, z, *options)


def _backward(ctx, grad):
    return _derivative(grad, ctx.saved_tensors[0], ctx.options), *[None] * len(ctx.options)


def _jvp(op, primals, tangents):
    z, *options = primals
    gated, interleaved = options[1:3]
    rows = z.shape[0], z.shape[1] // 2 if gated else z.shape[1]
    slope = _derivative(z.new_ones(rows), z, tuple(options)) * tangents[0]
    return sum(_halves(slope, interleaved)) if gated else slope


def _refuse(ctx, inputs, output):
    raise RuntimeError(
        "dynops::expert_activation_grad: has no derivative; that of dynops.ops.expert_activation composes it in "
        "plain PyTorch where one is asked for"
    )


_OPTIONS = "str activation, bool gated, bool interleaved, float alpha, float limit, str backend"
_grad = define(
    f"expert_activation_grad(Tensor grad, Tensor z, {_OPTIONS}) -> Tensor",
    _KERNELS.run("activation_grad", _activation_grad),
    _fake_grad,
    _refuse,
    _refuse,
)
_apply = define(
    f"expert_activation(Tensor z, {_OPTIONS}) -> Tensor",
    _KERNELS.run("activation", _activation),
    _fake,
    _setup_context,
    _backward,
    jvp=_jvp,
)


def expert_activation(
    z: Tensor,
    activation: str = "silu",
    *,
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    backend: str | None = None,
) -> Tensor:
    """The activation between the two GEMMs of an expert.

    Args:
        z: ``[P, 2 * I]`` rows with gate and up side by side; not gated: ``[P, I]``.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU), "relu6", "hardswish", "relu2",
            None (bilinear); gated only: "clamped_swiglu" (gpt-oss).
        gated: whether z holds gate and up.
        interleaved: gate and up take turns: ``z[:, 0::2]`` and ``z[:, 1::2]``.
        alpha, limit: of clamped_swiglu: ``(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)`` with
            ``g = min(gate, limit)``.
        backend: "cpp", "triton" or "reference"; None takes the fastest.

    Returns:
        ``[P, I]``, dtype of ``z``; ``z`` gets its gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: GLU variants improve transformer (2020).
    """
    checks.rows(z, "z")
    activation = checks.activation(activation, gated)
    if gated and z.shape[1] % 2:
        raise ValueError(f"z: expected an even number of columns, gate and up, got shape {tuple(z.shape)}")
    return _apply(z, activation, gated, interleaved, float(alpha), float(limit), backend or "")
