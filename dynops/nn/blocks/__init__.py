"""Layers that compute blocks of pixels."""

from .sparse_blocks import SparseBlocks

__all__ = [
    "SparseBlocks",
]
