"""Plans: a gate's decision as indices. Built once, shared by many ops, without gradients."""

from .blocks import BlockPlan, as_block_plan, changed_blocks, widen_mask
from .channels import ChannelPlan, as_channel_plan
from .collect import register_collate as _register_collate
from .experts import ExpertPlan
from .masks import check_mask, named, resize_mask
from .pixels import PixelPlan, as_pixel_plan
from .samples import SamplePlan, check_keep, most_of

__all__ = [
    "BlockPlan",
    "ChannelPlan",
    "ExpertPlan",
    "PixelPlan",
    "SamplePlan",
    "as_block_plan",
    "as_channel_plan",
    "as_pixel_plan",
    "changed_blocks",
    "check_keep",
    "check_mask",
    "most_of",
    "named",
    "resize_mask",
    "widen_mask",
]

_register_collate(PixelPlan, BlockPlan, SamplePlan, ChannelPlan, ExpertPlan)
