"""Layers that send each token or sample to a few experts."""

from .conv import ConvExperts
from .experts import Experts
from .losses import importance_loss, load_balance_loss, load_loss, z_loss
from .moe import MoE, MoEOutput, SharedExpert
from .parallel import ParallelExperts
from .routers import Routing, TopKRouter

__all__ = [
    "ConvExperts",
    "Experts",
    "MoE",
    "MoEOutput",
    "ParallelExperts",
    "Routing",
    "SharedExpert",
    "TopKRouter",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "z_loss",
]
