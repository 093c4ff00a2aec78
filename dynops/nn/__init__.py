"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""

from . import expert_shards
from .blocks import SparseBlocks
from .channel_gating import ChannelGatedConv2d, GroupedDynamicConv2d
from .channel_norm import ChannelBatchNorm2d
from .channel_weights import CondConv2d, DynamicConv2d
from .channel_width_norms import SwitchableBatchNorm2d, UniversalBatchNorm2d
from .channel_widths import SlimmableConv2d, SlimmableLinear, set_width
from .channels import ChannelConv2d, ChannelLinear
from .conv_experts import ConvExperts
from .expert_losses import importance_loss, load_balance_loss, load_loss, z_loss
from .expert_parallel import ParallelExperts
from .experts import Experts
from .masked import MaskedAvgPool2d, MaskedBatchNorm2d, MaskedMaxPool2d
from .moe import MoE, MoEOutput, SharedExpert
from .pixel_halting import SpatialHalting
from .pixels import SparseConv2d, SparseConvTranspose2d
from .routers import Routing, TopKRouter
from .sample_halting import Halting, HaltingOutput, pad_positions
from .samples import Skip
from .sequential import SparseSequential
from .step_cells import compacted_cell
from .step_frames import StepSelection, encode_steps, gather_steps
from .step_reading import Jump, JumpOutput, JumpPolicy, JumpReader, LocationPolicy
from .step_widths import SkimOutput, SkimRNN, partial_update, prefix_mask
from .steps import SkipOutput, SkipRNN, SkipState

__all__ = [
    "ChannelBatchNorm2d",
    "ChannelConv2d",
    "ChannelGatedConv2d",
    "ChannelLinear",
    "CondConv2d",
    "ConvExperts",
    "DynamicConv2d",
    "Experts",
    "GroupedDynamicConv2d",
    "Halting",
    "HaltingOutput",
    "Jump",
    "JumpOutput",
    "JumpPolicy",
    "JumpReader",
    "LocationPolicy",
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedMaxPool2d",
    "MoE",
    "MoEOutput",
    "ParallelExperts",
    "Routing",
    "SharedExpert",
    "SkimOutput",
    "SkimRNN",
    "Skip",
    "SkipOutput",
    "SkipRNN",
    "SkipState",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SparseBlocks",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseSequential",
    "SpatialHalting",
    "StepSelection",
    "SwitchableBatchNorm2d",
    "TopKRouter",
    "UniversalBatchNorm2d",
    "compacted_cell",
    "encode_steps",
    "expert_shards",
    "gather_steps",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "pad_positions",
    "partial_update",
    "prefix_mask",
    "set_width",
    "z_loss",
]
