"""The convolution of stride 1 at the blocks of a plan, from a map to a map, for ``nn.SparseBlocks``.

The mathematics are those of ``ops/pixels/conv.py`` at the pixels that the blocks cover. The plan gives the blocks and
no pixels: a kernel that reads boxes of a map needs no list of them. ``_block_conv`` is the reference in plain PyTorch,
and the kernel has the same signature. There is none for a CPU, whose ``nn.SparseBlocks`` computes pixels.

The gradient of the input is such a convolution too: of the output's gradient, zero outside of the plan, at the blocks
of the input that a block of the plan reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, modes
from ..geometry import BlockGeometry, ConvGeometry, as_block_geometry, as_geometry, reach
from ..kernels import cpu
from ..kernels.layout import empty_map, memory_format_of
from ..plans import BlockPlan
from .dispatch import Kernels, triton_module
from .epilogue import Epilogue
from .pixels import conv as pixels
from .registry import define

_KERNELS = Kernels(cpu.pixels, "blocks")


def _run(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C/groups, kh, kw]; transposed: [C, O/groups, kh, kw]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [B]
    count: Tensor | None,  # [1]
    blocks: list[int],
    geometry: list[int],
    activation: str,
    scale: Tensor | None,  # [O]
    shift: Tensor | None,  # [O]
    residual: Tensor | None,  # [N, O, out_h, out_w]
    base: Tensor | None,  # [N, O, out_h, out_w]
) -> Tensor:  # [N, O, out_h, out_w]
    """By the kernel of blocks, or by that of pixels, which takes any channels and dtype. Nothing waits for a GPU."""
    g = as_geometry(geometry)
    if not g.stride_h == g.stride_w == 1:
        raise RuntimeError(f"geometry: expected strides of 1, got {g.stride_h}, {g.stride_w}")
    kernels = _KERNELS.of(None, x)
    if kernels not in (None, cpu.pixels) and x.numel() > 0 and kernels.fits(x.device, x.dtype, weight, g):
        finish = activation, scale, shift, residual, base
        return kernels.conv(x, weight, bias, index, count, blocks, g, *finish)
    covered = torch.ops.dynops.block_cover(index, count, blocks)
    at, valid = torch.ops.dynops.mask_to_index_capacity(covered, covered.numel())
    rows = None if residual is None else torch.ops.dynops.gather_rows(residual, at, valid)
    finish = activation, scale, shift, None, rows, base, False, None, True, ""
    return pixels._run_conv(x, weight, bias, at, valid, None, list(g), *finish)


def _fake(x, weight, bias, index, count, blocks, geometry, *finish) -> Tensor:
    g = as_geometry(geometry)
    channels = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
    return empty_map(x, (g.batch, channels, g.out_h, g.out_w), memory_format_of(x))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, index, count, ctx.blocks, ctx.geometry, activation, *rest, _ = inputs
    if activation or any(value is not None for value in rest):
        raise RuntimeError(
            "dynops::block_conv: the fused activation, scale, shift and residual have no gradient"
        )
    ctx.save_for_backward(x, weight, index, count)


def _backward(ctx, grad):
    x, weight, index, count = ctx.saved_tensors
    g, blocks = as_geometry(ctx.geometry), as_block_geometry(ctx.blocks)
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 11))
    covered = torch.ops.dynops.block_cover(index, count, list(blocks))
    dx = dw = db = None
    dbase = grad.masked_fill(covered[:, None], 0) if need_base else None
    if need_x or (need_b and not need_w):
        live = grad.masked_fill(~covered[:, None], 0)
        if need_x:
            dx = _input_grad(live, weight, covered, blocks, g)
        if not need_w:
            db = live.sum((0, 2, 3)) if need_b else None
    if need_w:
        plan = BlockPlan._made(index, blocks, count).pixels()
        at = plan.index, plan.count, None
        dw, db = pixels._weight_grad(grad, x, *at, list(weight.shape), list(g), False, need_b, "")
    return dx, dw, (db if need_b else None), *[None] * 8, dbase


def _input_grad(
    live: Tensor, weight: Tensor, covered: Tensor, blocks: BlockGeometry, g: ConvGeometry
) -> Tensor:
    """dx, of an output's gradient that is zero outside of the pixels that are covered."""
    sizes = (blocks.tile_h, blocks.tile_w)
    far = reach(g.kernel_h, g.dil_h) - 1, reach(g.kernel_w, g.dil_w) - 1
    before = [-pad if g.transposed else pad - more for pad, more in zip((g.pad_h, g.pad_w), far, strict=True)]
    grid = [-(-total // size) for total, size in zip((g.in_h, g.in_w), sizes, strict=True)]
    # the pixels of the output that a block of the input reaches
    reads = BlockGeometry(*g.out_shape, *grid, *sizes, *before, sizes[0] + far[0], sizes[1] + far[1])
    reached = torch.ops.dynops.block_mask(covered, list(reads), False, 0.0)
    index, count = torch.ops.dynops.mask_to_index_capacity(reached, reached.numel())
    own = BlockGeometry(*g.in_shape, *grid, *sizes, 0, 0, *sizes)
    adjoint = g._replace(in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w, transposed=1 - g.transposed)
    return _op(live, weight, None, index, count, list(own), list(adjoint), "", *[None] * 4)


_op = define(
    "block_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, SymInt[] blocks, "
    "SymInt[] geometry, str activation, Tensor? scale, Tensor? shift, Tensor? residual, Tensor? base) -> Tensor",
    _KERNELS.serve(_run),
    _fake,
    _setup_context,
    _backward,
    terms="x weight, bias, base",
)

# ------------------------------------------------------------------------------ for stacks


def takes(x: Tensor, dtype: torch.dtype, weight: Tensor, plan: BlockPlan, g: ConvGeometry) -> bool:
    """True where :func:`block_conv` is expected to be the faster way to the pixels of a plan's blocks.

    That is on GPUs from sm_90 on, in half precision, with channels in multiples of 16, strides and groups of 1.
    A compiler and the transforms of ``torch.func`` get the pixels.

    Args:
        dtype: that of the products, which under autocast is not that of ``x``.
    """
    if not x.is_cuda or modes.watched() or backends.choose(None, x.device, dtype) != "triton":
        return False
    return triton_module("blocks").takes(x.device, dtype, weight, plan.num_blocks, plan.geometry, g)


def block_conv(x, weight, bias, plan: BlockPlan, g: ConvGeometry, epilogue: Epilogue, base) -> Tensor:
    """The convolution at the plan's blocks, ``base`` (or zero) elsewhere. An epilogue has no gradient, and no gate."""
    activation, scale, shift, _, residual = epilogue
    where = plan.index, plan.count, list(plan.geometry), list(g)
    base = None if base is None else base.to(x.dtype)
    return _op(x, weight, bias, *where, activation, scale, shift, residual, base)
