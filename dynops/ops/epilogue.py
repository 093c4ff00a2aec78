"""What an op does to its result before it writes it: affine map, gate, residual, activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
}


def apply_epilogue(
    rows: Tensor,  # [P, O]
    activation: str,
    scale: Tensor | None,  # [O]
    shift: Tensor | None,  # [O]
    gate: Tensor | None,  # [P]
    residual: Tensor | None,  # [P, O]
) -> Tensor:
    """``activation(gate * (scale * rows + shift) + residual)``, in plain PyTorch with gradients."""
    if scale is not None:
        rows = rows * scale.to(rows.dtype)
    if shift is not None:
        rows = rows + shift.to(rows.dtype)
    if gate is not None:
        rows = rows * gate.to(rows.dtype)[:, None]
    if residual is not None:
        rows = rows + residual
    return ACTIVATIONS[activation](rows)
