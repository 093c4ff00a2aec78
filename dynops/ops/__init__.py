"""The ops: functions with gradients, dense tensors (or packed rows) and a plan in, tensors out."""

from ..scripting import unscriptable as _unscriptable
from . import block_conv as _block_conv  # noqa: F401  registers the op of nn.SparseBlocks
from . import index  # noqa: F401  registers the plan-building ops
from .blocks import gather_blocks, scatter_blocks
from .channels.conv import channel_conv2d, channel_linear, packed_channel_conv2d
from .channels.filters import local_conv2d
from .channels.mixed_conv import mixed_conv2d
from .channels.outputs import masked_output_conv2d
from .channels.rows import gather_channels, scatter_channels
from .channels.sample_conv import region_conv2d, sample_conv2d
from .experts.activations import expert_activation
from .experts.linear import grouped_linear
from .experts.mlp import experts_mlp
from .experts.quantized import QuantizedExperts, quantize_experts
from .experts.rows import combine_pairs, gather_pairs
from .flops import register_formulas as _register_formulas
from .pixels.conv import sparse_conv2d, sparse_conv_transpose2d
from .pixels.interpolate import interpolate_pixels
from .pixels.packed import packed_conv2d, packed_conv_transpose2d
from .pixels.rows import gather_pixels, scatter_pixels
from .samples import gather_samples, scatter_samples

__all__ = [
    "QuantizedExperts",
    "channel_conv2d",
    "channel_linear",
    "combine_pairs",
    "expert_activation",
    "experts_mlp",
    "gather_blocks",
    "gather_channels",
    "gather_pairs",
    "gather_pixels",
    "gather_samples",
    "grouped_linear",
    "interpolate_pixels",
    "local_conv2d",
    "masked_output_conv2d",
    "mixed_conv2d",
    "packed_channel_conv2d",
    "packed_conv2d",
    "packed_conv_transpose2d",
    "quantize_experts",
    "region_conv2d",
    "sample_conv2d",
    "scatter_blocks",
    "scatter_channels",
    "scatter_pixels",
    "scatter_samples",
    "sparse_conv2d",
    "sparse_conv_transpose2d",
]

_unscriptable(globals(), __all__)
_register_formulas()
