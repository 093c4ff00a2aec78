"""Maps under a mask as tensors: what runs a forward that cannot be traced."""

from .follow import as_map, entered, follow, inside, layer_input, may_follow
from .pointwise import normed
from .value import SparseMap

__all__ = ["SparseMap", "as_map", "entered", "follow", "inside", "layer_input", "may_follow", "normed"]
