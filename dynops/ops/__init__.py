"""The ops: functions with gradients, dense tensors (or packed rows) and a plan in, tensors out."""

from . import index  # noqa: F401  registers the plan-building ops
from .blocks import gather_blocks, scatter_blocks
from .interpolate import interpolate_pixels
from .pixels import (
    gather_pixels,
    packed_conv2d,
    packed_conv_transpose2d,
    scatter_pixels,
    sparse_conv2d,
    sparse_conv_transpose2d,
)

__all__ = [
    "gather_blocks",
    "gather_pixels",
    "interpolate_pixels",
    "packed_conv2d",
    "packed_conv_transpose2d",
    "scatter_blocks",
    "scatter_pixels",
    "sparse_conv2d",
    "sparse_conv_transpose2d",
]
