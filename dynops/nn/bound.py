"""Bound: a module traced into layers that run on blocks or rows, and what follows from the sizes of its input."""

from __future__ import annotations

from torch import Tensor, nn

from ..geometry import BlockGeometry
from ..ops.pixels import beats_dense
from .stack import Stack, layers_of
from .tiles import Layout, layout_of, sizes_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MAX_SIZES = 64  # input sizes whose geometry a layer keeps


class Bound:
    """A module's layers, and what follows from the sizes of its input."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.stack: Stack = layers_of(module)
        self.rows = all(layer.rows for layer in self.stack.layers)
        self.children = tuple((m._modules, dict(m._modules)) for m in module.modules())
        self.hooks = tuple((name, getattr(m, kind)) for name, m in module.named_modules() for kind in _HOOKS)
        self._sizes: dict = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether the modules inside are still those that were traced."""
        return module is self.module and all(now == then for now, then in self.children)

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

    def check_step(self, step: tuple[int, int]) -> None:
        if any(step[i] % self.stack.multiple[i] for i in (0, 1)):
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
