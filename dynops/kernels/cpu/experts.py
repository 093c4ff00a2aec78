"""The C++ kernels of experts. Same signatures as the references in ``ops/experts``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import contiguous
from .engine import ACTIVATIONS, CPP, bf16_dot


def _rows(x: Tensor) -> Tensor:
    """Rows as the kernels multiply them: bfloat16 where there is an instruction for its pairs, else float32."""
    dot = x.dtype == torch.bfloat16 and bf16_dot()
    return x.contiguous() if dot else x.to(torch.float32).contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """Contiguous along the last dimension; slices and views of the others stay where they are."""
    return weight if weight.stride(2) == 1 else weight.contiguous()


def linear(x, weight, scale, bias, row_weight, order, offsets, position, packed_in, packed_out, transposed, activation):  # fmt: skip
    """See ``ops.experts.linear._linear``. Accumulates in float32, whatever the dtype."""
    outputs = weight.shape[2] if transposed else weight.shape[1]
    rows = order.shape[0] if packed_out else position.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype if packed_out else torch.float32, device="cpu")
    extras = contiguous(scale), contiguous(bias), contiguous(row_weight, torch.float32)
    options = packed_in, packed_out, transposed, ACTIVATIONS[activation]
    CPP.grouped_linear(_rows(x), _matrix(weight), *extras, order, offsets, position, *options, out)
    return out.to(x.dtype)


def mlp(
    x, up, down, up_scale, down_scale, up_bias, down_bias, row_weight, order, offsets, position,
    activation, gated, interleaved, up_transposed, down_transposed, alpha, limit,
):  # fmt: skip
    """See ``ops.experts.mlp._mlp``. Accumulates in float32, whatever the dtype."""
    rows = _rows(x)
    inner = down.shape[1] if down_transposed else down.shape[2]
    h = torch.empty(order.shape[0], inner, dtype=rows.dtype, device="cpu")
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    extras = (up_scale, down_scale, up_bias, down_bias)
    tensors = (
        rows,
        _matrix(up),
        _matrix(down),
        *map(contiguous, extras),
        contiguous(row_weight, torch.float32),
    )
    options = ACTIVATIONS[activation], gated, interleaved
    layout = up_transposed, down_transposed, alpha, limit
    CPP.experts_mlp(*tensors, order, offsets, position, *options, *layout, h, out)
    return out.to(x.dtype)


def weight_grad(grad, x, row_weight, order, offsets, position, packed_grad, packed_x, transposed, bias):
    """See ``ops.experts.linear._weight_grad``. Accumulates in float32, whatever the dtype."""
    experts, outputs, inputs = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    dw = grad.new_empty(experts, *((inputs, outputs) if transposed else (outputs, inputs)))
    db = grad.new_empty((experts, outputs) if bias else (0,))
    rows = grad.contiguous(), x.contiguous(), contiguous(row_weight, torch.float32)
    CPP.expert_weight_grad(*rows, order, offsets, position, packed_grad, packed_x, transposed, dw, db if bias else None)  # fmt: skip
    return dw, db


def activation(z, name, gated, interleaved, alpha, limit) -> Tensor:
    """See ``ops.experts.activations._activation``. Computes in float32, whatever the dtype."""
    h = z.new_empty(z.shape[0], z.shape[1] // 2 if gated else z.shape[1])
    CPP.expert_activation(z.contiguous(), ACTIVATIONS[name], gated, interleaved, alpha, limit, h)
    return h


def activation_grad(grad, z, name, gated, interleaved, alpha, limit) -> Tensor:
    """See ``ops.experts.activations._activation_grad``. Computes in float32, whatever the dtype."""
    dz = z.new_empty(z.shape)
    CPP.expert_activation_grad(grad.contiguous(), z.contiguous(), ACTIVATIONS[name], gated, interleaved, alpha, limit, dz)  # fmt: skip
    return dz


def gather(x, weight, order, offsets, position) -> Tensor:
    """See ``ops.experts.rows._gather``."""
    rows = x.new_empty(order.shape[0], x.shape[1])
    CPP.gather_pairs(x.contiguous(), contiguous(weight, torch.float32), order, offsets, position, rows)
    return rows


def combine(rows, weight, order, offsets, position) -> Tensor:
    """See ``ops.experts.rows._combine``. Accumulates in float32, whatever the dtype."""
    out = rows.new_empty(position.shape[0], rows.shape[1])
    CPP.combine_pairs(rows.contiguous(), contiguous(weight, torch.float32), order, offsets, position, out)
    return out


def dots(x, rows, packed, order, offsets, position) -> Tensor:
    """See ``ops.experts.rows._dots``."""
    out = rows.new_empty(position.shape, dtype=torch.float32)
    CPP.pair_dots(x.contiguous(), rows.contiguous(), packed, order, offsets, position, out)
    return out
