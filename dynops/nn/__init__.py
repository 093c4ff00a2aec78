"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""

import sys as _sys

from ..scripting import unscriptable as _unscriptable
from . import blocks, channels, experts, pixels, samples, steps, tokens
from .blocks import *  # noqa: F403
from .channels import *  # noqa: F403
from .experts import *  # noqa: F403
from .experts import shards as expert_shards  # noqa: F401
from .pixels import *  # noqa: F403
from .samples import *  # noqa: F403
from .steps import *  # noqa: F403
from .tokens import *  # noqa: F403

_ROOMS = (blocks, channels, experts, pixels, samples, steps, tokens)
__all__ = sorted(["expert_shards", *(name for room in _ROOMS for name in room.__all__)])

_unscriptable(globals(), __all__)

# A pickle names a class by its module. These names stood in pickles before each noun had a room.
_BEFORE_ROOMS = (
    "channel_gating channel_norm channel_weights channel_width_norms channel_widths conv_experts expert_losses "
    "expert_parallel masked moe pixel_halting routers sample_criteria sample_exits sample_halting sample_losses "
    "sample_thresholds sequential step_frames step_reading step_widths token_exits"
)
for _name in _BEFORE_ROOMS.split():
    _sys.modules[f"{__name__}.{_name}"] = _sys.modules[__name__]
