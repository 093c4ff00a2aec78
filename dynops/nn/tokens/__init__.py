"""Layers that leave tokens out."""

from .exits import TokenEncoderLayer, TokenExit, TokenExitOutput, TokenSequential

__all__ = [
    "TokenEncoderLayer",
    "TokenExit",
    "TokenExitOutput",
    "TokenSequential",
]
