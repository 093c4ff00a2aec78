"""Tells which kernels an op has on a CPU and on a GPU. ``dynops.build_info()`` says it, and the documentation's table."""

from __future__ import annotations

import torch

from .. import backends
from .registry import OPS, Op

_PIXELS = ("pixel_conv", "pixel_conv_input_grad", "pixel_conv_weight_grad")
_CHANNELS = ("channel_conv", "channel_conv_input_grad", "channel_conv_weight_grad")
_WEIGHTS = ("weighted_conv", "weighted_conv_input_grad", "weighted_conv_weight_grad")
_LINEAR = ("grouped_linear", "grouped_weight_grad", "pair_dots")
_ROWS = ("gather_rows", "scatter_rows", "scatter_planes")
_ACTIVATIONS = ("expert_activation", "expert_activation_grad")
# The registered ops with kernels that the public ops and the plans run, those of gradients included.
PARTS = {
    **dict.fromkeys(("sparse_conv2d", "sparse_conv_transpose2d", "packed_conv2d", "packed_conv_transpose2d"), _PIXELS),
    **dict.fromkeys(("gather_pixels", "scatter_pixels"), _ROWS),
    **dict.fromkeys(("gather_blocks", "scatter_blocks"), ("gather_tiles", "scatter_tiles")),
    **dict.fromkeys(("channel_conv2d", "channel_linear", "packed_channel_conv2d"), _CHANNELS),
    **dict.fromkeys(("gather_channels", "scatter_channels"), ("gather_channels", "scatter_channels")),
    "sample_conv2d": _WEIGHTS,
    "region_conv2d": _WEIGHTS,
    "mixed_conv2d": ("mixed_conv", *_WEIGHTS),
    "local_conv2d": ("local_conv", "local_conv_input_grad", "local_conv_kernel_grad"),
    "masked_output_conv2d": ("masked_output_conv",),
    "experts_mlp": ("experts_mlp", *_LINEAR, *_ACTIVATIONS),
    "grouped_linear": _LINEAR,
    "expert_activation": _ACTIVATIONS,
    **dict.fromkeys(("gather_pairs", "combine_pairs"), ("gather_pairs", "combine_pairs", "pair_dots")),
    "gather_samples": _ROWS,
    "scatter_samples": (*_ROWS, "merge_rows"),
    "interpolate_pixels": ("nearest_pixel",),
    "SparseBlocks": ("block_conv",),  # of one convolution
    "PixelPlan": ("mask_to_index", "mask_to_index_capacity", "inverse_index", "needed_mask"),
    "BlockPlan": ("block_mask", "block_cover", "block_pixels"),
    "ChannelPlan": ("channel_index", "channel_mask"),
    "ExpertPlan": ("expert_index",),
}  # fmt: skip


def kernel_of(op: Op, device: str) -> str:
    """The backend of an op on tensors of a "cpu" or "cuda" device: "cpp", "cuda", "triton" or "reference"."""
    name = op.overload._opname
    if _binary_has(name, device) or (device == "cuda" and _binary_has(f"cuda_{name}", device)):
        return {"cpu": "cpp", "cuda": "cuda"}[device]
    kernels = getattr(op.implementation, "kernels", None)
    if kernels is not None:
        if device == "cpu" and kernels.cpu is not None and backends.has_binary():
            return "cpp"
        if device == "cuda" and backends.has_triton():
            return "triton"
    return "reference"


def _binary_has(name: str, device: str) -> bool:
    key = device.upper()
    return hasattr(torch.ops.dynops, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"dynops::{name}", key)  # fmt: skip


def what_runs() -> dict[str, dict[str, str]]:
    """The backends of each public op and plan by device; several, joined by " + ", where its parts have different ones."""
    return {
        name: {
            device: " + ".join(dict.fromkeys(kernel_of(OPS[part], device) for part in parts))
            for device in ("cpu", "cuda")
        }
        for name, parts in PARTS.items()
    }


def build_info() -> dict:
    """Describes the binary: its versions, and the backend of each op on each device.

    Returns:
        Versions, instruction sets (``cpu_isas``, the one in use ``cpu_isa``), CUDA architectures (``cuda_archs``), and
        ``ops``: for each public op or plan, and "cpu" or "cuda", the backend in float32 and half
        precision: "cpp", "cuda" (CUDA C++), "triton" or "reference" (plain PyTorch). On a GPU a convolution of pixels
        from fewer than 16 channels in one group takes the reference instead, unless "triton" is named.

    Raises:
        RuntimeError: the package was not built.
    """
    return {**backends.build_info(), "ops": what_runs()}
