"""Mends Triton's interpreter: imported by the files that run in it."""

from __future__ import annotations

from triton.runtime.interpreter import InterpreterBuilder, tl

_dot = InterpreterBuilder.create_dot


def _dot_of_values(self, a, b, *others):
    """The interpreter keeps bfloat16 as uint16, and its own product multiplies those integers."""
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, *others)


InterpreterBuilder.create_dot = _dot_of_values
