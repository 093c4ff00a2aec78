"""The C++ kernels, by noun: each module prepares memory for ``csrc/cpu`` and has the signatures of the references."""

from . import (
    blocks,
    channel_filters,
    channel_outputs,
    channels,
    experts,
    pixels,
    prepared,
    rows,
    sample_conv,
    samples,
)

__all__ = [
    "blocks",
    "channel_filters",
    "channel_outputs",
    "channels",
    "experts",
    "pixels",
    "prepared",
    "rows",
    "sample_conv",
    "samples",
]
