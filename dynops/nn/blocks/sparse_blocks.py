"""SparseBlocks: any stack of ordinary layers, computed on the active blocks of its output only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import backends, context
from ...geometry import BlockGeometry, pair
from ...modes import autocast_dtype
from ...ops import checks, dense_fallback
from ...ops.pixels.rows import in_format_of
from ...plans import BlockPlan, as_block_plan, check_mask
from ...plans.masks import check_shape
from ...stack.run_rows import checked_base
from ...stack.run_tiles import run_tiles
from ...stack.traced import Macs, Traced
from ..apart import apart

PATHS = (None, "rows", "tiles")


class SparseBlocks(nn.Module):
    """Any stack of ordinary layers, computed on the active blocks of its output only.

    Called as ``layer(x, mask_or_plan, base)``; without a mask, inside ``with dynops.use_mask(mask):`` the
    mask is the active one, resized to the output's resolution; without either it is ``module(x)``.

    A receptive-field trace of the module gives the inputs that a block reads. So in every active block the result is the
    dense one, up to rounding, also at the border of the map. There a layer inside reads its own padding, as in the
    dense module, and no pixel of a neighbouring tile.

    torch.fx must be able to trace the module's forward, with one input and one output. It may hold

    - Conv2d and ConvTranspose2d with zero padding, MaxPool2d, AvgPool2d, PixelShuffle, ZeroPad2d, and Upsample (nearest
      and bilinear, integer factors);
    - BatchNorm2d and Dropout in eval mode, elementwise activations, and the functional forms of all these;
    - sums, differences and products of maps, parameters of one value for each channel, cat of channels;
    - LayerNorm, RMSNorm and Linear between two permutes (ConvNeXt's blocks).

    It is traced at construction, and again after a module inside was replaced.

    Args:
        module: the stack; its parameters are found under ``module.`` in the ``state_dict``.
        block_size: pixels of an output block, ``int`` or ``(height, width)``; where the module enlarges
            its input, a multiple of the factor.
        path: "rows" runs on packed rows (``[P, C]``, the pixels that each layer needs, no halo is copied;
            stacks of convolutions, norms, activations and sums only); "tiles" gathers the blocks of the
            input with their halo and runs torch's own layers on them; None takes rows if they can run, else
            tiles, and the module itself if all blocks are active. On a CPU None also takes the module itself, with a
            mask, if the blocks and their halos are so much of the map that it wins. On a GPU None takes rows, tiles, or
            the module itself by measured break-even densities, if its architecture has them. (A capacity plan's density is
            not known, and a compiler asks for none.)

    Shape:
        - x: ``[N, C, H, W]``, either memory format.
        - mask_or_plan: ``[N, out_H, out_W]`` or ``[N, 1, out_H, out_W]``, or one for all samples:
          ``[out_H, out_W]`` or N = 1. A block is active where any of its pixels is nonzero. Or a
          :class:`dynops.BlockPlan`, whose own block size then holds.
        - base: ``[N, O, out_H, out_W]``, the output at inactive blocks; None for zero, "input" for ``x``.
        - output: ``where(block active, module(x), base)``, memory format of ``x``.

    Raises:
        TypeError: a layer that cannot run on blocks, by name: at construction, or at the call after a change (a norm or
            dropout in training mode, a hook).
        ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Ren et al., SBNet: Sparse Blocks Network (CVPR 2018).
    """

    def __init__(self, module: nn.Module, block_size: int | tuple[int, int], path: str | None = None):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        self.module, self.block_size = module, pair(block_size, "block_size", 1)
        if path not in PATHS:
            raise ValueError(f"path: expected one of {PATHS}, got {path!r}")
        self.path = path
        self._bound = Traced(module)
        self._bound.check_step(self.block_size)
        if path == "rows":
            self._bound.check_rows()

    def forward(
        self,
        x: Tensor,
        mask_or_plan: Tensor | BlockPlan | None = None,
        base: Tensor | str | None = None,
    ) -> Tensor:
        active = context.current()
        if mask_or_plan is None and active is None:
            if base is not None:
                raise ValueError("base: expected a mask with it (without one the layer is the module)")
            return self.module(x)
        checks.tensor(x, "x", 4, "[N, C, H, W]")
        bound = self._stack()
        if torch.compiler.is_compiling() and not bound.holds(self.module):  # a graph cannot trace it anew
            if mask_or_plan is None:
                raise RuntimeError(
                    "module: expected one that is as it was traced; call the layer once before it is compiled"
                )
            return self._dense(
                x, as_block_plan(mask_or_plan, self.block_size, batch=x.shape[0]), _base(base, x)
            )
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        out_shape = bound.output_shape(in_shape)
        if mask_or_plan is None:
            mask_or_plan = bound.moved(active, in_shape, x.device).mask()
        plan = self._plan(mask_or_plan, out_shape, x)
        bound.check_mode()
        base = _base(base, x)
        path = self.path or self._fastest(bound, x, plan, in_shape, active is None)
        if path == "dense":
            return self._dense(x, plan, base)
        if path == "rows":
            bound.check_rows()
            return bound.on_blocks(x, plan, base)
        layout = bound.layout(in_shape, plan.geometry)
        out = run_tiles(bound.stack, layout, x, plan, base)
        return in_format_of(out, x)

    def output_shape(self, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """``(N, H, W)`` of the output for an input of ``in_shape = (N, H, W)``."""
        return self._stack().output_shape(check_shape(in_shape, "in_shape"))

    def macs(self, x: Tensor, mask_or_plan: Tensor | BlockPlan | None = None) -> Macs:
        """The multiply-accumulates of ``layer(x, mask_or_plan)``, by the path that it takes: on rows the pixels that
        each convolution computes, on tiles whole tiles."""
        checks.tensor(x, "x", 4, "[N, C, H, W]")
        bound, in_shape = self._stack(), (x.shape[0], x.shape[2], x.shape[3])
        if mask_or_plan is None:
            return bound.macs(x, None)
        plan = self._plan(mask_or_plan, bound.output_shape(in_shape), x)
        path = self.path or self._fastest(bound, x, plan, in_shape, True)
        return bound.macs(x, {"dense": None, "rows": plan.pixels(), "tiles": plan}[path])

    def affected(self, changed: Tensor) -> BlockPlan:
        """The plan of every output block that reads a pixel of ``changed``.

        Args:
            changed: bool mask ``[N, H, W]`` or ``[N, 1, H, W]`` at the input's resolution.
        """
        changed = check_mask(changed)
        bound, in_shape = self._stack(), tuple(changed.shape)
        blocks = _grid(bound.output_shape(in_shape), self.block_size)
        reads = bound.layout(in_shape, blocks).maps[0]
        active = torch.ops.dynops.block_mask(changed, list(reads), False, 0.0)
        return BlockPlan.from_blocks(active, blocks.shape, self.block_size)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}" + (f", path={self.path!r}" if self.path else "")

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_bound"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._bound = Traced(self.module)

    def _stack(self) -> Traced:
        if not torch.compiler.is_compiling() and not self._bound.holds(self.module):
            self._bound = Traced(self.module)
        return self._bound

    def _plan(self, mask_or_plan, out_shape: tuple[int, int, int], x: Tensor) -> BlockPlan:
        plan = as_block_plan(mask_or_plan, self.block_size, batch=x.shape[0])
        if plan.shape != out_shape:
            raise ValueError(
                f"mask_or_plan: expected one for the output's [N, H, W] = {out_shape}, got {plan.shape}"
            )
        if plan.device != x.device:
            raise ValueError(f"mask_or_plan: expected it on x's device {x.device}, got {plan.device}")
        if plan.geometry.overlaps:
            raise ValueError("mask_or_plan: expected blocks that do not overlap")
        return plan

    def _fastest(self, bound: Traced, x: Tensor, plan: BlockPlan, in_shape, may_be_dense: bool) -> str:
        """The path that is expected to be the fastest: "dense", "rows" or "tiles"."""
        if may_be_dense and plan.is_full and _covers(plan.geometry) and not bound.beats_dense(x, in_shape):
            return "dense"
        paths = ["tiles"]
        # where only the reference runs, rows are the dense layer and a mask
        if bound.rows and backends.choose(None, x.device, x.dtype) != "reference":
            paths.insert(0, "rows")
        dtype, step = autocast_dtype(x) or x.dtype, (plan.geometry.step_h, plan.geometry.step_w)
        if dense_fallback.decides(x.device, dtype, plan.count, _pixels(plan)) and bound.fits_step(step):
            modelled = dense_fallback.is_modelled(x.device)
            paths = paths[:1] if modelled else paths  # rows win over tiles
            costs = {path: bound.cost(path, plan, in_shape, x.device, dtype) for path in paths}
            if None not in costs.values():
                costs |= {"dense": 1.1 if modelled else 1.0} if may_be_dense else {}
                return min(costs, key=costs.get)
        return paths[0]

    def _dense(self, x: Tensor, plan: BlockPlan, base: Tensor | None) -> Tensor:
        """The module itself, and what of it the plan keeps."""
        out = apart(self.module, x)  # x may be the base too
        if not (plan.is_full and _covers(plan.geometry)):
            base = None if base is None else checked_base(base, x, plan, out.shape[1], out.dtype)
            out = dense_fallback.keep_pixels(out, plan.pixels(), base)
        return in_format_of(out, x)


def _pixels(plan: BlockPlan) -> int:
    n, h, w = plan.shape
    return n * h * w


def _grid(shape: tuple[int, int, int], block_size: tuple[int, int]) -> BlockGeometry:
    """Blocks side by side over a map ``(N, H, W)``."""
    grid = [-(-shape[1 + i] // block_size[i]) for i in (0, 1)]
    return BlockGeometry(*shape, *grid, *block_size, 0, 0, *block_size)


def _covers(g: BlockGeometry) -> bool:
    """True if all blocks of a grid together cover the map (they may have gaps, or begin inside it)."""
    gaps = (g.step_h > g.tile_h and g.grid_h > 1) or (g.step_w > g.tile_w and g.grid_w > 1)
    end_h, end_w = (g.grid_h - 1) * g.step_h + g.tile_h, (g.grid_w - 1) * g.step_w + g.tile_w
    inside = g.first_h > 0 or g.first_w > 0 or g.first_h + end_h < g.height or g.first_w + end_w < g.width
    return not gaps and not inside


def _base(base, x: Tensor) -> Tensor | None:
    if base is None or isinstance(base, Tensor):
        return base
    if base == "input":
        return x
    raise TypeError(f"base: expected a tensor, None or 'input', got {base!r}")
