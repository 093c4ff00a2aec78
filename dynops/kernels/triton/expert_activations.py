"""The activation between the two GEMMs of an expert in Triton, alone and as a device function.

Signatures and meaning are those of the reference in ``dynops/ops/experts/activations.py``. A tile of gate and up
is one tensor ``[M, 2 * HALF]``: of interleaved columns ``2 * first`` and on, else HALF columns of gate and the
HALF of up that go with them. So gate and up come from one matrix product, and loads stay vectors both ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm, tiling
from .gemm import activate
from .launch import launch

CLAMPED = "clamped_swiglu"

# --------------------------------------------------------------------------- device functions


@triton.jit
def pair_columns(first, inner, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The columns of a row of gate and up that give h's columns ``first`` to ``first + HALF``, and which exist."""
    j = tl.arange(0, 2 * HALF)
    if INTERLEAVED:
        column = 2 * first + j
        mask = column < 2 * inner
    else:
        mask = first + j % HALF < inner
        column = (j // HALF) * inner + first + j % HALF
    return column, mask


@triton.jit
def split_pairs(z, INTERLEAVED: tl.constexpr):
    """Gate and up ``[M, HALF]`` of a tile whose columns are those of :func:`pair_columns`."""
    HALF: tl.constexpr = z.shape[1] // 2
    if INTERLEAVED:
        pairs = tl.reshape(z, (z.shape[0], HALF, 2))
    else:
        pairs = tl.permute(tl.reshape(z, (z.shape[0], 2, HALF)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def join_pairs(gate, up, INTERLEAVED: tl.constexpr):
    """The tile that :func:`split_pairs` splits."""
    pairs = tl.join(gate, up)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, (0, 2, 1))
    return tl.reshape(pairs, (gate.shape[0], 2 * gate.shape[1]))


@triton.jit
def glu(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """``activation(gate) * up``, or gpt-oss's clamped SwiGLU. NaN stays NaN."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        h = (up + 1) * gate * tl.sigmoid(alpha * gate)
    else:
        h = activate(gate, ACTIVATION) * up
    return h


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of the activation at z, in float32."""
    if ACTIVATION == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "relu6":
        d = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        d = s * (1 + z * (1 - s))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":  # that of z * sigmoid(u); 1 - sigmoid(u) would lose digits to its factor
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        d = tl.sigmoid(u) * (1 + z * tl.sigmoid(-u) * 1.5957691216057308 * (1 + 0.134145 * z * z))
    elif ACTIVATION == "hardswish":
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, z / 3 + 0.5, 1.0))
    elif ACTIVATION == "relu2":
        d = tl.where(z > 0, 2 * z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "")
        d = tl.full(z.shape, 1.0, tl.float32)
    return d


@triton.jit
def glu_grad(grad, gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The gradients of gate and up."""
    if ACTIVATION == "clamped_swiglu":
        clamped = tl.where(gate > limit, limit, gate)
        bounded = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        s = tl.sigmoid(alpha * clamped)
        d_gate = grad * (bounded + 1) * s * (1 + alpha * clamped * (1 - s))
        d_gate = tl.where(gate > limit, 0.0, d_gate)
        d_up = tl.where((up > limit) | (up < -limit), 0.0, grad * clamped * s)
    else:
        d_gate = grad * up * slope(gate, ACTIVATION)
        d_up = grad * activate(gate, ACTIVATION)
    return d_gate, d_up


@triton.jit
def _places(rows, inner, M: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
            WIDE: tl.constexpr):  # fmt: skip
    """The positions of a program's tile in z and in h, with masks."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    first = tl.program_id(1) * N
    column = first + tl.arange(0, N)
    inside = row < rows
    if WIDE:
        row = row.to(tl.int64)
    h_at = row[:, None] * inner + column[None, :]
    h_mask = inside[:, None] & (column < inner)[None, :]
    if GATED:
        z_column, z_present = pair_columns(first, inner, N, INTERLEAVED)
        z_at = row[:, None] * (2 * inner) + z_column[None, :]
        z_mask = inside[:, None] & z_present[None, :]
    else:
        z_at = h_at
        z_mask = h_mask
    return z_at, z_mask, h_at, h_mask


# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows"])
def activation_kernel(
    z, h, rows, inner, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    z_at, z_mask, h_at, h_mask = _places(rows, inner, M, N, GATED, INTERLEAVED, WIDE)
    value = tl.load(z + z_at, mask=z_mask, other=0.0).to(tl.float32)
    if GATED:
        gate, up = split_pairs(value, INTERLEAVED)
        value = glu(gate, up, alpha, limit, ACTIVATION)
    else:
        value = activate(value, ACTIVATION)
    tl.store(h + h_at, value.to(h.dtype.element_ty), mask=h_mask)


@triton.jit(do_not_specialize=["rows"])
def activation_grad_kernel(
    grad, z, dz, rows, inner, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    z_at, z_mask, h_at, h_mask = _places(rows, inner, M, N, GATED, INTERLEAVED, WIDE)
    dh = tl.load(grad + h_at, mask=h_mask, other=0.0).to(tl.float32)
    value = tl.load(z + z_at, mask=z_mask, other=0.0).to(tl.float32)
    if GATED:
        gate, up = split_pairs(value, INTERLEAVED)
        d_gate, d_up = glu_grad(dh, gate, up, alpha, limit, ACTIVATION)
        value = join_pairs(d_gate, d_up, INTERLEAVED)
    else:
        value = dh * slope(value, ACTIVATION)
    tl.store(dz + z_at, value.to(dz.dtype.element_ty), mask=z_mask)


# ----------------------------------------------------------------------------------- launchers


def activation(z: Tensor, name: str, gated: bool, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """See ``ops.experts.activations._activation``; computed in float32, rounded once."""
    h = z.new_empty(z.shape[0], z.shape[1] // 2 if gated else z.shape[1])
    _launch(activation_kernel, h, (z.contiguous(), h), name, gated, interleaved, alpha, limit)
    return h


def activation_grad(
    grad: Tensor, z: Tensor, name: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    """See ``ops.experts.activations._activation_grad``."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    tensors = (grad.contiguous(), z.contiguous(), dz)
    _launch(activation_grad_kernel, grad, tensors, name, gated, interleaved, alpha, limit)
    return dz


def _launch(kernel, h: Tensor, tensors, activation, gated, interleaved, alpha, limit) -> None:
    if h.numel() == 0:
        return
    rows, inner = h.shape
    tile = tiling.direct_tile(inner)
    with gemm.on_device(h):
        launch(kernel, *tiling.grid(h, tile))(
            *tensors, rows, inner, alpha, limit, ACTIVATION=activation, GATED=gated,
            INTERLEAVED=gated and interleaved, WIDE=gemm.is_wide(*tensors), **tile,
        )  # fmt: skip
