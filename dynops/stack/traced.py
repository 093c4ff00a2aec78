"""Bound: a module traced into layers that run on blocks or rows, and what follows from the sizes of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry import BlockGeometry
from ..ops import dense_fallback as auto
from ..ops.pixels.conv import beats_dense
from ..plans import BlockPlan
from .graph import Stack, layers_of
from .run_tiles import Layout, layout_of, sizes_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What sizes and norms follow from; 0.3 us a module to look at.
_SETTINGS = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "ceil_mode", "scale_factor", "eps")  # fmt: skip
_MAX_SIZES = 64  # input sizes whose geometry a layer keeps


class Bound:
    """A module's layers, and what follows from the sizes of its input."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.stack: Stack = layers_of(module)
        self.rows = all(layer.rows for layer in self.stack.layers)
        self.children = tuple((m._modules, dict(m._modules)) for m in module.modules())
        self.leaves = tuple(m.__dict__ for m in module.modules() if not m._modules)
        self.settings = _settings(self.leaves)
        self.hooks = tuple((name, getattr(m, kind)) for name, m in module.named_modules() for kind in _HOOKS)
        self._sizes: dict = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether the modules inside are still those that were traced, and have the strides and the like that they had."""
        if module is not self.module or not all(now == then for now, then in self.children):
            return False
        return self.settings == _settings(self.leaves)

    def check_mode(self) -> None:
        """Raises TypeError, by name, for what has come since the trace."""
        for layer in (*self.stack.layers, *self.stack.dropouts):
            layer.check()
        for name, hooks in self.hooks:
            if hooks:
                raise TypeError(
                    f"{name or 'module'}: expected no hooks, as layers are not called, got {len(hooks)}"
                )

    def check_rows(self) -> None:
        for layer in self.stack.layers:
            if not layer.rows:
                raise ValueError(
                    f"path: expected 'tiles' or None, as {layer.name} cannot run on rows, got 'rows'"
                )

    def fits_step(self, step: tuple[int, int]) -> bool:
        """Whether every value's blocks are whole pixels where the output's lie ``step`` apart."""
        return not any(step[i] % self.stack.multiple[i] for i in (0, 1))

    def check_step(self, step: tuple[int, int]) -> None:
        if not self.fits_step(step):
            raise ValueError(f"block_size: expected a multiple of {self.stack.multiple}, got {step}")

    def output_shape(self, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return self._kept(in_shape, lambda: (in_shape[0], *sizes_of(self.stack, in_shape)[self.stack.output]))

    def geometries(self, in_shape: tuple[int, int, int]) -> dict:
        """The geometry of each convolution, by the number of its output."""

        def make():
            sizes = sizes_of(self.stack, in_shape)
            convs = (layer for layer in self.stack.layers if layer.fused is not None)
            return {layer.out: layer.geometry((in_shape[0], *sizes[layer.inputs[0]])) for layer in convs}

        return self._kept(("geometries", in_shape), make)

    def beats_dense(self, x: Tensor, in_shape: tuple[int, int, int]) -> bool:
        """Whether rows are the faster way to compute every block."""
        if not self.rows:
            return False
        convs = (layer for layer in self.stack.layers if layer.fused is not None)
        geometries = self.geometries(in_shape)
        return any(beats_dense(x, layer.conv.weight, geometries[layer.out]) for layer in convs)

    def cost(self, path: str, plan: BlockPlan, in_shape: tuple, device: torch.device, dtype) -> float | None:
        """The time that "rows" or "tiles" take for a plan, over that of the dense module, expected from what was
        measured of its convolutions (``ops.auto``). None where that says nothing of one of them.

        Args:
            dtype: that of the products.
        """
        whole = cost = 0.0
        maps, geometries = self.layout(in_shape, plan.geometry).maps, self.geometries(in_shape)
        for layer in self.stack.layers:
            if layer.out not in geometries:
                continue
            g, tile, weight = geometries[layer.out], maps[layer.out], layer.conv.weight
            share = auto.break_even(path, device, dtype, weight, g)
            if share is None:
                return None
            computed = plan.num_blocks * tile.tile_h * tile.tile_w / (g.batch * g.out_h * g.out_w)
            if path == "rows":  # where the halos of two blocks meet, rows have it once
                computed = min(computed, 1.0)
            macs = g.macs(1, weight.shape[1] * g.groups, weight.shape[0]) * g.out_h * g.out_w
            whole, cost = whole + macs, cost + macs * computed / share
        return cost / whole if whole else None

    def layout(self, in_shape: tuple[int, int, int], blocks: BlockGeometry) -> Layout:
        self.check_step((blocks.step_h, blocks.step_w))
        return self._kept((in_shape, blocks), lambda: layout_of(self.stack, in_shape, blocks))

    def _kept(self, key, make):
        found = self._sizes.get(key)
        if found is None:
            if len(self._sizes) >= _MAX_SIZES:
                self._sizes.clear()
            found = self._sizes[key] = make()
        return found


def _settings(leaves: tuple[dict, ...]) -> list:
    return [leaf.get(name) for leaf in leaves for name in _SETTINGS]
