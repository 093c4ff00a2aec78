"""incremental_ and Stream: a model keeps what did not change since its last call, and computes the rest."""

from .model import incremental_, is_incremental, undo
from .report import Report, Row
from .stream import Stream

__all__ = ["Report", "Row", "Stream", "incremental_", "is_incremental", "undo"]
