"""Backbones of DETR and its relatives in transformers under the ``pixel_mask`` of a batch."""

from __future__ import annotations

import functools
import inspect

from torch import Tensor, nn

from ..context import use_mask
from ..convert import Report, convert_
from ..stack.converted import is_whole


def use_pixel_mask(model: nn.Module) -> Report:
    """Makes the backbone of a DETR compute the pixels of ``pixel_mask`` only, in place; see ``transformers.use_pixel_mask``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    encoders = [m for m in model.modules() if _takes_pixel_mask(m)]
    if len(encoders) != 1:
        raise TypeError(
            f"model: expected one with a backbone that is called with a pixel_mask, as DETR's is, got "
            f"{type(model).__name__} with {len(encoders)}"
        )
    (encoder,) = encoders
    report = convert_(encoder.model)
    if not issubclass(type(encoder), _PixelMask):
        encoder.__class__ = _class_of(type(encoder))
    return report


def _takes_pixel_mask(module: nn.Module) -> bool:
    """True for a ConvEncoder: transformers has a copy of it for each model."""
    if not type(module).__name__.endswith("ConvEncoder") or not isinstance(
        getattr(module, "model", None), nn.Module
    ):
        return False
    return list(inspect.signature(module.forward).parameters) == ["pixel_values", "pixel_mask"]


class _PixelMask:
    """A ConvEncoder whose backbone runs under the mask. Its maps come with the mask that each image has alone."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not is_whole(self.model):  # revert_ was called
            return super().forward(pixel_values, pixel_mask)
        with use_mask(pixel_mask, ragged=True) as active:
            found = super().forward(pixel_values, pixel_mask)
            shapes = [(x.shape[0], *x.shape[2:]) for x, _ in found]
            masks = [active.plan(shape, pixel_values.device).mask() for shape in shapes]
        return [(x, mask) for (x, _), mask in zip(found, masks, strict=True)]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__bases__[1],), *state


@functools.cache
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_PixelMask, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _new(base: type[nn.Module]) -> nn.Module:
    kind = _class_of(base)
    return kind.__new__(kind)
