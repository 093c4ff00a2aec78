"""Formulas for ``torch.utils.flop_counter.FlopCounterMode``: 2 FLOPs for each product that an op computes.

Where a count lies on a device it is read, which waits for it; of a fake tensor the size stands for it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..geometry import as_block_geometry, as_geometry


def _known(value: Tensor) -> bool:
    return type(value) is Tensor and not value.is_meta


def _weight_shape(a: dict):
    """The shape of an op's weight, or of its gradient."""
    return a["weight_shape"] if "weight_shape" in a else a["weight"].shape


def _pixel_conv(a: dict) -> float:
    g, (outputs, inputs, *_) = as_geometry(a["geometry"]), _weight_shape(a)
    index, count = a["index"], a["count"]
    rows = index.shape[0] if count is None or not _known(count) else int(count)
    # of its taps an output of a transposed convolution meets a share, as torch counts them
    share = g.in_h * g.in_w / max(g.out_h * g.out_w, 1) if g.transposed else 1
    return rows * share * g.taps * outputs * inputs


def _block_conv(a: dict) -> float:
    g, (outputs, inputs, *_), index = as_geometry(a["geometry"]), a["weight"].shape, a["index"]
    b = as_block_geometry(a["blocks"])
    pixels = index.shape[0] * b.tile_h * b.tile_w
    if _known(index):
        pixels = int(torch.ops.dynops.block_cover(index, a["count"], a["blocks"]).sum())
    return pixels * g.taps * outputs * inputs


def _live(index: Tensor | None, count: Tensor | None, channels: int, heads: int) -> Tensor:
    """float64 ``[N or 1, heads, C]``, 1 where a channel is live."""
    if index is None or not _known(index):
        return torch.ones(1, heads, channels, dtype=torch.float64, device="cpu")
    return torch.ops.dynops.channel_mask(index, count, channels).double().cpu().view(-1, heads, channels)


def _channel_conv(a: dict) -> float:
    g, (outputs, inputs, *_), heads = as_geometry(a["geometry"]), _weight_shape(a), a["heads"]
    inputs, groups = inputs * g.groups, max(heads, g.groups)
    read = _live(a["in_index"], a["in_count"], inputs, heads)
    made = _live(a["out_index"], a["out_count"], outputs, 1)
    if heads == 1:
        read = read.reshape(-1, groups, inputs // groups)
    pairs = (read.sum(2) * made.reshape(-1, groups, outputs // groups).sum(2)).sum(1)
    return float(pairs.expand(g.batch).sum()) * g.taps * g.out_h * g.out_w


def _weighted_conv(a: dict) -> float:
    g, (_, regions, outputs, inputs, *_), region = as_geometry(a["geometry"]), _weight_shape(a), a["region"]
    pixels = g.batch * g.out_h * g.out_w
    if region is not None and _known(region):
        pixels = int(((region >= 0) & (region < regions)).sum())
    return pixels * g.taps * outputs * inputs


def _mixed_conv(a: dict) -> float:
    """The mixing of each sample's kernel counts too."""
    g, weight = as_geometry(a["geometry"]), a["weight"]
    _, outputs, inputs, *_ = weight.shape
    pixels = g.batch * g.out_h * g.out_w
    return pixels * g.taps * outputs * inputs + a["mix"].shape[0] * weight.numel()


def _local_conv(a: dict) -> float:
    """One product of each output and tap."""
    g, channels = as_geometry(a["geometry"]), (a["x"] if "x" in a else a["grad"]).shape[1]
    if "kernels" in a:
        return a["kernels"].numel() * channels // g.groups
    return a["grad"].numel() * g.taps


def _masked_output_conv(a: dict) -> float:
    mask = a["mask"]
    outputs = int(mask.sum()) if _known(mask) else mask.numel()
    return outputs * as_geometry(a["geometry"]).taps * a["weight"].shape[1]


def _kept(a: dict) -> int:
    """The pairs that no capacity dropped."""
    return int(a["offsets"][-1]) if _known(a["offsets"]) else a["order"].shape[0]


def _grouped_linear(a: dict) -> float:
    return _kept(a) * a["weight"].shape[1] * a["weight"].shape[2]


def _grouped_weight_grad(a: dict) -> float:
    return _kept(a) * a["grad"].shape[1] * a["x"].shape[1]


def _experts_mlp(a: dict) -> float:
    return _kept(a) * (a["up"][0].numel() + a["down"][0].numel())


# The products of an op's arguments, by name.
_FORMULAS = {
    "block_conv": _block_conv,
    "pixel_conv": _pixel_conv,
    "pixel_conv_input_grad": _pixel_conv,
    "pixel_conv_weight_grad": _pixel_conv,
    "channel_conv": _channel_conv,
    "channel_conv_input_grad": _channel_conv,
    "channel_conv_weight_grad": _channel_conv,
    "weighted_conv": _weighted_conv,
    "weighted_conv_input_grad": _weighted_conv,
    "weighted_conv_weight_grad": _weighted_conv,
    "mixed_conv": _mixed_conv,
    "local_conv": _local_conv,
    "local_conv_input_grad": _local_conv,
    "local_conv_kernel_grad": _local_conv,
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
                op = getattr(torch.ops.dynops, name)
                table.setdefault(op, _doubled(macs, [a.name for a in op.default._schema.arguments]))


def _doubled(macs, names: list[str]):
    def flops(*args, out_val=None, **kwargs) -> int:
        return round(2 * macs(dict(zip(names, args, strict=False)) | kwargs))

    return flops
