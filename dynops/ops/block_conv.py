"""The convolution of stride 1 at the blocks of a plan, from a map to a map, for ``nn.SparseBlocks``.

The mathematics are those of ``ops/pixels/conv.py`` at the pixels that the blocks cover. The plan gives the blocks and
no pixels: a kernel that reads boxes of a map needs no list of them. Where there is no such kernel, that of pixels
computes the same, and its reference is that of both.

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
from .pixels import conv as pixel_ops
from .registry import define

_KERNELS = Kernels(cpu.pixels, "blocks")


def _run(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C/groups, kh, kw]; transposed: [C, O/groups, kh, kw]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [B]
    count: Tensor | None,  # [1]
    pixels: Tensor | None,  # [P], those of the blocks; None: they are made where a gradient needs them
    num_pixels: Tensor | None,  # [1]
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
    at, valid = pixels, num_pixels
    if at is None:
        at, valid = _pixels_of(torch.ops.dynops.block_cover(index, count, blocks))
    rows = None if residual is None else torch.ops.dynops.gather_rows(residual, at, valid)
    finish = activation, scale, shift, None, rows, base, False, None, True, False, ""
    return pixel_ops._run_conv(x, weight, bias, at, valid, None, list(g), *finish)


def _pixels_of(covered: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of a mask and their number, with a capacity of all: nothing waits for a GPU."""
    return torch.ops.dynops.mask_to_index_capacity(covered, covered.numel())


def _fake(x, weight, bias, index, count, pixels, num_pixels, blocks, geometry, *finish) -> Tensor:
    g = as_geometry(geometry)
    channels = weight.shape[1] * g.groups if g.transposed else weight.shape[0]
    return empty_map(x, (g.batch, channels, g.out_h, g.out_w), memory_format_of(x))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, *where, ctx.blocks, ctx.geometry, activation, scale, shift, residual, _ = inputs
    if activation or any(value is not None for value in (scale, shift, residual)):
        raise RuntimeError(
            "dynops::block_conv: the fused activation, scale, shift and residual have no gradient"
        )
    ctx.save_for_backward(x, weight, *where)


def _backward(ctx, grad):
    x, weight, index, count, *pixels = ctx.saved_tensors
    g, blocks = as_geometry(ctx.geometry), as_block_geometry(ctx.blocks)
    need_x, need_w, need_b, need_base = (ctx.needs_input_grad[i] for i in (0, 1, 2, 13))
    covered = torch.ops.dynops.block_cover(index, count, list(blocks))
    live = grad.masked_fill(~covered[:, None], 0) if need_x or need_b else None
    dx = _input_grad(live, weight, covered, blocks, g) if need_x else None
    dbase = grad.masked_fill(covered[:, None], 0) if need_base else None
    dw = db = None
    if need_w:
        where = pixels if pixels[0] is not None else _pixels_of(covered)
        sizes = list(weight.shape), list(g)
        dw, db = pixel_ops._weight_grad(grad, x, *where, None, *sizes, False, need_b, "")
    elif need_b:
        db = live.sum((0, 2, 3))
    return dx, dw, (db if need_b else None), *[None] * 10, dbase


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
    where = index, count, None, None, list(own), list(adjoint)
    return _op(live, weight, None, *where, "", *[None] * 4)


_op = define(
    "block_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? pixels, "
    "Tensor? num_pixels, SymInt[] blocks, SymInt[] geometry, str activation, Tensor? scale, Tensor? shift, "
    "Tensor? residual, Tensor? base) -> Tensor",
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
    base = None if base is None else base.to(x.dtype)
    pixels = plan.pixels() if modes.differentiated(weight) else None  # kept, as a capture may come
    at = (None, None) if pixels is None else (pixels.index, pixels.count)
    where = plan.index, plan.count, *at, list(plan.geometry), list(g)
    return _op(x, weight, bias, *where, activation, scale, shift, residual, base)
