"""The sizes of a stack's values, and a cache of all that follows from the size of an input."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

_MAX_SIZES = 64


class KeptSizes:
    """A cache by the sizes of an input, for up to 64 of them. A copy begins empty."""

    def __init__(self):
        self._found: dict[Hashable, Any] = {}

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._found.get(key)
        if found is None:
            found = make()
            if not torch.compiler.is_compiling():
                if len(self._found) >= _MAX_SIZES:
                    self._found.clear()
                self._found[key] = found
        return found

    def __reduce__(self):
        return KeptSizes, ()


def sizes_of(stack, in_shape: tuple[int, int, int]) -> dict[int, tuple[int, int]]:
    """``(H, W)`` of each value, for an input ``(N, H, W)``.

    Raises:
        ValueError: an input that is too small, or maps of different sizes that meet.
    """
    sizes = {0: tuple(in_shape[1:])}
    for layer in stack.layers:
        found = [
            tuple(reach[i].out_size(sizes[value][i]) for i in (0, 1))
            for value, reach in zip(layer.inputs, layer.reaches, strict=False)
        ]
        if min(found[0]) < 1 and min(in_shape) > 0:
            raise ValueError(
                f"x: expected an input that is large enough for {layer.name}, got [N, H, W] = {in_shape}"
            )
        if any(size != found[0] for size in found):
            raise ValueError(f"{layer.name}: expected maps of one size, got {found}")
        sizes[layer.out] = found[0]
    return sizes
