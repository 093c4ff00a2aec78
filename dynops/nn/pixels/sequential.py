"""SparseSequential: a chain of convolutions, norms and activations on packed rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.dense_fallback import keep_pixels
from ...plans import PixelPlan, as_pixel_plan
from ...stack.activations import ELEMENTWISE, fused_name
from ...stack.graph import chain_of
from ...stack.run_rows import checked_base
from ...stack.traced import Macs, Traced
from .conv import SparseConv2d, SparseConvTranspose2d
from .masked import MaskedBatchNorm2d

_CONVS = (nn.Conv2d, SparseConv2d, nn.ConvTranspose2d, SparseConvTranspose2d)
_NORMS = (nn.BatchNorm2d, MaskedBatchNorm2d)


class SparseSequential(nn.Sequential):
    """``nn.Sequential`` of convolutions, norms and activations, computed for the pixels of a mask only.

    Called as ``chain(x, mask_or_plan, base=None)``, with the mask at the output's resolution; without
    a mask it is ``nn.Sequential``. Every inner layer is computed wherever a later one reads it, so in
    eval mode ``chain(x, mask)[mask] == dense_chain(x)[mask]`` up to rounding. Between the layers only
    packed rows ``[P, C]`` exist; a convolution takes the norm in eval mode and the activation after it.

    In training mode a norm takes its statistics from the rows that are computed, not from the whole map.
    These are the active pixels and the halo that later layers read. It updates its running statistics with
    them as ``nn.BatchNorm2d`` does. Dropout draws for the computed rows only. Where an inner module has a hook, as
    pruning sets one, the chain runs dense and keeps the pixels of the mask.

    Takes exactly these modules: Conv2d and ConvTranspose2d (padding mode zeros) or their sparse
    forms, BatchNorm2d, elementwise activations, Dropout, Identity, and nn.Sequential of the same.

    Shape:
        - x: ``[N, C, H, W]``. mask_or_plan: ``[N, out_H, out_W]``, ``[N, 1, out_H, out_W]``, one for all samples
          (``[out_H, out_W]``, or N = 1), or a plan.
        - base: ``[N, O, out_H, out_W]``, the output at inactive pixels; zero if None.
        - output: ``[N, O, out_H, out_W]``, memory format of ``x``.

    Raises:
        TypeError: at construction (or at the call, if the chain was changed since): a module that
            cannot run on rows, by name.
        ValueError: a mask that does not fit the output.
    """

    _traced: Traced | None = None

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        self._stack()

    @classmethod
    def from_dense(cls, chain: nn.Sequential) -> SparseSequential:
        """A sparse chain of the same modules (the same objects, names and training flag).

        Raises:
            TypeError: not an ``nn.Sequential``, or one with a forward of its own.
        """
        if not isinstance(chain, nn.Sequential) or type(chain).forward not in (
            nn.Sequential.forward,
            cls.forward,
        ):
            raise TypeError(
                f"chain: expected an nn.Sequential with its own forward, got {type(chain).__name__}"
            )
        sparse = cls()
        for name, module in chain.named_children():
            sparse.add_module(name, module)
        sparse._stack()
        sparse.training = chain.training
        return sparse

    def forward(
        self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None, base: Tensor | None = None
    ) -> Tensor:
        if mask_or_plan is None:
            if base is not None:
                raise ValueError("base: expected a mask with it (without one the chain is nn.Sequential)")
            return super().forward(input)
        # a graph cannot make a stack anew
        if torch.compiler.is_compiling() and not self._stack().holds(self):
            return self._dense(input, as_pixel_plan(mask_or_plan, batch=input.shape[0]), base)
        traced, plan = self._bound_to(input, mask_or_plan)
        if any(traced.inner_hooks):  # they may make the weights, as pruning does
            return self._dense(input, plan, base)
        return traced.on_rows(input, plan, base)

    def _dense(self, x: Tensor, plan: PixelPlan, base: Tensor | None) -> Tensor:
        """``nn.Sequential`` itself, and what of it the plan keeps."""
        out = super().forward(x)
        base = None if base is None else checked_base(base, x, plan, out.shape[1], out.dtype)
        return keep_pixels(out, plan, base)

    def macs(self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None) -> Macs:
        """The multiply-accumulates of ``chain(input, mask_or_plan)``: each layer's wherever a later one reads it."""
        if mask_or_plan is None:
            return self._stack().macs(input if input.dim() == 4 else input[None], None)
        traced, plan = self._bound_to(input, mask_or_plan)
        return traced.macs(input, None if any(traced.inner_hooks) else plan)

    def _bound_to(self, x: Tensor, mask_or_plan) -> tuple[Traced, PixelPlan]:
        """The chain's layers, and the plan of its output."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"input: expected a tensor [N, C, H, W], got {getattr(x, 'shape', x)}")
        plan, traced = as_pixel_plan(mask_or_plan, batch=x.shape[0]), self._stack()
        out_shape = traced.output_shape((x.shape[0], x.shape[2], x.shape[3]))
        if plan.shape != out_shape:
            raise ValueError(
                f"mask_or_plan: expected one for the output's [N, H, W] = {out_shape}, got {plan.shape}"
            )
        return traced, plan

    def _stack(self) -> Traced:
        """The chain as a stack, made anew where the chain was changed.

        Raises:
            TypeError: a module that cannot run on rows, by name.
        """
        traced, compiling = self._traced, torch.compiler.is_compiling()
        if traced is None or not (compiling or traced.holds(self)):
            steps = [(_kind(name, module), name, module) for name, module in _flat(self)]
            traced = Traced(self, chain_of(self, [step for step in steps if step[0]]))
            if not compiling:
                self._traced = traced
        return traced

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_traced"}

    def __setstate__(self, state):
        super().__setstate__(state)
        with contextlib.suppress(TypeError):  # the next call raises it
            self._stack()


def _flat(chain: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in chain.named_children():
        if type(module) in (nn.Sequential, SparseSequential):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _kind(name: str, module: nn.Module) -> str:
    """The kind of a module's step in a trace; "" for one that does nothing."""
    kind = type(module)
    if kind in _CONVS:
        if module.padding_mode != "zeros":
            raise TypeError(f"{name}: expected padding_mode='zeros', got {module}")
        return "conv"
    if kind in _NORMS:
        return "norm"
    if kind in ELEMENTWISE:
        return "act" if fused_name(module) else "module"
    if kind in (nn.Identity, nn.Dropout):
        return "dropout" if kind is nn.Dropout else ""
    raise TypeError(
        f"{name}: expected a convolution, BatchNorm2d, elementwise activation, Dropout or Identity, got {module}"
        " (dynops.nn.SparseBlocks takes pooling, upsampling and residual sums too)"
    )
