"""Activations and their gradients by name, and the reference of an epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import modes
from ..kernels.epilogue import NOTHING as NOTHING
from ..kernels.epilogue import Epilogue as Epilogue

ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "relu2": lambda y: F.relu(y).square(),
}
_aten = torch.ops.aten
ACTIVATION_GRADS = {  # (grad, input) -> the input's gradient
    "": lambda g, z: g,
    "relu": lambda g, z: torch.where(z > 0, g, 0),
    "relu6": lambda g, z: torch.where((z > 0) & (z < 6), g, 0),
    "silu": lambda g, z: _aten.silu_backward(g, z),
    "gelu": lambda g, z: _aten.gelu_backward(g, z),
    "gelu_tanh": lambda g, z: _aten.gelu_backward(g, z, approximate="tanh"),
    "hardswish": lambda g, z: _aten.hardswish_backward(g, z),
    "relu2": lambda g, z: g * 2 * F.relu(z),
}


def _silu_grad(g: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return g * s * (1 + z * (1 - s))


# the same, with derivatives of their own: aten's silu_backward has none
DIFFERENTIABLE_GRADS = {**ACTIVATION_GRADS, "silu": _silu_grad}


def apply_epilogue(
    rows: Tensor,  # [P, O]
    activation: str,
    scale: Tensor | None,  # [O]
    shift: Tensor | None,  # [O]
    gate: Tensor | None,  # [P]
    residual: Tensor | None,  # [P, O]
) -> Tensor:
    """An :class:`Epilogue` of rows in plain PyTorch, with gradients."""
    plain = not modes.differentiated(rows, scale, shift)
    # one pass over the rows; its backward has more kernels
    if plain and scale is not None and shift is not None:
        rows = torch.addcmul(shift.to(rows.dtype), rows, scale.to(rows.dtype))
        shift = None
    elif scale is not None:
        rows = rows * scale.to(rows.dtype)
    if shift is not None:
        rows = rows + shift.to(rows.dtype)
    if gate is not None:
        rows = rows * gate.to(rows.dtype)[:, None]
    if residual is not None:
        rows = rows + residual
    own = plain and scale is not None and activation == "relu" and not modes.differentiated(rows)
    return rows.relu_() if own else ACTIVATIONS[activation](rows)
