"""Mends Triton's interpreter: imported by the files that run in it."""

from __future__ import annotations

from triton.runtime.interpreter import InterpreterBuilder, tl

_dot = InterpreterBuilder.create_dot


def _dot_of_values(self, a, b, *others):
    """The interpreter keeps bfloat16 as uint16, and its own product multiplies those integers."""
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, *others)


def _bfloat16_of_integers(self, source, dtype):
    """An integer's value, where the interpreter takes its bits."""
    if dtype.scalar == tl.bfloat16:
        source = self.cast_impl(
            source, tl.block_type(tl.float32, dtype.shape) if dtype.is_block() else tl.float32
        )
    return self.cast_impl(source, dtype)


InterpreterBuilder.create_dot = _dot_of_values
InterpreterBuilder.create_si_to_fp = _bfloat16_of_integers
