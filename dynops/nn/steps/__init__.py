"""Recurrent layers that skip steps in time, and parts of them."""

from .cells import compacted_cell
from .frames import StepSelection, encode_steps, gather_steps
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
    "compacted_cell",
    "encode_steps",
    "gather_steps",
    "partial_update",
    "prefix_mask",
]
