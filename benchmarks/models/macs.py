"""The MACs of a model's convolutions and linear layers, dense and under a mask."""

from __future__ import annotations

from torch import Tensor

from dynops.testing import MaskedPolicy

_COUNTED = ("conv2d", "conv_transpose2d", "linear")


class CountedPolicy(MaskedPolicy):
    """The meaning of a mask in plain PyTorch, which counts.

    Attributes:
        calls: convolutions called.
        dense, computed: MACs of whole maps, and at the pixels of the mask.
    """

    def __init__(self, mask: Tensor, masks: dict | None = None):
        super().__init__(mask, masks)
        self.calls, self.dense, self.computed = 0, 0.0, 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _COUNTED:
            x, weight = args[0], args[1]
            self.calls += name != "linear"
            places = x if name == "conv_transpose2d" else out  # each has a product with the whole weight
            macs = places.numel() / max(places.shape[-1 if name == "linear" else 1], 1) * weight.numel()
            self.dense += macs
            self.computed += macs * self._share(out)
        return out

    def _share(self, out: Tensor) -> float:
        """The share of the places that the mask has."""
        return float(self.at(out, *self.maps[out]).mean()) if self.is_map(out) else 1.0
