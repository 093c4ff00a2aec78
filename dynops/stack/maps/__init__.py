"""Maps under a mask as tensors: what runs a forward that cannot be traced."""

from .constant import Standardised, constant_conv
from .convolution import Convolution, bare
from .errors import check_inputs, name_module
from .follow import as_map, entered, follow, inside, is_map, layer_input, may_follow
from .pointwise import normed
from .value import SparseMap

__all__ = [
    "Convolution",
    "SparseMap",
    "Standardised",
    "as_map",
    "bare",
    "check_inputs",
    "constant_conv",
    "entered",
    "follow",
    "inside",
    "is_map",
    "layer_input",
    "may_follow",
    "name_module",
    "normed",
]
