"""The epilogue of an op, before it writes its result: affine map, gate, residual, activation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Epilogue(NamedTuple):
    """``activation(gate * (scale * z + shift) + residual)``."""

    activation: str = ""  # a name of ops.epilogue.ACTIVATIONS
    scale: Tensor | None = None  # [O]
    shift: Tensor | None = None  # [O]
    gate: Tensor | None = None  # [P]
    residual: Tensor | None = None  # [P, O]; the public ops take [N, O, H, W] too

    @property
    def is_plain(self) -> bool:
        """True if it is an activation at most."""
        return self.scale is None and self.shift is None and self.gate is None and self.residual is None

    @property
    def is_empty(self) -> bool:
        """True if it does nothing."""
        return not self.activation and self.is_plain


NOTHING = Epilogue()
