"""Recurrent layers that skip steps in time, and parts of them."""

from .frames import StepSelection
from .reading import Jump, JumpOutput, JumpPolicy, JumpReader, LocationPolicy
from .rnn import SkipOutput, SkipRNN, SkipState
from .widths import SkimOutput, SkimRNN, partial_update, prefix_mask

__all__ = [
    "Jump",
    "JumpOutput",
    "JumpPolicy",
    "JumpReader",
    "LocationPolicy",
    "SkimOutput",
    "SkimRNN",
    "SkipOutput",
    "SkipRNN",
    "SkipState",
    "StepSelection",
    "partial_update",
    "prefix_mask",
]
