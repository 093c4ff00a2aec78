"""Plans of indices, and the things derived from these, kept with the plan while its indices stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .. import modes
from ..geometry import is_int
from ..kept import Made, Mark, can_keep, made_plain
from .collect import moved, pinned
from .masks import raising

T = TypeVar("T")


class Derived:
    """A plan from which other things are derived; ``_indices`` names its tensors."""

    def __init__(self):
        self._derived: dict = {}
        self._mark: Mark | None = None  # of the indices at the time of _derived
        self._graph = _captures(self._indices()[0])  # made while a CUDA graph is captured, and part of it

    def _indices(self) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def derived(self, key, make: Callable[[], T]) -> T:
        """``make()``, or its earlier result for this ``key`` while the plan's indices stay as they are.

        In a CUDA graph whose input is the plan it is made anew, as part of the graph: each replay sees the plan's
        indices as they are then.
        """
        indices = self._indices()
        if modes.transformed():  # whose tensors end with it
            return make()
        traced = torch.compiler.is_compiling() or type(indices[0]) is not Tensor
        if traced or (self._graph and _captures(indices[0])):
            found = self._derived.get(key)
            if found is None:
                found = self._derived[key] = make()
            return found.made if type(found) is Made else found
        made, mark = self._derived, self._mark
        if mark is None or not mark.holds(*indices):
            if not can_keep(*indices):
                return made_plain(make)
            made, self._mark = {}, Mark(*indices)
            self._derived = made  # not cleared: another thread may be looking into the old one
        found = made.get(key)
        if found is None:
            found = made_plain(make)
            made[key] = Made(found) if indices[0].is_cuda else found
        elif type(found) is Made:
            return found.on_this_stream()
        return found

    def __getstate__(self) -> dict:  # copies and pickles derive anew
        return self.__dict__ | {"_derived": {}, "_mark": None}


class IndexPlan(Derived):
    """A plan that is one ascending index: of the pixels, blocks or samples that are computed.

    A subclass has an attribute ``_WHERE`` that says what the index counts through, and a property ``num_all``.
    """

    _WHERE: ClassVar[str]  # "shape", "geometry" or "batch"

    @classmethod
    def _made(cls, index: Tensor, where, count: Tensor | None = None):
        """The plan of an index that needs no look at its values: 15 us for 1000 pixels."""
        plan = cls.__new__(cls)
        plan._set(index, where, count)
        return plan

    @classmethod
    def _of_mask(cls, mask: Tensor, where, capacity: int | None, name: str = "mask"):
        """The plan of the nonzeros of a checked mask, in the capacity form if sizes must not depend on data."""
        if capacity is None and modes.sizes_are_fixed(mask):
            capacity = mask.numel()
        if capacity is None:
            return cls._made(raising(torch.ops.dynops.mask_to_index.default, mask, name=name), where)
        if not is_int(capacity, 0):
            raise ValueError(f"capacity: expected an int >= 0 or None, got {capacity!r}")
        index, count = raising(torch.ops.dynops.mask_to_index_capacity.default, mask, capacity, name=name)
        return cls._made(index, where, count)

    def _set(self, index: Tensor, where, count: Tensor | None) -> None:
        self.index, self.count = plain(index), plain(count)
        setattr(self, self._WHERE, where)
        super().__init__()

    def _indices(self) -> tuple[Tensor, Tensor | None]:
        return self.index, self.count

    @property
    def num_rows(self) -> int:
        """Rows of a packed tensor on this plan: those that are computed, or the capacity."""
        return self.index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def is_full(self) -> bool:
        """True if a compact plan holds everything (a capacity plan never says so)."""
        return self.count is None and self.index.shape[0] == self.num_all

    @property
    def density(self) -> float:
        """The share that is computed. Synchronises a capacity plan."""
        active = self.num_rows if self.count is None else int(self.count)
        return active / max(self.num_all, 1)

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The same plan on another device."""
        index, count = moved(self, device, non_blocking)
        return self._made(index, getattr(self, self._WHERE), count)

    def pin_memory(self):
        """The same plan in pinned memory. A DataLoader calls this."""
        return self._made(pinned(self.index), getattr(self, self._WHERE), pinned(self.count))


def _captures(index: Tensor) -> bool:
    return index.is_cuda and torch.cuda.is_current_stream_capturing()


def plain(index: Tensor | None) -> Tensor | None:
    """``index`` as a tensor that a backward may save, which one made in inference mode is not."""
    if index is None or torch.compiler.is_compiling() or modes.transformed() or not index.is_inference():
        return index
    with torch.inference_mode(False):
        return index.clone()
