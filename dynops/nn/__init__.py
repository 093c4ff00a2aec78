"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""

from ..observers import unscriptable as _unscriptable
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
from .sample_criteria import Criterion, Entropy, IDKClass, LearnedExit, Margin, MaxSoftmax, Patience, Verdict
from .sample_exits import Cascade, EarlyExit, ExitOutput, ExitScores, Visit
from .sample_halting import Halting, HaltingOutput, pad_positions
from .sample_losses import (
    GradientRescale,
    distillation_loss,
    exit_cost,
    exit_probabilities,
    gradient_rescale,
    learned_exit_loss,
    self_distillation_loss,
    weighted_exit_loss,
)
from .sample_thresholds import FittedThresholds, fit_temperature, fit_thresholds
from .samples import Skip
from .sequential import SparseSequential
from .step_cells import compacted_cell
from .step_frames import StepSelection, encode_steps, gather_steps
from .step_reading import Jump, JumpOutput, JumpPolicy, JumpReader, LocationPolicy
from .step_widths import SkimOutput, SkimRNN, partial_update, prefix_mask
from .steps import SkipOutput, SkipRNN, SkipState
from .token_exits import TokenEncoderLayer, TokenExit, TokenExitOutput, TokenSequential

__all__ = [
    "Cascade",
    "ChannelBatchNorm2d",
    "ChannelConv2d",
    "ChannelGatedConv2d",
    "ChannelLinear",
    "CondConv2d",
    "ConvExperts",
    "Criterion",
    "DynamicConv2d",
    "EarlyExit",
    "Entropy",
    "ExitOutput",
    "ExitScores",
    "Experts",
    "FittedThresholds",
    "GradientRescale",
    "GroupedDynamicConv2d",
    "Halting",
    "HaltingOutput",
    "IDKClass",
    "Jump",
    "JumpOutput",
    "JumpPolicy",
    "JumpReader",
    "LearnedExit",
    "LocationPolicy",
    "Margin",
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedMaxPool2d",
    "MaxSoftmax",
    "MoE",
    "MoEOutput",
    "ParallelExperts",
    "Patience",
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
    "TokenEncoderLayer",
    "TokenExit",
    "TokenExitOutput",
    "TokenSequential",
    "TopKRouter",
    "UniversalBatchNorm2d",
    "Verdict",
    "Visit",
    "compacted_cell",
    "distillation_loss",
    "encode_steps",
    "exit_cost",
    "exit_probabilities",
    "expert_shards",
    "fit_temperature",
    "fit_thresholds",
    "gather_steps",
    "gradient_rescale",
    "importance_loss",
    "learned_exit_loss",
    "load_balance_loss",
    "load_loss",
    "pad_positions",
    "partial_update",
    "prefix_mask",
    "self_distillation_loss",
    "set_width",
    "weighted_exit_loss",
    "z_loss",
]

_unscriptable(globals(), __all__)
