"""Layers that compute the pixels of a mask."""

from .conv import SparseConv2d, SparseConvTranspose2d
from .halting import SpatialHalting
from .masked import (
    MaskedAvgPool2d,
    MaskedBatchNorm2d,
    MaskedGroupNorm,
    MaskedInstanceNorm2d,
    MaskedMaxPool2d,
    MaskedPixelShuffle,
    MaskedUpsample,
    MaskedZeroPad2d,
)
from .sequential import SparseSequential

__all__ = [
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedGroupNorm",
    "MaskedInstanceNorm2d",
    "MaskedMaxPool2d",
    "MaskedPixelShuffle",
    "MaskedUpsample",
    "MaskedZeroPad2d",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseSequential",
    "SpatialHalting",
]
