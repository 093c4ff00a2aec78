"""Layers that compute some channels of each sample, and layers of per-sample weights."""

from .conv import ChannelConv2d, ChannelLinear
from .gating import ChannelGatedConv2d, GroupedDynamicConv2d
from .norm import ChannelBatchNorm2d
from .weights import CondConv2d, DynamicConv2d
from .width_norms import SwitchableBatchNorm2d, UniversalBatchNorm2d
from .widths import SlimmableConv2d, SlimmableLinear, set_width

__all__ = [
    "ChannelBatchNorm2d",
    "ChannelConv2d",
    "ChannelGatedConv2d",
    "ChannelLinear",
    "CondConv2d",
    "DynamicConv2d",
    "GroupedDynamicConv2d",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SwitchableBatchNorm2d",
    "UniversalBatchNorm2d",
    "set_width",
]
