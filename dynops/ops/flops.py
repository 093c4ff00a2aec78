"""Formulas for ``torch.utils.flop_counter.FlopCounterMode``: 2 FLOPs for each product that an op computes.

Where a count lies on a device it is read, which waits for it; of a fake tensor the size stands for it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..geometry import ConvGeometry, as_geometry


def _known(value: Tensor) -> bool:
    return type(value) is Tensor and not value.is_meta


def _rows(index: Tensor, count: Tensor | None) -> int:
    """The rows of a plan that are computed."""
    return index.shape[0] if count is None or not _known(count) else int(count)


def _conv(x, weight, bias, index, count, source, geometry, *options) -> float:
    g = as_geometry(geometry)
    return _conv_macs(g, weight.shape, _rows(index, count))


def _conv_macs(g: ConvGeometry, weight_shape, rows: int) -> float:
    outputs, inputs = weight_shape[0], weight_shape[1]
    if not g.transposed:
        return rows * g.taps * outputs * inputs
    share = (
        g.in_h * g.in_w / max(g.out_h * g.out_w, 1)
    )  # of its taps that an output meets, as torch counts them
    return rows * share * g.taps * outputs * inputs


def _conv_input_grad(grad, weight, index, count, source, source_rows, geometry, *options) -> float:
    return _conv_macs(as_geometry(geometry), weight.shape, _rows(index, count))


def _conv_weight_grad(grad, x, index, count, source, weight_shape, geometry, *options) -> float:
    return _conv_macs(as_geometry(geometry), weight_shape, _rows(index, count))


# ------------------------------------------------------------------------------------- channels


def _live(index: Tensor | None, count: Tensor | None, channels: int, heads: int) -> Tensor:
    """float64 ``[N or 1, heads, C]``, 1 where a channel is live."""
    if index is None or not _known(index):
        return torch.ones(1, heads, channels, dtype=torch.float64, device="cpu")
    return torch.ops.dynops.channel_mask(index, count, channels).double().cpu().view(-1, heads, channels)


def _pairs(weight_shape, in_index, in_count, out_index, out_count, geometry, heads: int) -> float:
    g = as_geometry(geometry)
    outputs, inputs = weight_shape[0], weight_shape[1] * g.groups
    groups = max(heads, g.groups)
    read, made = _live(in_index, in_count, inputs, heads), _live(out_index, out_count, outputs, 1)
    if heads == 1:
        read = read.reshape(-1, groups, inputs // groups)
    pairs = (read.sum(2) * made.reshape(-1, groups, outputs // groups).sum(2)).sum(1)
    return float(pairs.expand(g.batch).sum()) * g.taps * g.out_h * g.out_w


def _channel_conv(x, weight, bias, in_index, in_count, out_index, out_count, geometry, heads, *options):
    return _pairs(weight.shape, in_index, in_count, out_index, out_count, geometry, heads)


def _channel_input_grad(grad, weight, in_index, in_count, out_index, out_count, geometry, heads, *options):
    return _pairs(weight.shape, in_index, in_count, out_index, out_count, geometry, heads)


def _channel_weight_grad(
    grad, x, in_index, in_count, out_index, out_count, weight_shape, geometry, heads, *options
):
    return _pairs(weight_shape, in_index, in_count, out_index, out_count, geometry, heads)


def _weighted(weight_shape, region, geometry) -> float:
    g = as_geometry(geometry)
    pixels = g.batch * g.out_h * g.out_w
    if region is not None and _known(region):
        pixels = int(((region >= 0) & (region < weight_shape[1])).sum())
    return pixels * g.taps * weight_shape[2] * weight_shape[3]


def _weighted_conv(x, weight, bias, region, geometry, *options) -> float:
    return _weighted(weight.shape, region, geometry)


def _weighted_input_grad(grad, weight, region, geometry, *options) -> float:
    return _weighted(weight.shape, region, geometry)


def _weighted_weight_grad(grad, x, region, weight_shape, geometry, *options) -> float:
    return _weighted(weight_shape, region, geometry)


def _mixed_conv(x, weight, mix, bias, geometry, *options) -> float:
    """The mixing of each sample's kernel too."""
    return _weighted((1, 1, *weight.shape[1:]), None, geometry) + mix.shape[0] * weight.numel()


def _local_conv(x, kernels, geometry, *options) -> float:
    return kernels.numel() * x.shape[1] // as_geometry(geometry).groups


def _masked_output_conv(x, weight, bias, mask, partial, begin, geometry, *options) -> float:
    outputs = int(mask.sum()) if _known(mask) else mask.numel()
    return outputs * as_geometry(geometry).taps * weight.shape[1]


# -------------------------------------------------------------------------------------- experts


def _kept(order: Tensor, offsets: Tensor) -> int:
    """The pairs that no capacity dropped."""
    return int(offsets[-1]) if _known(offsets) else order.shape[0]


def _grouped_linear(x, weight, scale, bias, row_weight, order, offsets, *options) -> float:
    return _kept(order, offsets) * weight.shape[1] * weight.shape[2]


def _grouped_weight_grad(grad, x, row_weight, order, offsets, *options) -> float:
    return _kept(order, offsets) * grad.shape[1] * x.shape[1]


def _experts_mlp(
    x, up, down, up_scale, down_scale, up_bias, down_bias, row_weight, order, offsets, *options
) -> float:
    return _kept(order, offsets) * (up[0].numel() + down[0].numel())


_FORMULAS = {
    "pixel_conv": _conv,
    "pixel_conv_input_grad": _conv_input_grad,
    "pixel_conv_weight_grad": _conv_weight_grad,
    "channel_conv": _channel_conv,
    "channel_conv_input_grad": _channel_input_grad,
    "channel_conv_weight_grad": _channel_weight_grad,
    "weighted_conv": _weighted_conv,
    "weighted_conv_input_grad": _weighted_input_grad,
    "weighted_conv_weight_grad": _weighted_weight_grad,
    "mixed_conv": _mixed_conv,
    "local_conv": _local_conv,
    "local_conv_input_grad": _local_conv,
    "local_conv_kernel_grad": lambda grad, x, geometry, upsample, *options: (
        grad.numel() * as_geometry(geometry).taps
    ),
    "masked_output_conv": _masked_output_conv,
    "grouped_linear": _grouped_linear,
    "grouped_weight_grad": _grouped_weight_grad,
    "experts_mlp": _experts_mlp,
}


def register_formulas() -> None:
    """Tells torch's counter of FLOPs, where it is loaded, and the ones that are open.

    Called at each op that a dispatch mode sees: a counter copies the formulas when it is made, and loading it here
    would load Triton.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    tables = [module.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        tables.append(getattr(getattr(mode, "counter", None), "flop_registry", {}))
    for table in tables:
        if torch.ops.dynops.pixel_conv not in table:
            for name, macs in _FORMULAS.items():
                table.setdefault(getattr(torch.ops.dynops, name), _doubled(macs))


def _doubled(macs):
    def flops(*args, out_val=None, **kwargs) -> int:
        return round(2 * macs(*args, **kwargs))

    return flops
