"""dynops: layers that compute only what an input needs."""

from . import nn, ops
from .backends import build_info
from .context import active
from .convert import convert_, revert_
from .plans import BlockPlan, PixelPlan

__version__ = "0.1.0"

__all__ = ["BlockPlan", "PixelPlan", "active", "build_info", "convert_", "nn", "ops", "revert_"]
