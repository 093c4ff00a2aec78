"""What follows from a plan's indices (inverse, pixels, tiles), kept with the plan while these stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .. import modes
from ..kept import Mark, can_keep, made_plain

T = TypeVar("T")


class Derived:
    """A plan, of which something is derived. Sets up no tensor of its own: ``_indices`` names the plan's."""

    def __init__(self):
        self._derived: dict = {}
        self._mark: Mark | None = None  # of the indices when what is in _derived was made
        self._graph = _captures(self._indices()[0])  # made while a CUDA graph is captured, and part of it

    def _indices(self) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def derived(self, key, make: Callable[[], T]) -> T:
        """``make()``, or what it returned for this ``key`` while the plan's indices stay as they are.

        A plan that is an input of a CUDA graph is derived from anew in the graph, which then sees its indices as
        they are at each replay.
        """
        indices = self._indices()
        if modes.transformed():  # whose tensors end with it
            return make()
        traced = torch.compiler.is_compiling() or type(indices[0]) is not Tensor
        if traced or (self._graph and _captures(indices[0])):
            found = self._derived.get(key)
            if found is None:
                found = self._derived[key] = make()
            return found
        made, mark = self._derived, self._mark
        if mark is None or not mark.holds(*indices):
            if not can_keep(*indices):
                return made_plain(make)
            made, self._mark = {}, Mark(*indices)
            self._derived = made  # not cleared: another thread may be looking into the old one
        found = made.get(key)
        if found is None:
            found = made[key] = made_plain(make)
        return found

    def __getstate__(self) -> dict:  # copies and pickles derive anew
        return self.__dict__ | {"_derived": {}, "_mark": None}


def _captures(index: Tensor) -> bool:
    return index.is_cuda and torch.cuda.is_current_stream_capturing()


def plain(index: Tensor | None) -> Tensor | None:
    """``index`` as a tensor that a backward may save, which one made in inference mode is not."""
    if index is None or torch.compiler.is_compiling() or modes.transformed() or not index.is_inference():
        return index
    with torch.inference_mode(False):
        return index.clone()
