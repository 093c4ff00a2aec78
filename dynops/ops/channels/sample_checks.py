"""Argument checks of the ops with weights of their own for each sample or region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import modes
from ...geometry import ConvGeometry
from .. import checks

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tensors(x, weight, name: str, shapes: dict[int, str], bias) -> tuple[Tensor, Tensor, Tensor | None]:
    """Types, ranks, devices and dtypes; autocast as the dense layer has it. ``shapes``: of the weight, by rank."""
    checks.tensor(x, "x", 4, "[N, C, H, W]")
    what = " or ".join(shapes.values())
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor {what}, got {type(weight).__name__}")
    if weight.dim() not in shapes or min(weight.shape[-2:]) < 1:
        raise ValueError(
            f"{name}: expected {what}, a kernel of at least 1x1, got shape {tuple(weight.shape)}"
        )
    checks.floating(x)
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a tensor or None, got {type(bias).__name__}")
    dtype = modes.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.same(weight, name, x)
    if bias is not None:
        checks.same(bias, "bias", x)
    return x, weight, bias


def batch_of(weight: Tensor, name: str, x: Tensor) -> None:
    """``weight`` has one for each sample of ``x``."""
    if weight.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name}: expected one for each of {x.shape[0]} samples, got shape {tuple(weight.shape)}"
        )


def not_empty(weights: Tensor, what: str) -> None:
    """There is at least one weight to take or to mix."""
    if weights.shape[-5] == 0:
        raise ValueError(f"weights: expected at least one {what}, got shape {tuple(weights.shape)}")


def geometry(x: Tensor, weight: Tensor, options: tuple) -> tuple[Tensor, ConvGeometry]:
    """x, padded where the mode needs it, and the geometry. ``options``: stride to padding_mode."""
    g, fill = checks.conv_geometry(x.shape, weight.shape[-4:], options)
    return (x if fill is None else F.pad(x, fill, mode=options[-1])), g


def bias_of(bias: Tensor | None, shapes: dict[str, tuple]) -> Tensor | None:
    """``bias`` has one of the shapes."""
    if bias is not None and tuple(bias.shape) not in map(tuple, shapes.values()):
        expected = " or ".join(f"{name} = {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"bias: expected {expected}, got shape {tuple(bias.shape)}")
    return bias


def region_of(region, g: ConvGeometry, regions: int, x: Tensor) -> Tensor:
    """``region`` as int32 ``[N, out_h, out_w]``; on a CPU its values are checked too."""
    checks.tensor(region, "region", 3, "[N, out_H, out_W]")
    if region.dtype not in _INTEGERS:
        raise TypeError(f"region: expected an integer dtype, got {region.dtype}")
    checks.shaped(region, "region", g.out_shape, what="the output's [N, H, W] = ")
    checks.same(region, "region", x, dtype=False)
    if region.numel() and modes.may_look(region):
        low, high = (int(bound) for bound in torch.aminmax(region))
        if low < 0 or high >= regions:
            raise ValueError(f"region: expected values in [0, {regions}), got {low} to {high}")
    return region.to(torch.int32)


def mix_of(mix, x: Tensor, experts: int) -> None:
    """``mix`` is ``[N, E]``."""
    checks.tensor(mix, "mix", 2, "[N, E]")
    checks.floating(mix, "mix")
    checks.shaped(mix, "mix", (x.shape[0], experts))
    checks.same(mix, "mix", x, dtype=False)
