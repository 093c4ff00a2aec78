"""The MACs of chains and stacks that run for a mask's pixels: each layer wherever a later one reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..nn import SparseBlocks, SparseSequential
from ..nn.pixels import sequential as chains
from ..plans import BlockPlan, PixelPlan, as_pixel_plan
from ..stack.run_rows import _plans as plans_of_stack
from .dense_rules import Cost
from .mac_sums import slope


class Computed(NamedTuple):
    """``live``: float64 ``[N]``, the MACs of each sample. ``dense``: those of a sample in full."""

    live: Tensor
    dense: float


def of_chain(module: SparseSequential, x: Tensor, mask_or_plan) -> Computed:
    plan = as_pixel_plan(mask_or_plan, batch=x.shape[0])
    steps = chains._fuse(module)
    geometries = chains._geometries(steps, plan, (x.shape[0], x.shape[2], x.shape[3]))
    plans = chains._plans(geometries, plan)
    live, dense = _zero(x), 0.0
    for step, geometry, out_plan in zip(steps, geometries, plans, strict=True):
        if geometry is not None:
            each = _each(step.conv, geometry)
            live = live + _pixels(out_plan) * each
            dense += each * geometry.out_h * geometry.out_w
    return Computed(live, dense)


def of_blocks(module: SparseBlocks, x: Tensor, mask_or_plan) -> Computed:
    """As the layer runs: on rows the pixels that each convolution computes, on tiles whole tiles."""
    bound, in_shape = module._stack(), (x.shape[0], x.shape[2], x.shape[3])
    geometries = bound.geometries(in_shape)
    convs = [layer for layer in bound.stack.layers if layer.fused is not None]
    each = {c.out: _each(c.conv, geometries[c.out]) for c in convs}
    dense = sum(each[c.out] * geometries[c.out].out_h * geometries[c.out].out_w for c in convs)
    if mask_or_plan is None:
        return Computed(_zero(x) + dense, dense)
    plan = module._plan(mask_or_plan, bound.output_shape(in_shape), x)
    path = module.path or module._fastest(bound, x, plan, in_shape, True)
    if path == "dense":
        return Computed(_zero(x) + dense, dense)
    live = _zero(x)
    if path == "rows":
        plans = plans_of_stack(bound.stack, geometries, plan.pixels())
        for c in convs:
            live = live + _pixels(plans[c.out]) * each[c.out]
        return Computed(live, dense)
    layout, tiles = bound.layout(in_shape, plan.geometry), _tiles(plan)
    for c in convs:
        g = layout.maps[c.out]
        live = live + tiles * each[c.out] * g.tile_h * g.tile_w
    return Computed(live, dense)


def cost(computed: Computed, mask, rows: int) -> Cost:
    """The cost of a call. A mask's gradient is what an active pixel costs on average, halo included."""
    live, dense = computed
    if isinstance(mask, Tensor) and mask.requires_grad:
        mask = mask[None] if mask.dim() == 2 else mask
        active = (mask.detach() != 0).flatten(1).sum(1)
        price = torch.where(active > 0, live / active.clamp(min=1), dense / max(mask[0].numel(), 1))
        live = live + slope(mask).flatten(1).sum(1) * price
    return Cost(rows, 1.0, live, dense)


def _each(conv, geometry: ConvGeometry) -> float:
    """MACs of an output pixel."""
    return geometry.macs(1, conv.in_channels, conv.out_channels)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)


def _pixels(plan: PixelPlan) -> Tensor:
    return plan.mask().flatten(1).sum(1).double()


def _tiles(plan: BlockPlan) -> Tensor:
    return plan.blocks().flatten(1).sum(1).double()
