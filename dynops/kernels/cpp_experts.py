"""The C++ kernels of experts: prepares memory for ``csrc/cpu/expert*.cpp``.

Same signatures as the references in ``ops/experts.py``, ``ops/expert_activations.py`` and ``ops/expert_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import cpp

# -------------------------------------------------------------- gradients of weights, rows, activations

if backends.has_binary():
    _cpu_weight_grad = torch.ops.dynops.cpu_expert_weight_grad.default
    _cpu_activation = torch.ops.dynops.cpu_expert_activation.default
    _cpu_activation_grad = torch.ops.dynops.cpu_expert_activation_grad.default
    _cpu_gather = torch.ops.dynops.cpu_gather_pairs.default
    _cpu_combine = torch.ops.dynops.cpu_combine_pairs.default
    _cpu_dots = torch.ops.dynops.cpu_pair_dots.default

# csrc/cpu/engine.h: Activation
_ACTIVATIONS = cpp._ACTIVATIONS | {"clamped_swiglu": len(cpp._NAMES)}


def _row_weights(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


def weight_grad(grad, x, row_weight, order, offsets, position, packed_grad, packed_x, transposed, bias):
    """See ``ops.experts._weight_grad``. Accumulates in float32, whatever the dtype."""
    experts, outputs, inputs = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    dw = grad.new_empty(experts, *((inputs, outputs) if transposed else (outputs, inputs)))
    db = grad.new_empty((experts, outputs) if bias else (0,))
    rows = grad.contiguous(), x.contiguous(), _row_weights(row_weight)
    _cpu_weight_grad(*rows, order, offsets, position, packed_grad, packed_x, transposed, dw, db if bias else None)  # fmt: skip
    return dw, db


def activation(z, name, gated, interleaved, alpha, limit) -> Tensor:
    """See ``ops.expert_activations._activation``. Computes in float32, whatever the dtype."""
    h = z.new_empty(z.shape[0], z.shape[1] // 2 if gated else z.shape[1])
    _cpu_activation(z.contiguous(), _ACTIVATIONS[name], gated, interleaved, alpha, limit, h)
    return h


def activation_grad(grad, z, name, gated, interleaved, alpha, limit) -> Tensor:
    """See ``ops.expert_activations._activation_grad``. Computes in float32, whatever the dtype."""
    dz = z.new_empty(z.shape)
    _cpu_activation_grad(grad.contiguous(), z.contiguous(), _ACTIVATIONS[name], gated, interleaved, alpha, limit, dz)  # fmt: skip
    return dz


def gather(x, weight, order, offsets, position) -> Tensor:
    """See ``ops.expert_rows._gather``."""
    rows = x.new_empty(order.shape[0], x.shape[1])
    _cpu_gather(x.contiguous(), _row_weights(weight), order, offsets, position, rows)
    return rows


def combine(rows, weight, order, offsets, position) -> Tensor:
    """See ``ops.expert_rows._combine``. Accumulates in float32, whatever the dtype."""
    out = rows.new_empty(position.shape[0], rows.shape[1])
    _cpu_combine(rows.contiguous(), _row_weights(weight), order, offsets, position, out)
    return out


def dots(x, rows, packed, order, offsets, position) -> Tensor:
    """See ``ops.expert_rows._dots``."""
    out = rows.new_empty(position.shape, dtype=torch.float32)
    _cpu_dots(x.contiguous(), rows.contiguous(), packed, order, offsets, position, out)
    return out
