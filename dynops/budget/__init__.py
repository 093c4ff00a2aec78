"""Budgets: what a model computes, counted with gradients; losses and a cap that hold it; a recorder."""

from .cap import cap
from .dense_rules import Cost
from .losses import (
    batch_shaping_loss,
    block_bounds_loss,
    blocks_of,
    cost_loss,
    mask_l1_loss,
    network_ratio_loss,
    target_rate_loss,
    threshold_target_loss,
)
from .macs import LayerMacs, MacCounter
from .recorder import Recorder

__all__ = [
    "Cost",
    "LayerMacs",
    "MacCounter",
    "Recorder",
    "batch_shaping_loss",
    "block_bounds_loss",
    "blocks_of",
    "cap",
    "cost_loss",
    "mask_l1_loss",
    "network_ratio_loss",
    "target_rate_loss",
    "threshold_target_loss",
]
