"""Rows of tokens to rows of a plan and back in Triton: ``gather``, ``combine``, ``dots``.

Signatures and meaning are those of the reference in ``dynops/ops/experts/rows.py``. Sums are in float32 and in the
order of the choices: bitwise the same in every run. What dropped pairs name is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous
from . import gemm, tiling
from .launch import cdiv, launch, power_of_2

# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows", "experts", "topk"])
def gather_pairs_kernel(
    x, out, weight, order, offsets, rows, experts, topk, channels,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[p] = weight * x[token of row p], zero where the pair is dropped."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    inside = row < rows
    live = row < tl.load(offsets + experts)  # which is at most rows
    pair = tl.load(order + row, mask=live, other=0)
    token = pair // topk
    if WIDE:
        token = token.to(tl.int64)
        row = row.to(tl.int64)
    present = (channel < channels)[None, :]
    value = tl.load(x + token[:, None] * channels + channel[None, :], mask=live[:, None] & present, other=0.0)
    if weight is not None:
        factor = tl.load(weight + pair, mask=live, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * channels + channel[None, :], value, mask=inside[:, None] & present)


@triton.jit(do_not_specialize=["tokens", "topk"])
def combine_pairs_kernel(
    rows, out, weight, position, tokens, topk, channels, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """out[t] = the sum over the choices k of weight[t, k] * rows[position[t, k]]."""
    token = tl.program_id(0) * M + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    inside = token < tokens
    present = (channel < channels)[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for k in tl.range(topk, loop_unroll_factor=4):
        row = tl.load(position + token * topk + k, mask=inside, other=-1)
        live = row >= 0
        if WIDE:
            row = row.to(tl.int64)
        at = row[:, None] * channels + channel[None, :]
        value = tl.load(rows + at, mask=live[:, None] & present, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + token * topk + k, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += value
    if WIDE:
        token = token.to(tl.int64)
    at = token[:, None] * channels + channel[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & present)


@triton.jit(do_not_specialize=["pairs", "topk"])
def pair_dots_kernel(
    x, rows, out, position, pairs, topk, channels,
    PACKED: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[pair] = rows[position[pair]] . x of the pair's token (PACKED: of that row), 0 where it is dropped."""
    pair = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.load(position + pair, mask=pair < pairs, other=-1)
    live = row >= 0
    x_row = row if PACKED else pair // topk
    if WIDE:
        row = row.to(tl.int64)
        x_row = x_row.to(tl.int64)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, channels, N):
        channel = start + tl.arange(0, N)
        mask = live[:, None] & (channel < channels)[None, :]
        a = tl.load(x + x_row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        b = tl.load(rows + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + pair, tl.sum(acc, 1), mask=pair < pairs)


# ----------------------------------------------------------------------------------- launchers


def gather(x: Tensor, weight: Tensor | None, order, offsets, position: Tensor) -> Tensor:
    """See ``ops.experts.rows._gather``."""
    x, out = x.contiguous(), x.new_empty(order.shape[0], x.shape[1])
    if out.numel() == 0:
        return out
    tile = tiling.direct_tile(x.shape[1])
    weight = contiguous(weight)
    with gemm.on_device(x):
        launch(gather_pairs_kernel, *tiling.grid(out, tile))(
            x, out, weight, order, offsets, out.shape[0], offsets.shape[0] - 1, position.shape[1], x.shape[1],
            WIDE=gemm.is_wide(x, out), **tile,
        )  # fmt: skip
    return out


def combine(rows: Tensor, weight: Tensor | None, order, offsets, position: Tensor) -> Tensor:
    """See ``ops.experts.rows._combine``."""
    out = rows.new_empty(position.shape[0], rows.shape[1])
    if out.numel() == 0:
        return out
    rows, tile = rows.contiguous(), tiling.direct_tile(rows.shape[1])
    weight = contiguous(weight)
    with gemm.on_device(rows):
        launch(combine_pairs_kernel, *tiling.grid(out, tile))(
            rows, out, weight, position, *position.shape, rows.shape[1], WIDE=gemm.is_wide(rows, out), **tile
        )
    return out


def dots(x: Tensor, rows: Tensor, packed: bool, order, offsets, position: Tensor) -> Tensor:
    """See ``ops.experts.rows._dots``: float32 ``[T, K]``."""
    out = torch.empty(position.shape, dtype=torch.float32, device=rows.device)
    if out.numel() == 0:
        return out
    x, rows = x.contiguous(), rows.contiguous()
    n = min(256, max(16, power_of_2(rows.shape[1])))
    tile = {"M": 2048 // n, "N": n, "num_warps": 4}
    with gemm.on_device(rows):
        launch(pair_dots_kernel, cdiv(out.numel(), tile["M"]))(
            x, rows, out, position, out.numel(), position.shape[1], rows.shape[1], PACKED=packed,
            WIDE=gemm.is_wide(x, rows), **tile,
        )  # fmt: skip
    return out
