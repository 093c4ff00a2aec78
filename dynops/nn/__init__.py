"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""

from .blocks import SparseBlocks
from .masked import MaskedAvgPool2d, MaskedBatchNorm2d, MaskedMaxPool2d
from .pixels import SparseConv2d, SparseConvTranspose2d
from .sequential import SparseSequential

__all__ = [
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedMaxPool2d",
    "SparseBlocks",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseSequential",
]
