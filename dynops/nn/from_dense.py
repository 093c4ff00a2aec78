"""Base of the layers that take the place of a dense one: ``from_dense``, input without a batch, options of ops."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class FromDense:
    """A layer whose parameters are those of the dense layer ``_dense``."""

    _dense: type[nn.Module]

    @classmethod
    def from_dense(cls, layer: nn.Module) -> nn.Module:
        """A layer of this class on the parameters of ``layer``: the same Parameter objects, flags and hooks.

        Raises:
            TypeError: ``layer`` is not exactly the dense class (a subclass may compute something else).
        """
        if type(layer) not in (cls._dense, cls):
            raise TypeError(f"layer: expected nn.{cls._dense.__name__}, got {type(layer).__name__}")
        made = cls.__new__(cls)
        made.__dict__ = {
            key: copy.copy(value) if isinstance(value, (dict, set)) else value
            for key, value in layer.__dict__.items()
        }
        return made


def with_batch(input) -> tuple[Tensor, bool]:
    """``input`` as ``[N, C, H, W]``, and whether it had its batch."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor [N, C, H, W] or [C, H, W], got {type(input).__name__}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    return (input, True) if input.dim() == 4 else (input[None], False)


def conv_options(conv: nn.Module) -> dict:
    """The arguments of an op that are attributes of a convolution."""
    sizes = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    return {**sizes, "groups": conv.groups, "padding_mode": conv.padding_mode}
