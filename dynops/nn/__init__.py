"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""

from .masked import MaskedAvgPool2d, MaskedBatchNorm2d, MaskedMaxPool2d
from .pixels import SparseConv2d, SparseConvTranspose2d
from .sequential import SparseSequential

__all__ = [
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedMaxPool2d",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseSequential",
]
