"""gather_blocks and scatter_blocks: a dense map to the tiles of a plan's blocks, and back.

With tile b of block (n, by, bx), whose first pixel is ``(y0, x0) = first + (by, bx) * step``
(``geometry.BlockGeometry``)::

    gather:   tiles[b, :, i, j] = x[n, :, y0 + i, x0 + j]            zero outside the map
    scatter:  out[n, :, y0 + i, x0 + j] = tiles[b, :, i, j]          and base (or 0) where no tile is
              out = base + the sum of all tiles that cover a pixel   with add

Each is the other's gradient: what was gathered twice, because halos overlap, is summed; what was replaced
has no gradient. ``_gather_tiles`` and ``_scatter_tiles`` are the reference; the kernels have the same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..geometry import BlockGeometry, as_block_geometry, is_int, pair
from ..kernels import cpu, cuda
from ..kernels.layout import empty_map, memory_format_of
from ..plans import BlockPlan
from . import batching, checks
from .dispatch import Kernels, triton_module
from .registry import define

# ---------------------------------------------------------------------------------- reference


def _positions(index: Tensor, g: BlockGeometry) -> Tensor:
    """int64 ``[B, th, tw]``: where each pixel of each tile lies in the map ``[N*H*W]``; N*H*W outside."""
    rows, columns = max(g.grid_h, 1), max(g.grid_w, 1)  # a capacity plan of no blocks has entries anyway
    block = index.long()
    n, by, bx = block // (rows * columns), block // columns % rows, block % columns
    y = (g.first_h + by * g.step_h)[:, None, None] + torch.arange(g.tile_h, device=index.device)[:, None]
    x = (g.first_w + bx * g.step_w)[:, None, None] + torch.arange(g.tile_w, device=index.device)
    inside = (y >= 0) & (y < g.height) & (x >= 0) & (x < g.width) & (block >= 0)[:, None, None]
    at = (n[:, None, None] * g.height + y) * g.width + x
    return torch.where(inside, at, g.batch * g.height * g.width)


def _block_mask(mask: Tensor, geometry: list[int], mean: bool, threshold: float) -> Tensor:
    """bool ``[N, GH, GW]``: whether a block's largest (or mean) absolute value exceeds the threshold."""
    if mask.is_floating_point() and mask.device.type == "cpu" and bool(mask.isnan().any()):
        raise RuntimeError("mask: NaN")
    g = as_block_geometry(geometry)
    every = torch.arange(g.batch * g.grid_h * g.grid_w, dtype=torch.int32, device=mask.device)
    values = mask.reshape(-1).double().abs()
    tiles = torch.cat([values, values.new_zeros(1)])[_positions(every, g)]  # [blocks, th, tw]
    reduced = tiles.mean((1, 2)) if mean else tiles.amax((1, 2))
    return (reduced > threshold).view(g.grid)


def _block_cover(index: Tensor, count: Tensor | None, geometry: list[int]) -> Tensor:
    """bool ``[N, H, W]``: the pixels that the blocks of ``index`` cover."""
    g = as_block_geometry(geometry)
    mask = torch.zeros(g.batch * g.height * g.width + 1, dtype=torch.bool, device=index.device)
    mask[_positions(index, g).reshape(-1)] = True
    return mask[:-1].view(g.shape).clone()


def _block_pixels(index: Tensor, geometry: list[int]) -> Tensor:
    """int32 ``[P]``: the ascending pixels that the blocks of a compact ``index`` cover."""
    return torch.ops.dynops.mask_to_index(torch.ops.dynops.block_cover(index, None, geometry))


def _gather_tiles(x: Tensor, index: Tensor, count: Tensor | None, geometry: list[int]) -> Tensor:
    """``[N, C, H, W]`` to ``[B, C, th, tw]`` in the memory format of ``x``; tiles past the count are zero."""
    g = as_block_geometry(geometry)
    flat = x.permute(0, 2, 3, 1).flatten(0, 2)
    flat = torch.cat([flat, flat.new_zeros(1, x.shape[1])])
    tiles = flat[_positions(index, g)].permute(0, 3, 1, 2)
    return tiles.clone(memory_format=memory_format_of(x))


def _scatter_tiles(
    tiles: Tensor,  # [B, C, th, tw]
    index: Tensor,
    count: Tensor | None,
    geometry: list[int],
    base: Tensor | None,  # [N, C, H, W]
    add: bool,
) -> Tensor:
    """``[N, C, H, W]`` in the memory format of ``tiles``. Sums are float32 (or the dtype, if wider)."""
    g, channels = as_block_geometry(geometry), tiles.shape[1]
    dtype = (
        torch.promote_types(tiles.dtype, torch.float32) if add and tiles.is_floating_point() else tiles.dtype
    )
    flat = tiles.new_zeros(g.batch * g.height * g.width + 1, channels, dtype=dtype)
    if base is not None:
        flat[:-1] = base.permute(0, 2, 3, 1).flatten(0, 2)
    at, values = _positions(index, g).reshape(-1), tiles.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
    flat = flat.index_add(0, at, values) if add else flat.index_put((at,), values)
    out = flat[:-1].to(tiles.dtype).view(*g.shape, channels).permute(0, 3, 1, 2)
    return out.clone(memory_format=memory_format_of(tiles))


# ---------------------------------------------------------------------- backends, fakes, schema


_KERNELS = Kernels(cpu.blocks, "blocks")


def _kernels(x: Tensor, sums: bool = False):
    """The kernel module for ``x``, or None for the reference above. The binary copies any dtype."""
    fits = not sums or x.dtype in backends.FAST_DTYPES
    if x.device.type == "cpu":
        return cpu.blocks if fits and backends.has_binary() else None
    if x.is_cuda and cuda.AVAILABLE:
        return cuda if fits else None
    if backends.choose(None, x.device, x.dtype) == "triton":
        return triton_module("blocks")
    return None


def _run_gather_tiles(x, index, count, geometry) -> Tensor:
    kernels = _kernels(x)
    return (_gather_tiles if kernels is None else kernels.gather_tiles)(x, index, count, geometry)


def _run_scatter_tiles(tiles, index, count, geometry, base, add) -> Tensor:
    kernels = _kernels(tiles, sums=add)
    run = _scatter_tiles if kernels is None else kernels.scatter_tiles
    return run(tiles, index, count, geometry, base, add)


def _fake_gather_tiles(x, index, count, geometry) -> Tensor:
    g = as_block_geometry(geometry)
    return empty_map(x, (index.shape[0], x.shape[1], g.tile_h, g.tile_w))


def _fake_scatter_tiles(tiles, index, count, geometry, base, add) -> Tensor:
    g = as_block_geometry(geometry)
    return empty_map(tiles, (g.batch, tiles.shape[1], g.height, g.width))


define(
    "block_mask(Tensor mask, SymInt[] geometry, bool mean, float threshold) -> Tensor",
    _block_mask,
    lambda mask, geometry, mean, threshold: mask.new_empty(
        as_block_geometry(geometry).grid, dtype=torch.bool
    ),
)
define(
    "block_cover(Tensor index, Tensor? count, SymInt[] geometry) -> Tensor",
    _block_cover,
    lambda index, count, geometry: index.new_empty(as_block_geometry(geometry).shape, dtype=torch.bool),
)
define(
    "block_pixels(Tensor index, SymInt[] geometry) -> Tensor",
    _block_pixels,
    lambda index, geometry: index.new_empty((torch.library.get_ctx().new_dynamic_size(),)),
)


def _gather_setup(ctx, inputs, output):
    _, index, count, geometry = inputs
    ctx.save_for_backward(index, count)
    ctx.geometry = geometry


def _gather_backward(ctx, grad):
    index, count = ctx.saved_tensors
    return _scatter(grad, index, count, ctx.geometry, None, True), None, None, None


def _scatter_setup(ctx, inputs, output):
    _, index, count, geometry, _, add = inputs
    ctx.save_for_backward(index, count)
    ctx.geometry, ctx.add = geometry, add


def _scatter_backward(ctx, grad):
    index, count = ctx.saved_tensors
    dtiles = dbase = None
    if ctx.needs_input_grad[0]:
        dtiles = _gather(grad, index, count, ctx.geometry)
    if ctx.needs_input_grad[4]:
        dbase = grad
        if not ctx.add:
            covered = torch.ops.dynops.block_cover(index, count, ctx.geometry)
            dbase = grad.masked_fill(covered[:, None], 0)
    return dtiles, None, None, None, dbase, None


_gather = define(
    "gather_tiles(Tensor x, Tensor index, Tensor? count, SymInt[] geometry) -> Tensor",
    _KERNELS.serve(_run_gather_tiles),
    _fake_gather_tiles,
    _gather_setup,
    _gather_backward,
    terms="x",
    vmap=batching.passive(1, "x"),
)
_scatter = define(
    "scatter_tiles(Tensor tiles, Tensor index, Tensor? count, SymInt[] geometry, Tensor? base, bool add) -> Tensor",
    _KERNELS.serve(_run_scatter_tiles),
    _fake_scatter_tiles,
    _scatter_setup,
    _scatter_backward,
    terms="tiles, base",
    vmap=batching.passive(1, "tiles", "base"),
)

# ------------------------------------------------------------------------------ public functions


def gather_blocks(x: Tensor, plan: BlockPlan, halo=0) -> Tensor:
    """The tiles of ``x`` at the plan's blocks, with the pixels around them.

    Args:
        x: ``[N, C, H, W]``, any dtype, at the plan's resolution, either memory format.
        halo: pixels on each side: an int, ``(y, x)`` or ``(top, bottom, left, right)``.

    Returns:
        ``[plan.num_blocks, C, block_h + top + bottom, block_w + left + right]``, memory format of ``x``;
        zero outside the map, and in the tiles of a capacity plan past its count. Where halos overlap, the
        gradients of all tiles are summed.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Ren et al., SBNet (CVPR 2018).
    """
    if not isinstance(plan, BlockPlan):
        checks.plan(plan, BlockPlan, "plan")
    checks.dense_map(x, plan, "x")
    geometry = plan.geometry.widened(_four_sides(halo))
    return _gather(x, plan.index, plan.count, geometry)


def scatter_blocks(tiles: Tensor, plan: BlockPlan, base: Tensor | None = None, add: bool = False) -> Tensor:
    """The dense map with ``tiles`` at the plan's blocks and ``base`` (or zero) elsewhere.

    Args:
        tiles: ``[plan.num_blocks, C, block_h, block_w]``; pixels outside the map are dropped.
        base: ``[N, C, H, W]`` of the same dtype, or None.
        add: adds the tiles to ``base`` instead of replacing it. Blocks that overlap need it.

    Returns:
        ``[N, C, H, W]``, memory format of ``tiles``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """
    if not isinstance(plan, BlockPlan):
        checks.plan(plan, BlockPlan, "plan")
    checks.tensor(tiles, "tiles", 4, "[B, C, block_h, block_w]")
    expected = (plan.num_blocks, tiles.shape[1], *plan.block_size)
    checks.shaped(tiles, "tiles", expected, ", as the plan has it")
    checks.on_plan(tiles, plan, "tiles")
    if plan.geometry.overlaps and not add:
        raise ValueError("add: expected True for a plan whose blocks overlap, got False")
    if base is not None:
        checks.dense_map(base, plan, "base", channels=tiles.shape[1], dtype=tiles.dtype)
    return _scatter(tiles, plan.index, plan.count, plan.geometry, base, bool(add))


def _four_sides(halo) -> tuple[int, int, int, int]:
    """A halo as (top, bottom, left, right)."""
    if isinstance(halo, (tuple, list)) and len(halo) == 4 and all(is_int(side, 0) for side in halo):
        return tuple(halo)
    y, x = pair(halo, "halo", 0)
    return y, y, x, x
