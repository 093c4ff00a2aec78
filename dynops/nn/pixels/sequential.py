"""SparseSequential: a chain of convolutions, norms and activations on packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ...modes import autocast_dtype
from ...ops import gather_pixels, scatter_pixels
from ...ops.pixels.rows import in_format_of
from ...plans import PixelPlan, as_pixel_plan
from ...stack.activations import ELEMENTWISE, fused_name
from ...stack.module_geometry import geometry_of
from ...stack.norm import norm_rows
from ...stack.run_rows import FusedConv
from .conv import SparseConv2d, SparseConvTranspose2d
from .masked import MaskedBatchNorm2d

_CONVS = (nn.Conv2d, SparseConv2d)
_TRANSPOSED = (nn.ConvTranspose2d, SparseConvTranspose2d)
_PASS = (nn.Identity, nn.Dropout)


class _Step(NamedTuple):
    """A convolution (or none) and what is fused to it."""

    conv: nn.Module | None
    norm: nn.Module | None
    activation: str
    other: nn.Module | None  # alone: an elementwise module or a dropout


class SparseSequential(nn.Sequential):
    """``nn.Sequential`` of convolutions, norms and activations, computed for the pixels of a mask only.

    Called as ``chain(x, mask_or_plan, base=None)``, with the mask at the output's resolution; without
    a mask it is ``nn.Sequential``. Every inner layer is computed wherever a later one reads it, so in
    eval mode ``chain(x, mask)[mask] == dense_chain(x)[mask]`` up to rounding. Between the layers only
    packed rows ``[P, C]`` exist; a norm in eval mode and the activation after it are part of the
    convolution.

    In training mode a norm takes its statistics from the rows that are computed (active pixels and
    the halo that later layers read), not from the whole map, and updates its running statistics with
    them as ``nn.BatchNorm2d`` does. Dropout draws for the computed rows only. With a mask, hooks of
    the inner modules are not called.

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

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        for name, module in _flat(self):
            _check(name, module)

    @classmethod
    def from_dense(cls, chain: nn.Sequential) -> SparseSequential:
        """A sparse chain of the same modules (the same objects, names and training flag)."""
        sparse = cls()
        for name, module in chain.named_children():
            sparse.add_module(name, module)
        for name, module in _flat(sparse):
            _check(name, module)
        sparse.training = chain.training
        return sparse

    def forward(
        self, input: Tensor, mask_or_plan: Tensor | PixelPlan | None = None, base: Tensor | None = None
    ) -> Tensor:
        if mask_or_plan is None:
            if base is not None:
                raise ValueError("base: expected a mask with it (without one the chain is nn.Sequential)")
            return super().forward(input)
        if not isinstance(input, Tensor) or input.dim() != 4:
            raise ValueError(f"input: expected a tensor [N, C, H, W], got {getattr(input, 'shape', input)}")
        plan = as_pixel_plan(mask_or_plan, batch=input.shape[0])
        steps = _fuse(self)
        geometries = _geometries(steps, plan, (input.shape[0], input.shape[2], input.shape[3]))
        plans, autocast = _plans(geometries, plan), autocast_dtype(input)
        value, in_plan = input, None
        for (conv, norm, activation, other), geometry, out_plan in zip(steps, geometries, plans, strict=True):
            if conv is not None:
                value = FusedConv(conv, norm, activation)(value, in_plan, out_plan, geometry, autocast)
            else:
                value = gather_pixels(value, out_plan) if in_plan is None else value
                value = other(value) if norm is None else norm_rows(norm, value, out_plan, None, activation)
            in_plan = out_plan
        if in_plan is None:  # an empty chain
            value = gather_pixels(value, plan)
        return in_format_of(scatter_pixels(value, plan, base), input)


def _flat(chain: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in chain.named_children():
        if type(module) in (nn.Sequential, SparseSequential):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _check(name: str, module: nn.Module) -> None:
    kind = type(module)
    if kind in _CONVS + _TRANSPOSED:
        if module.padding_mode != "zeros":
            raise TypeError(f"{name}: expected padding_mode='zeros', got {module}")
    elif kind not in (nn.BatchNorm2d, MaskedBatchNorm2d, *ELEMENTWISE, *_PASS):
        raise TypeError(
            f"{name}: expected a convolution, BatchNorm2d, elementwise activation, Dropout or Identity, "
            f"got {module}"
        )


def _fuse(chain: nn.Sequential) -> list[_Step]:
    """The chain as steps: each convolution takes the norm and the activation that follow it."""
    steps: list[_Step] = []
    for name, module in _flat(chain):
        _check(name, module)
        last = steps[-1] if steps else None
        takes = last is not None and last.other is None and not last.activation
        if isinstance(module, _CONVS + _TRANSPOSED):
            steps.append(_Step(module, None, "", None))
        elif isinstance(module, nn.BatchNorm2d):
            if takes and last.conv is not None and last.norm is None:
                steps[-1] = last._replace(norm=module)
            else:
                steps.append(_Step(None, module, "", None))
        elif type(module) is nn.Identity:
            continue
        elif takes and fused_name(module):
            steps[-1] = last._replace(activation=fused_name(module))
        else:
            steps.append(_Step(None, None, "", module))
    return steps


def _geometries(steps: list[_Step], plan: PixelPlan, in_shape: tuple[int, int, int]):
    """For each step the geometry of its convolution (or None) on this input."""
    geometries = []
    for step in steps:
        geometries.append(None if step.conv is None else geometry_of(step.conv, in_shape))
        in_shape = in_shape if step.conv is None else geometries[-1].out_shape
    if plan.shape != in_shape:
        raise ValueError(
            f"mask_or_plan: expected one for the output's [N, H, W] = {in_shape}, got {plan.shape}"
        )
    return geometries


def _plans(geometries: list, plan: PixelPlan) -> list[PixelPlan]:
    """The plan of each step's output, from the last to the first: what the step after it reads."""
    plans = []
    for i in range(len(geometries) - 1, -1, -1):
        plans.append(plan)
        if geometries[i] is not None and i > 0:  # the first one reads the dense input
            plan = plan.needed_by(geometries[i])
    return plans[::-1]
