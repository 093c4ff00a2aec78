"""Maps under a mask as tensors: what runs a forward that cannot be traced."""

from .constant import Standardised, constant_conv
from .convolution import Convolution, bare
from .follow import as_map, entered, follow, inside, layer_input, may_follow
from .pointwise import normed
from .value import SparseMap

__all__ = [
    "Convolution",
    "SparseMap",
    "Standardised",
    "as_map",
    "bare",
    "constant_conv",
    "entered",
    "follow",
    "inside",
    "layer_input",
    "may_follow",
    "normed",
]
