"""dynops: layers that compute only what an input needs."""

from . import ops
from .backends import build_info
from .plans import PixelPlan

__version__ = "0.1.0"

__all__ = ["PixelPlan", "build_info", "ops"]
