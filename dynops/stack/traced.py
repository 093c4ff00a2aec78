"""Traced: a module as a stack whose layers can run on parts of a map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..context import use_mask
from ..geometry import BlockGeometry, ConvGeometry
from ..ops.dense_fallback import CPU_CALLS, beats_dense, break_even, is_modelled
from ..plans import BlockPlan, PixelPlan
from .graph import Stack, local_stack_of
from .policy import Needed, needed_plans
from .receptive_field import KeptSizes, sizes_of
from .run_rows import run_rows
from .run_tiles import Layout, layout_of
from .staleness import HOOKS


class Macs(NamedTuple):
    """Multiply-accumulates of a call. ``live``: float64 ``[N]``, of each sample. ``dense``: of a sample in full."""

    live: Tensor
    dense: float


class Traced:
    """A module's layers, with all that follows from the size of its input.

    Args:
        stack: the module's layers; None: they are traced.

    Raises:
        TypeError: see :func:`~dynops.stack.graph.local_stack_of`.
    """

    def __init__(self, module: nn.Module, stack: Stack | None = None):
        self.module = module
        self.stack = local_stack_of(module) if stack is None else stack
        self.rows = self.stack.packs
        named = [(name, getattr(m, kind)) for name, m in module.named_modules() for kind in HOOKS]
        self.names, self.hooks = zip(*named, strict=True)  # of each module, the outermost first
        self.inner_hooks = self.hooks[len(HOOKS) :]
        self._sizes = KeptSizes()

    def holds(self, module: nn.Module) -> bool:
        """True where this is still what was traced."""
        return module is self.module and self.stack.watch.holds()

    def check_mode(self) -> None:
        """Raises TypeError, by name, for what has come since the trace."""
        for layer in (*self.stack.layers, *self.stack.checked):
            layer.check()
        if any(self.hooks):
            name, hooks = next(pair for pair in zip(self.names, self.hooks, strict=True) if pair[1])
            raise TypeError(
                f"{name or 'module'}: expected no hooks, as layers are not called, got {len(hooks)}"
            )

    def check_rows(self) -> None:
        for layer in self.stack.layers:
            if not layer.packs:
                raise ValueError(
                    f"path: expected 'tiles' or None, as {layer.name} cannot run on rows, got 'rows'"
                )

    def fits_step(self, step: tuple[int, int]) -> bool:
        """True where every value's blocks are whole pixels if the output's lie ``step`` apart."""
        return not any(step[i] % self.stack.multiple[i] for i in (0, 1))

    def check_step(self, step: tuple[int, int]) -> None:
        if not self.fits_step(step):
            raise ValueError(f"block_size: expected a multiple of {self.stack.multiple}, got {step}")

    # --------------------------------------------------------------------------------------- sizes

    def sizes(self, in_shape: tuple[int, int, int]) -> dict[int, tuple[int, int]]:
        """``(H, W)`` of each value."""
        return self._sizes.kept(in_shape, lambda: sizes_of(self.stack, in_shape))

    def output_shape(self, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return (in_shape[0], *self.sizes(in_shape)[self.stack.output])

    def layout(self, in_shape: tuple[int, int, int], blocks: BlockGeometry) -> Layout:
        self.check_step((blocks.step_h, blocks.step_w))
        return self._sizes.kept(
            (in_shape, blocks), lambda: layout_of(self.stack, self.sizes(in_shape), blocks)
        )

    def moved(self, active: use_mask, in_shape: tuple[int, int, int], device: torch.device) -> PixelPlan:
        """The plan of the output under the mask of ``active``, which goes through the layers' geometry."""
        sizes = self.sizes(in_shape)
        for layer in self.stack.layers:
            y, x = (reach.as_conv() for reach in layer.reaches[0])
            if y is not None and min(in_shape) > 0:
                pairs = [value for both in zip(y, x, strict=True) for value in both]
                maps = (in_shape[0], *sizes[layer.inputs[0]], *sizes[layer.out])
                active.move(ConvGeometry(*maps, *pairs[:8], 1, pairs[8]), bool(pairs[10]))
        return active.plan(self.output_shape(in_shape), device)

    # ----------------------------------------------------------------------------------------- runs

    def on_rows(self, x: Tensor, plan: PixelPlan | BlockPlan, base: Tensor | None = None) -> Tensor:
        """The output ``[N, O, H, W]`` at the pixels of ``plan``, ``base`` (or zero) elsewhere."""
        sizes = self.sizes((x.shape[0], x.shape[2], x.shape[3]))
        return run_rows(self.stack, (x,), Needed(self.stack, sizes, plan, base))

    def on_blocks(self, x: Tensor, plan: BlockPlan, base: Tensor | None = None) -> Tensor:
        """As :meth:`on_rows` at the pixels of these blocks; one convolution may read and write the maps in boxes."""
        layers = self.stack.layers
        alone = len(layers) == 1 and layers[0].conv is not None and layers[0].out == self.stack.output
        boxes = alone and layers[0].takes_blocks(x, plan, base)
        return self.on_rows(x, plan if boxes else plan.pixels(), base)

    def convs(self, in_shape: tuple[int, int, int]):
        """Each layer that is a convolution, with its geometry on this input."""
        sizes = self.sizes(in_shape)
        for layer in self.stack.layers:
            if layer.conv is not None:
                yield layer, layer.geometry((in_shape[0], *sizes[layer.inputs[0]]))

    def beats_dense(self, x: Tensor, in_shape: tuple[int, int, int]) -> bool:
        """True where rows are the faster way to compute every block."""
        return self.rows and any(beats_dense(x, layer.conv.weight, g) for layer, g in self.convs(in_shape))

    def cost(self, path: str, plan: BlockPlan, in_shape: tuple, device: torch.device, dtype) -> float | None:
        """The time that "rows" or "tiles" take for a plan, over that of the dense module.

        It is expected from what was measured of the convolutions, on a CPU from a model of them
        (``ops.dense_fallback``). None where that says nothing of one of them.

        Args:
            dtype: that of the products.
        """
        whole, cost, modelled = 0.0, 0.0, is_modelled(device)
        maps = self.layout(in_shape, plan.geometry).maps
        for layer, g in self.convs(in_shape):
            tile = maps[layer.out]
            share = break_even(path, device, dtype, layer.conv.weight, g)
            if share is None:
                return None
            pixels = g.batch * g.out_h * g.out_w
            computed = plan.num_blocks * tile.tile_h * tile.tile_w / pixels
            if path == "rows":  # where the halos of two blocks meet, rows have it once
                computed = min(computed, 1.0)
                if computed > 0.5 and modelled:  # counting would wait for a GPU
                    computed = int(torch.ops.dynops.block_cover(plan.index, None, list(tile)).sum()) / pixels
            macs = layer.macs(g.in_shape) * g.out_h * g.out_w
            whole, cost = whole + macs, cost + macs * computed / share
        if modelled:
            cost += CPU_CALLS
        return cost / whole if whole else None

    # ------------------------------------------------------------------------------------------ MACs

    def macs(self, x: Tensor, plan: PixelPlan | BlockPlan | None) -> Macs:
        """The MACs of a run: on rows at a plan of pixels, on tiles at a plan of blocks, without a plan on everything."""
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        live, dense = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device), 0.0
        sizes = self.sizes(in_shape)
        pixels = self._computed(plan, in_shape) if plan is not None else None
        for layer in self.stack.layers:
            each = layer.macs((in_shape[0], *sizes[layer.inputs[0]]))
            if each:
                height, width = sizes[layer.out]
                dense += each * height * width
                live = live + each * (height * width if pixels is None else pixels(layer.out))
        return Macs(live, dense)

    def _computed(self, plan: PixelPlan | BlockPlan, in_shape: tuple[int, int, int]):
        """Maps the number of a value to its pixels that are computed, float64 ``[N]``."""
        if isinstance(plan, PixelPlan):
            plans = needed_plans(self.stack, self.sizes(in_shape), plan)
            return lambda value: plans[value].mask().flatten(1).sum(1).double()
        maps, tiles = self.layout(in_shape, plan.geometry).maps, plan.blocks().flatten(1).sum(1).double()
        return lambda value: tiles * maps[value].tile_h * maps[value].tile_w
