"""Models on images that are too large for them: tile by tile, and only where a mask is active."""

from .run import tiles

__all__ = ["tiles"]
