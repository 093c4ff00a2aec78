"""The weight gradient of grouped GEMMs in Triton.

A program reduces one slice of an expert's rows, for one tile of its weight, into that slice's own copy of the
gradient; where there are several slices, a second pass adds the float32 copies. No atomics: the result is bitwise
reproducible. How many slices there are follows from P and E; where one begins, from the expert's own rows on the
device. Experts without rows get zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous
from . import gemm, tiling
from .launch import cdiv, launch
from .pixels_weight_grad import chunk_rows

# ------------------------------------------------------------------------------------- kernels


@triton.jit
def slice_of(offsets, expert, number, slices, BLOCK: tl.constexpr):
    """The rows [first, last) of a slice of an expert, a whole number of blocks but for the last."""
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    chunk = tl.cdiv(tl.cdiv(end - begin, slices), BLOCK) * BLOCK
    first = begin + number * chunk
    return first, tl.minimum(first + chunk, end)


@triton.jit
def _grad_rows(grad, row_weight, order, row, inside, topk, column, mask, channels, PACKED: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """Rows of dy ``[rows, columns]``, times their weights, in grad's dtype."""
    at = row
    if not PACKED or row_weight is not None:
        pair = tl.load(order + row, mask=inside, other=0)
        if not PACKED:
            at = pair // topk
    if WIDE:
        at = at.to(tl.int64)
    dy = tl.load(
        grad + at[:, None] * channels + column[None, :], mask=inside[:, None] & mask[None, :], other=0.0
    )
    if row_weight is not None:
        factor = tl.load(row_weight + pair, mask=inside, other=0.0).to(tl.float32)
        dy = (dy.to(tl.float32) * factor[:, None]).to(dy.dtype)
    return dy


@triton.jit(do_not_specialize=["topk", "slices"])
def weight_grad_kernel(
    grad, x, dw, row_weight, order, offsets, topk, slices, n_size, k_size, dw_n, dw_k,
    PACKED_GRAD: tl.constexpr, PACKED_X: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dw[slice, expert, n, k] = the sum over a slice of the expert's rows of dy[row, n] x[row, k].

    M tiles n, N tiles k, K is how many rows are taken at a time; dw_n, dw_k: strides within an expert.
    """
    k_tiles = tl.cdiv(k_size, N)
    tiles = tl.cdiv(n_size, M) * k_tiles
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) - expert * tiles
    n = (tile // k_tiles) * M + tl.arange(0, M)
    k = (tile % k_tiles) * N + tl.arange(0, N)
    n_mask = n < n_size
    k_mask = k < k_size
    first, last = slice_of(offsets, expert, tl.program_id(1), slices, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, last, K):
        row = start + tl.arange(0, K)
        inside = row < last
        a = _grad_rows(grad, row_weight, order, row, inside, topk, n, n_mask, n_size, PACKED_GRAD, WIDE)
        at = row if PACKED_X else tl.load(order + row, mask=inside, other=0) // topk
        if WIDE:
            at = at.to(tl.int64)
        b = tl.load(x + at[:, None] * k_size + k[None, :], mask=inside[:, None] & k_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    copy = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + expert
    at = n.to(tl.int64)[:, None] * dw_n + k.to(tl.int64)[None, :] * dw_k
    dw += copy * n_size * k_size
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=n_mask[:, None] & k_mask[None, :])


@triton.jit(do_not_specialize=["topk", "slices"])
def bias_grad_kernel(
    grad, db, row_weight, order, offsets, topk, slices, n_size,
    PACKED_GRAD: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """db[slice, expert, n] = the sum over a slice of the expert's rows of dy[row, n]; M rows at a time."""
    tiles = tl.cdiv(n_size, N)
    expert = tl.program_id(0) // tiles
    n = (tl.program_id(0) - expert * tiles) * N + tl.arange(0, N)
    mask = n < n_size
    first, last = slice_of(offsets, expert, tl.program_id(1), slices, M)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, last, M):
        row = start + tl.arange(0, M)
        inside = row < last
        dy = _grad_rows(grad, row_weight, order, row, inside, topk, n, mask, n_size, PACKED_GRAD, WIDE)
        acc += dy.to(tl.float32)
    copy = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + expert
    tl.store(db + copy * n_size + n, tl.sum(acc, 0).to(db.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------- launchers


def weight_grad(
    grad, x, row_weight, order, offsets, position, packed_grad: bool, packed_x: bool, transposed: bool, bias: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``ops.experts.linear._weight_grad``."""
    outputs, inputs, experts = grad.shape[1], x.shape[1], offsets.shape[0] - 1
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    db_shape = (experts, outputs) if bias else (0,)
    if order.shape[0] == 0 or outputs == 0:
        return grad.new_zeros(shape), grad.new_zeros(db_shape)
    grad, x = grad.contiguous(), x.contiguous()
    rows = (contiguous(row_weight), order, offsets, position.shape[1])
    dw = _weights(grad, x, rows, shape, packed_grad, packed_x, transposed)
    return dw, _bias(grad, rows, db_shape, packed_grad) if bias else grad.new_empty(0)


def _weights(grad: Tensor, x: Tensor, rows: tuple, shape: tuple, packed_grad, packed_x, transposed) -> Tensor:
    if 0 in shape:
        return grad.new_empty(shape)
    outputs, inputs, experts = grad.shape[1], x.shape[1], shape[0]
    tile, precision = choose(x, outputs, inputs, rows[1].shape[0], experts, rows[0] is not None)
    programs = experts * cdiv(outputs, tile["M"]) * cdiv(inputs, tile["N"])
    slices = _slices(rows[1].shape[0], programs, tile["K"], x.device)
    dw = _copies(grad, slices, shape)
    with gemm.on_device(x):
        launch(weight_grad_kernel, programs, slices)(
            grad, x, dw, *rows, slices, outputs, inputs, *((1, outputs) if transposed else (inputs, 1)),
            PACKED_GRAD=packed_grad, PACKED_X=packed_x, PRECISION=precision, WIDE=gemm.is_wide(grad, x), **tile,
        )  # fmt: skip
    return _sum(dw, grad.dtype)


def _bias(grad: Tensor, rows: tuple, shape: tuple, packed_grad: bool) -> Tensor:
    experts, outputs = shape
    tile = tiling.direct_tile(outputs)
    programs = experts * cdiv(outputs, tile["N"])
    slices = _slices(rows[1].shape[0], programs, tile["M"], grad.device)
    db = _copies(grad, slices, shape)
    with gemm.on_device(grad):
        launch(bias_grad_kernel, programs, slices)(
            grad, db, *rows, slices, outputs, PACKED_GRAD=packed_grad, WIDE=gemm.is_wide(grad), **tile
        )
    return _sum(db, grad.dtype)


def bias_grads(grad: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The sums ``[E, O]`` of rows of grad ``[T, O]``, of which each has one expert."""
    experts, outputs = offsets.shape[0] - 1, grad.shape[1]
    return _bias(grad, (None, order, offsets, 1), (experts, outputs), False)


def _slices(rows: int, programs: int, block: int, device: torch.device) -> int:
    return cdiv(rows, chunk_rows(rows, programs, block, device))


def _copies(like: Tensor, slices: int, shape: tuple) -> Tensor:
    dtype = torch.float32 if slices > 1 else like.dtype
    return torch.empty((slices, *shape), dtype=dtype, device=like.device)


def _sum(copies: Tensor, dtype: torch.dtype) -> Tensor:
    return copies[0] if copies.shape[0] == 1 else copies.sum(0).to(dtype)


def choose(x: Tensor, outputs: int, inputs: int, rows: int, experts: int, weighted: bool) -> tuple[dict, str]:
    """The tile and the precision of ``experts`` products ``[outputs, rows] @ [rows, inputs]``."""
    ragged = tiling.is_ragged({"n": outputs, "k": inputs})
    most = {
        "half": 128 * 128 if ragged or weighted else 128 * 256,
        "tf32": 64 * 64 if ragged else 128 * 128,
        "ieee": 32 * 32 if ragged else 64 * 64,
    }
    options = {"family": "experts_weight", "indirect": True, "largest": most, "product": "matmul"}
    return tiling.choose(x, outputs, inputs, rows, experts, **options)
