"""Grouped GEMMs of a mixture of experts in Triton: ``linear``, and ``mlp`` with its activation fused.

``weight_grad`` is in ``experts_weight_grad.py``, ``activation`` and its gradient in ``expert_activations.py``,
``gather``, ``combine`` and ``dots`` in ``expert_rows.py``. Signatures and meaning are those of the references in
``dynops/ops``. Nothing here reads a count on the host, and nothing uses atomics: every result is bitwise
reproducible.

**Tiles.** A program owns a tile of rows of one expert and a tile of its outputs. The grid follows from P, E and the
tile alone: as many tiles as P pairs may need, whatever the counts. Programs number the tiles that are there without
gaps, so that those that are not needed come last and return at once. The dropped pairs are an expert without a
weight, whose rows are written as zeros.

**Few rows.** Where experts have a few rows each, the time is that of reading their weights. Tiles of 16 rows read each
weight once, and keep three blocks of it on their way (``tiling.EXPERT_TILES``). The reduction is not split among
programs. A product of so few outputs that this leaves SMs idle is a few MB, and adding up parts is one more launch.

**linear.** Rows are gathered by their token as they are loaded, so that x is not permuted; scale, bias, activation
and row weight are applied in registers. With one choice for each token its row is stored where it belongs; with
more, packed rows are summed in a second pass, in float32 and in the order of the choices.

**mlp.** Gate and up are two halves of one tile's columns (see ``expert_activations.py``): one product, and the
activation of it is all that is stored between the two GEMMs.

An input gradient is ``linear`` with the weight transposed.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..layout import contiguous
from . import gemm, tiling
from .expert_activations import activation, activation_grad, glu, pair_columns, split_pairs
from .expert_rows import combine, dots, gather
from .experts_weight_grad import weight_grad
from .gemm import TensorDescriptor, activate
from .launch import cdiv, launch, power_of_2

__all__ = ["activation", "activation_grad", "combine", "dots", "gather", "linear", "mlp", "weight_grad"]

_GROUP = 8  # row tiles; see grouped_tile

# ------------------------------------------------------------------------------------- kernels


@triton.jit
def expert_tile(offsets, tile, rows, experts, M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert that a tile of rows belongs to, ``experts`` for the dropped, and its rows [first, last).

    Past the last tile there are none.
    """
    expert = 0
    skipped = 0  # tiles of the experts before it
    for start in range(0, experts, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        inside = e < experts
        own = tl.load(offsets + e + 1, mask=inside, other=0) - tl.load(offsets + e, mask=inside, other=0)
        own = tl.cdiv(own, M)
        before = inside & (skipped + tl.cumsum(own, 0) <= tile) & (expert == start)
        sums = tl.sum(tl.where(before, (1 << 32) + own.to(tl.int64), 0), 0)  # both sums in one
        expert += (sums >> 32).to(tl.int32)
        skipped += sums.to(tl.int32)
    first = tl.load(offsets + expert) + (tile - skipped) * M
    last = rows
    if expert < experts:
        last = tl.load(offsets + expert + 1)
    return expert, first, last


@triton.jit
def grouped_tile(program, m_tiles, n_tiles, GROUP: tl.constexpr):
    """The row tile and the column tile of a program: down GROUP row tiles, then on to the next column.

    Programs that run at once then share weights and rows in L2: of an up-projection of 4096 to 28672, 132 tiles of
    one row of tiles would read all its 235 MB of weights again for each 128 rows.
    """
    first = program // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    at = program - first * n_tiles
    return first + at % height, at // height


@triton.jit(do_not_specialize=["rows", "experts", "topk"])
def linear_kernel(
    x, w, w_box, out, scale, bias, row_weight, order, offsets,
    rows, experts, topk, k_size, n_size, out_size, w_expert, w_lead, alpha, limit,
    PACKED_IN: tl.constexpr, SCATTERS: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    EXPERTS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's rows and outputs; GATED: N columns of gate and up give N / 2 of ``out``.

    The weight is ``[n, k]`` in each expert, TRANSPOSED ``[k, n]``, with rows ``w_lead`` apart; ``w_box``: the same
    as a matrix that TMA reads, or None. SCATTERS: rows of ``out`` are pairs in their own order, else the plan's.
    """
    N_OUT: tl.constexpr = N // 2 if GATED else N
    # gate and up: two boxes, two products
    HALVES: tl.constexpr = GATED and not INTERLEAVED and w_box is not None
    n_tiles = tl.cdiv(out_size, N_OUT)
    tile, n_tile = grouped_tile(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, GROUP)
    expert, first, last = expert_tile(offsets, tile, rows, experts, M, EXPERTS)
    if first >= last:
        return
    row = first + tl.arange(0, M)
    inside = row < last
    live = row < tl.where(expert < experts, last, 0)
    pair = tl.load(order + row, mask=inside, other=0)
    at = row if PACKED_IN else pair // topk
    first_target = n_tile * N_OUT
    target = first_target + tl.arange(0, N_OUT)
    if GATED and not HALVES:
        column, n_mask = pair_columns(first_target, out_size, N_OUT, INTERLEAVED)
    else:
        column = target
        n_mask = column < out_size
    if WIDE:
        at = at.to(tl.int64)
    k = tl.arange(0, K)
    x_at = at[:, None] * k_size + k[None, :]
    own = tl.minimum(expert, experts - 1)
    w += own.to(tl.int64) * w_expert
    w_column = column.to(tl.int64) if WIDE else column
    box_row = own * (k_size if TRANSPOSED else n_size)
    box_column = first_target * 2 if INTERLEAVED else first_target
    acc = tl.zeros([M, N_OUT if HALVES else N], tl.float32)
    up = acc
    for start in range(0, tl.where(expert < experts, k_size, 0), K):
        k_mask = start + k < k_size
        a = tl.load(x + start + x_at, mask=live[:, None] & k_mask[None, :], other=0.0)
        if w_box is None:
            if TRANSPOSED:
                w_row = (start + k).to(tl.int64) if WIDE else start + k
                w_at = w_row[:, None] * w_lead + w_column[None, :]
            else:
                w_at = w_column[None, :] * w_lead + (start + k)[:, None]
            b = tl.load(w + w_at, mask=k_mask[:, None] & n_mask[None, :], other=0)
        else:
            b = _box(w_box, box_row, box_column, start, TRANSPOSED)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
        if HALVES:
            b_up = _box(w_box, box_row, out_size + box_column, start, TRANSPOSED)
            up = tl.dot(a, b_up, up, input_precision=PRECISION)
    if scale is not None:
        acc *= tl.load(scale + own.to(tl.int64) * n_size + column, mask=n_mask, other=0.0)[None, :]
    if bias is not None:
        bias += own.to(tl.int64) * n_size
        acc += tl.load(bias + column, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if HALVES:
            up += tl.load(bias + out_size + column, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if HALVES:
        z = glu(acc, up, alpha, limit, ACTIVATION)
    elif GATED:
        gate, up = split_pairs(acc, INTERLEAVED)
        z = glu(gate, up, alpha, limit, ACTIVATION)
    else:
        z = activate(acc, ACTIVATION)
    if row_weight is not None:
        z *= tl.load(row_weight + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    z = tl.where(live[:, None], z, 0.0)
    out_row = pair if SCATTERS else row
    if WIDE:
        out_row = out_row.to(tl.int64)
    out_at = out_row[:, None] * out_size + target[None, :]
    tl.store(out + out_at, z.to(out.dtype.element_ty), mask=inside[:, None] & (target < out_size)[None, :])


@triton.jit
def _box(w_box, row, column, start, TRANSPOSED: tl.constexpr):
    """``[K, N]`` of an expert's weight by TMA, from ``start`` of the reduction and ``column`` of the outputs on."""
    if TRANSPOSED:
        b = w_box.load([row + start, column])
    else:
        b = w_box.load([row + column, start]).T
    return b


# ----------------------------------------------------------------------------------- launchers


def linear(
    x, weight, scale, bias, row_weight, order, offsets, position,
    packed_in: bool, packed_out: bool, transposed: bool, activation: str,
) -> Tensor:  # fmt: skip
    """See ``ops.experts.linear._linear``."""
    plan, options = (order, offsets, position), {"packed_in": packed_in, "activation": activation}
    if packed_out or position.shape[1] == 1:
        scatters = not packed_out
        return _linear(x, weight, scale, bias, row_weight, plan, transposed, scatters=scatters, **options)
    return combine(_linear(x, weight, scale, bias, None, plan, transposed, **options), row_weight, *plan)


def mlp(
    x, up, down, up_scale, down_scale, up_bias, down_bias, row_weight, order, offsets, position,
    activation: str, gated: bool, interleaved: bool, up_transposed: bool, down_transposed: bool, alpha: float,
    limit: float,
) -> Tensor:  # fmt: skip
    """See ``ops.experts.mlp._mlp``."""
    plan = (order, offsets, position)
    pairs = {"gated": gated, "interleaved": gated and interleaved, "alpha": alpha, "limit": limit}
    h = _linear(x, up, up_scale, up_bias, None, plan, up_transposed, activation=activation, **pairs)
    return linear(h, down, down_scale, down_bias, row_weight, *plan, True, False, down_transposed, "")


def _linear(
    x, weight, scale, bias, row_weight, plan, transposed, *, packed_in=False, scatters=False, activation="",
    gated=False, interleaved=False, alpha=0.0, limit=0.0,
) -> Tensor:  # fmt: skip
    """The kernel's launch: rows in the plan's order, or scattered to their pairs."""
    order, offsets, position = plan
    rows, experts = order.shape[0], offsets.shape[0] - 1
    n_size, k_size = (weight.shape[2], weight.shape[1]) if transposed else weight.shape[1:]
    out = x.new_empty(rows, n_size // 2 if gated else n_size)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    scale, bias, row_weight = (contiguous(t) for t in (scale, bias, row_weight))
    strides = weight.stride()[:2]
    ragged = tiling.is_ragged({"k": k_size, "n": n_size, "expert": strides[0], "row": strides[1]})
    heavy = activation == "gelu" or row_weight is not None
    tile, precision = choose(x, rows, experts, n_size, k_size, ragged, scale is not None, heavy)
    wide = gemm.is_wide(x, out) or weight.shape[1] * strides[1] >= gemm.INT32_LIMIT
    groups = min(experts + 1, rows)  # that have rows: each has a last tile, of one row at least
    grid = (rows + groups * (tile["M"] - 1)) // tile["M"] * cdiv(n_size, tile["N"])
    with gemm.on_device(x):
        launch(linear_kernel, grid)(
            x, weight, _weight_box(x, weight, tile, transposed, gated and not interleaved), out, scale, bias,
            row_weight, order, offsets, rows, experts, position.shape[1], k_size, n_size, out.shape[1], *strides, alpha, limit, PACKED_IN=packed_in, SCATTERS=scatters, TRANSPOSED=transposed,
            ACTIVATION=activation, GATED=gated, INTERLEAVED=interleaved, PRECISION=precision, WIDE=wide,
            EXPERTS=min(1024, max(32, power_of_2(experts))), GROUP=_GROUP, **tile,
        )  # fmt: skip
    return out


def _weight_box(
    x: Tensor, weight: Tensor, tile: dict, transposed: bool, halves: bool
) -> TensorDescriptor | None:
    """The weight as a matrix ``[E * O, I]`` (transposed ``[E * I, O]``) that TMA reads in boxes of a tile, or None.

    Past the end of a row a box is zero. Past an expert's last row it is the next one's: outputs that are not
    stored, but transposed a part of the reduction, which then must end with a box.
    """
    n = tile["N"] // 2 if halves else tile["N"]
    experts, rows, columns = weight.shape
    usable = weight.is_contiguous() and x.dtype == weight.dtype and n >= 16 and columns % 8 == 0
    if not usable or not gemm.takes_boxes(weight) or (transposed and rows % tile["K"]):
        return None
    return gemm.matrix_box(weight, experts * rows, columns, (tile["K"], n) if transposed else (n, tile["K"]))


def choose(
    x: Tensor, rows: int, experts: int, n: int, k: int, ragged: bool, quantized: bool, heavy: bool
) -> tuple[dict, str]:
    """The tile and the precision of the products ``[rows / experts, k] @ [k, n]``, as :func:`tiling.choose`.

    An expert of a random routing rarely has more rows than two standard deviations above the mean. A tile is not much
    taller: it is multiplied whole. A lower one would read weights twice. Tiles end where registers spilled: of single
    elements (``ragged``), of int8 weights, with an epilogue of many (``heavy``: the error function, or weights of rows).
    """
    active = min(experts, rows)
    each = cdiv(rows, active)
    each += math.ceil(2 * math.sqrt(each))
    most = {
        "half": 64 * 64 if ragged else 128 * 128 if quantized or heavy else 128 * 256,
        "tf32": 64 * 64 if ragged else 128 * 128,
        "ieee": 32 * 32 if ragged else 64 * 32 if quantized else 64 * 64,
    }
    tallest = max(16, power_of_2(each))
    depth = min(k, 32) if ragged else k
    options = {"indirect": False, "largest": most, "tallest": tallest, "product": "matmul"}
    return tiling.choose(x, each, n, depth, active, family="experts", **options)
