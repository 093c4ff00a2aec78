"""The C++ kernels of experts: prepares memory for ``csrc/cpu/expert*.cpp``.

Same signatures as the references in ``ops/experts.py``, ``ops/expert_activations.py`` and ``ops/expert_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .cpp import _ACTIVATIONS, _bf16_dot

if backends.has_binary():
    _cpu_grouped_linear = torch.ops.dynops.cpu_grouped_linear.default
    _cpu_experts_mlp = torch.ops.dynops.cpu_experts_mlp.default


# ------------------------------------------------------------------------------------ products


def _rows(x: Tensor) -> Tensor:
    """Rows as the kernels multiply them: bfloat16 where there is an instruction for its pairs, else float32."""
    dot = x.dtype == torch.bfloat16 and _bf16_dot()
    return x.contiguous() if dot else x.to(torch.float32).contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """Contiguous along the last dimension; slices and views of the others stay where they are."""
    return weight if weight.stride(2) == 1 else weight.contiguous()


def _optional(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if t is None else t.to(dtype or t.dtype).contiguous()


def linear(x, weight, scale, bias, row_weight, order, offsets, position, packed_in, packed_out, transposed, activation):  # fmt: skip
    """See ``ops.experts._linear``. Accumulates in float32, whatever the dtype."""
    outputs = weight.shape[2] if transposed else weight.shape[1]
    rows = order.shape[0] if packed_out else position.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype if packed_out else torch.float32)
    tensors = (
        _rows(x),
        _matrix(weight),
        _optional(scale),
        _optional(bias),
        _optional(row_weight, torch.float32),
    )
    options = packed_in, packed_out, transposed, _ACTIVATIONS[activation]
    _cpu_grouped_linear(*tensors, order, offsets, position.shape[1], *options, out)
    return out.to(x.dtype)


def mlp(
    x, up, down, up_scale, down_scale, up_bias, down_bias, row_weight, order, offsets, position,
    activation, gated, interleaved, up_transposed, down_transposed, alpha, limit,
):  # fmt: skip
    """See ``ops.experts._mlp``. Accumulates in float32, whatever the dtype."""
    rows = _rows(x)
    inner = down.shape[1] if down_transposed else down.shape[2]
    h = torch.empty(order.shape[0], inner, dtype=rows.dtype)
    out = torch.empty(x.shape, dtype=torch.float32)
    extras = (up_scale, down_scale, up_bias, down_bias)
    tensors = rows, _matrix(up), _matrix(down), *map(_optional, extras), _optional(row_weight, torch.float32)
    clamped = activation == "clamped_swiglu"
    options = 0 if clamped else _ACTIVATIONS[activation], gated, clamped, interleaved
    layout = up_transposed, down_transposed, alpha, limit
    _cpu_experts_mlp(*tensors, order, offsets, position.shape[1], *options, *layout, h, out)
    return out.to(x.dtype)
