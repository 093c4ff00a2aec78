"""What the layers that take the place of a dense one share: ``from_dense``, input without a batch, kept views."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import backends


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


def kept(weight: Tensor, key: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(weight)``, a view or a function of a weight; where no gradient is needed the same tensor every time.

    What kernels pack is found by the identity of the weight that they get: a new view at each call would be packed
    at each call.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
        return make(weight)

    def detached() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(weight.detach())

    return backends.weight_cache.get(weight, ("kept", key), detached)
