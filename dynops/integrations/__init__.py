"""Other libraries that can run on dynops' ops. None of them is imported before it is asked for."""

from . import transformers

__all__ = ["transformers"]
