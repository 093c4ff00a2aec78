"""Gates: decisions with gradients. Scores in, a :class:`Decision` out: a hard mask that trains, a soft score.

Functions of scores, the same as modules that follow ``self.training``, heads that go from features to decisions,
and what trains policies. A plan takes ``decision.mask.detach()``; a layer takes ``decision.mask``, and its gradient
flows.
"""

from .channels import ChannelGate, GaterNet
from .functions import (
    Decision,
    annealed_temperature,
    gumbel_sigmoid,
    gumbel_softmax,
    improved_semhash,
    noisy_top_k,
    relu_tanh,
    saturating_sigmoid,
    straight_through,
    threshold,
    top_k,
)
from .heads import ConvGate, PooledGate, RecurrentGate
from .modules import (
    GumbelSigmoid,
    GumbelSoftmax,
    ImprovedSemHash,
    NoisyTopK,
    Threshold,
    set_noise,
    set_temperature,
)
from .policy import (
    PolicyNet,
    curriculum_mask,
    entropy,
    explore,
    log_probability,
    reinforce_loss,
    reward_to_go,
    sample_actions,
    self_critical_loss,
    usage_reward,
)
from .spatial import SpatialGate, SpatialHaltingHead

__all__ = [
    "ChannelGate",
    "ConvGate",
    "Decision",
    "GaterNet",
    "GumbelSigmoid",
    "GumbelSoftmax",
    "ImprovedSemHash",
    "NoisyTopK",
    "PolicyNet",
    "PooledGate",
    "RecurrentGate",
    "SpatialGate",
    "SpatialHaltingHead",
    "Threshold",
    "annealed_temperature",
    "curriculum_mask",
    "entropy",
    "explore",
    "gumbel_sigmoid",
    "gumbel_softmax",
    "improved_semhash",
    "log_probability",
    "noisy_top_k",
    "reinforce_loss",
    "relu_tanh",
    "reward_to_go",
    "sample_actions",
    "saturating_sigmoid",
    "self_critical_loss",
    "set_noise",
    "set_temperature",
    "straight_through",
    "threshold",
    "top_k",
    "usage_reward",
]
