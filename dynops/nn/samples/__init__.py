"""Layers that skip, stop or halt for each sample."""

from .criteria import Criterion, Entropy, IDKClass, LearnedExit, Margin, MaxSoftmax, Patience
from .exits import Cascade, EarlyExit, ExitOutput, ExitScores
from .halting import Halting, HaltingOutput
from .losses import (
    GradientRescale,
    distillation_loss,
    exit_cost,
    exit_probabilities,
    gradient_rescale,
    learned_exit_loss,
    self_distillation_loss,
    weighted_exit_loss,
)
from .skip import Skip
from .thresholds import FittedThresholds, fit_temperature, fit_thresholds

__all__ = [
    "Cascade",
    "Criterion",
    "EarlyExit",
    "Entropy",
    "ExitOutput",
    "ExitScores",
    "FittedThresholds",
    "GradientRescale",
    "Halting",
    "HaltingOutput",
    "IDKClass",
    "LearnedExit",
    "Margin",
    "MaxSoftmax",
    "Patience",
    "Skip",
    "distillation_loss",
    "exit_cost",
    "exit_probabilities",
    "fit_temperature",
    "fit_thresholds",
    "gradient_rescale",
    "learned_exit_loss",
    "self_distillation_loss",
    "weighted_exit_loss",
]
