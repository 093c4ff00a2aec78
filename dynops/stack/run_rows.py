"""Layers on packed rows: a convolution with all that is fused to it, and stacks of them (``nn.stack``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry import ConvGeometry
from ..modes import autocast_dtype
from ..ops import checks
from ..ops.epilogue import ACTIVATIONS
from ..ops.pixels.conv import _pixel_conv
from ..ops.pixels.rows import gather_rows, in_format, in_format_of, scatter_pixels
from ..plans import PixelPlan
from .norm import fold, norm_rows, uses_batch_statistics

_NOTHING = ("", None, None, None, None)


def checked_base(base: Tensor, x: Tensor, plan, channels: int, dtype: torch.dtype) -> Tensor:
    """``base`` in the output's dtype, which is not that of ``x`` under autocast."""
    checks.dense_map(base, plan, "base", channels, None if dtype != x.dtype else x.dtype)
    return base.to(dtype)


class FusedConv:
    """A convolution with the norm, residual sum and activation after it: one call of the op."""

    def __init__(self, conv: nn.Module, norm: nn.BatchNorm2d | None, activation: str):
        self.conv, self.norm, self.activation = conv, norm, activation
        self.in_channels = conv.in_channels
        self.parameters = conv._parameters  # nn.Module.__getattr__ costs half a microsecond

    def __call__(
        self,
        values: Tensor,  # [R, C], or [N, C, H, W] where in_plan is None
        in_plan: PixelPlan | None,
        plan: PixelPlan,
        geometry: ConvGeometry,
        autocast: torch.dtype | None,
        residual: Tensor | None = None,  # [P, O]
        base: Tensor | None = None,  # [N, O, H, W], only without ``rows``
        rows: bool = True,
    ) -> Tensor:  # [P, O], or [N, O, H, W] without ``rows``
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if in_plan is None or values.shape[1] != self.in_channels:
            self.check(values)
        if autocast is not None and values.dtype != torch.float64:
            values, bias = values.to(autocast), None if bias is None else bias.to(autocast)
        elif values.dtype is not weight.dtype:
            raise TypeError(f"x: expected the weight's dtype {weight.dtype}, got {values.dtype}")
        if residual is not None and residual.dtype is not values.dtype:
            residual = residual.to(values.dtype)
        norm = self.norm
        if norm is None:
            epilogue = (self.activation, None, None, None, residual)
        elif uses_batch_statistics(norm):
            out = _pixel_conv(values, weight, bias, plan, in_plan, geometry, _NOTHING, None, True, None)
            return norm_rows(norm, out, plan, residual, self.activation)
        else:
            epilogue = (self.activation, *fold(norm), None, residual)
        return _pixel_conv(values, weight, bias, plan, in_plan, geometry, epilogue, base, rows, None)

    def check(self, x: Tensor) -> None:
        """Raises ValueError for an input of other channels, or on another device."""
        weight = self.parameters["weight"]
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected {self.in_channels} channels, got {x.shape[1]}")
        if x.device != weight.device:
            raise ValueError(f"x: expected it on the weight's device {weight.device}, got {x.device}")


# ------------------------------------------------------------------------------------- stacks


def run_rows(stack, geometries: dict, x: Tensor, plan: PixelPlan, base: Tensor | None) -> Tensor:
    """The output of a stack at the pixels of ``plan``, ``base`` (or zero) elsewhere: ``[N, O, H, W]``.

    Every value exists at the pixels that its readers read, as rows; only the input and the output are dense.

    Args:
        stack: a :class:`~dynops.stack.graph.Stack` of layers that run on rows.
        geometries: for each convolution, by the number of its output, the geometry on this input.
    """
    plans = _plans(stack, geometries, plan)
    rows = _Rows(x, plans)
    autocast, out = autocast_dtype(x), None
    last = stack.layers[-1] if stack.layers else None
    for layer in stack.layers:
        to = plans[layer.out]
        if layer.fused is None:
            rows.values[layer.out] = layer.on_rows([rows.at(v, to) for v in layer.inputs], to)
            continue
        residual = rows.added(layer.inputs[1], to, layer.conv.out_channels) if layer.residual else None
        values, in_plan = rows.of(layer.inputs[0])
        channels = layer.conv.out_channels
        ends = layer is last and layer.out == stack.output
        if ends and (residual is None or residual.shape[1] == channels):
            if base is not None:
                dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
                base = checked_base(base, x, to, channels, dtype)
            out = layer.fused(
                values, in_plan, to, geometries[layer.out], autocast, residual, base, rows=False
            )
        else:
            rows.values[layer.out] = _conv_rows(
                layer, values, in_plan, to, geometries[layer.out], autocast, residual
            )
    if out is None:
        values = rows.at(stack.output, plan)
        if base is not None:
            base = checked_base(base, x, plan, values.shape[1], values.dtype)
        out = scatter_pixels(values, plan, base)
    return in_format_of(out, x)


def _conv_rows(layer, values, in_plan, plan, geometry, autocast, residual: Tensor | None) -> Tensor:
    if residual is None or residual.shape[1] == layer.conv.out_channels:
        return layer.fused(values, in_plan, plan, geometry, autocast, residual)
    plain = FusedConv(layer.conv, layer.norm, "")  # one channel is added to many
    return ACTIVATIONS[layer.activation](plain(values, in_plan, plan, geometry, autocast) + residual)


class _Rows:
    """The values of one run: the dense input, and rows at the plan of each value."""

    def __init__(self, x: Tensor, plans: dict[int, PixelPlan]):
        self.x = in_format(x, torch.channels_last)  # once for all its readers
        self.plans, self.values = plans, {}
        self._inputs: dict[int, Tensor] = {}  # rows of the input, by the id of their plan

    def of(self, value: int) -> tuple[Tensor, PixelPlan | None]:
        """A value as a convolution reads it: rows and their plan, or a dense map and None."""
        return (self.x, None) if value == 0 else (self.values[value], self.plans[value])

    def added(self, value: int, plan: PixelPlan, channels: int) -> Tensor:
        """A value as a convolution adds it: rows, or the input itself, which is read where it lies."""
        whole = value == 0 and self.x.shape[1] == channels and tuple(self.x.shape[2:]) == plan.shape[1:]
        return self.x if whole else self.at(value, plan)

    def at(self, value: int, plan: PixelPlan) -> Tensor:
        """The rows of a value at a plan that lies within its own."""
        if value == 0:
            rows = self._inputs.get(id(plan))
            if rows is None:
                rows = self._inputs[id(plan)] = gather_rows(self.x, plan.index, plan.count)
            return rows
        rows, own = self.values[value], self.plans[value]
        if own is plan:
            return rows
        index = own.inverse().reshape(-1)[plan.index.clamp(min=0).long()]
        if plan.count is not None:
            index = torch.where(plan.index < 0, -1, index)
        return gather_rows(rows.t()[None, :, None], index, plan.count)


def _plans(stack, geometries: dict, plan: PixelPlan) -> dict[int, PixelPlan]:
    """The plan of each value but the input: what its readers read."""
    needs: dict[int, list[PixelPlan]] = {stack.output: [plan]}
    inside: dict[int, PixelPlan] = {}  # by the id of a plan: one that lies within it
    plans = {}
    for layer in reversed(stack.layers):
        to = plans[layer.out] = _union(needs[layer.out], inside)
        for i, value in enumerate(layer.inputs):
            if value == 0:
                continue
            reads = to
            if i == 0 and layer.fused is not None:
                geometry = geometries[layer.out]
                reads = to.needed_by(geometry)
                if reads is not to and _reads_its_own_place(geometry):
                    inside[id(reads)] = to
            needs.setdefault(value, []).append(reads)
    plans.setdefault(stack.output, plan)
    return plans


def _reads_its_own_place(g: ConvGeometry) -> bool:
    """Whether output pixel p reads (among others) input pixel p."""
    return (
        not g.transposed
        and g.stride_h == g.stride_w == 1
        and (g.in_h, g.in_w) == (g.out_h, g.out_w)
        and g.pad_h % g.dil_h == g.pad_w % g.dil_w == 0
        and g.pad_h // g.dil_h < g.kernel_h
        and g.pad_w // g.dil_w < g.kernel_w
    )


def _union(plans: list[PixelPlan], inside: dict[int, PixelPlan]) -> PixelPlan:
    """The plan that holds all of them: one of them, where it is known to."""
    for plan in plans:
        held, within = {id(plan)}, plan
        while (within := inside.get(id(within))) is not None:
            held.add(id(within))
        if all(id(other) in held for other in plans):
            return plan
    mask = plans[0].mask()
    for plan in plans[1:]:
        mask = mask | plan.mask()
    return PixelPlan.from_mask(mask, None if plans[0].count is None else mask.numel())
