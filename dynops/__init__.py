"""dynops: layers that compute only what an input needs."""

from . import budget, gates, integrations, nn, ops
from .context import active, use_mask
from .convert import convert_, revert_
from .graphs import graphed
from .incremental import Stream, incremental_
from .kept import refresh
from .ops.what_runs import build_info
from .packed import packed
from .plans import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, changed_blocks
from .ragged import ragged
from .tiling import tiles
from .tune import suggest_block_size

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
    "ChannelPlan",
    "ExpertPlan",
    "PixelPlan",
    "SamplePlan",
    "Stream",
    "active",
    "budget",
    "build_info",
    "changed_blocks",
    "convert_",
    "gates",
    "graphed",
    "incremental_",
    "integrations",
    "nn",
    "ops",
    "packed",
    "ragged",
    "refresh",
    "revert_",
    "suggest_block_size",
    "tiles",
    "use_mask",
]
