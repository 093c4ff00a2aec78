"""The state of a network that samples leave: which of its tensors have a row for each sample, and the rows that stay.

A state is a tensor or any nesting of tuples, lists, dicts, dataclasses (transformers' ``ModelOutput``), registered pytrees and
transformers' caches. What belongs to a sample is decided by shape, or by the names in ``shared``; see :class:`EarlyExit`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ...ops import gather_samples
from ...plans import SamplePlan

Shared = Mapping[str | int, bool] | Collection[str | int]


def check_shared(shared: Shared | None) -> dict[str | int, bool]:
    """``{name: bool}`` of the argument ``shared``."""
    if shared is None:
        return {}
    if isinstance(shared, str) or not isinstance(shared, (Mapping, Collection)):
        raise TypeError(f"shared: expected names, or a dict of names to bool, got {shared!r}")
    named = dict(shared) if isinstance(shared, Mapping) else dict.fromkeys(shared, True)
    for name, value in named.items():
        if not isinstance(name, (str, int)) or not isinstance(value, bool):
            raise TypeError(f"shared: expected a dict of keys or positions to bool, got {name!r}: {value!r}")
    return named


class Compaction:
    """Makes the states of one call smaller; it remembers which of their tensors were shared."""

    def __init__(self, shared: Mapping[str | int, bool]):
        self.shared = shared
        self._unseen, self._ran = set(shared), False
        self._known: dict[tuple, torch.Size] = {}  # the shape of what was shared, by its place in the state

    def __call__(self, state: Any, plan: SamplePlan, *others: Any) -> tuple:
        """``(state, *others)`` of the samples in a plan; ``others``: trees of tensors ``[n, ...]``."""
        walk, self._ran = _Walk(self, plan), True
        state = walk.value(state, (), None)
        if not walk.found:
            raise ValueError(f"state: expected a tensor [{plan.batch}, ...] in it, a row for each sample")
        rows, others = gather_samples((walk.rows, others), plan)
        return _filled(state, rows), *others

    def see(self, name: str | int) -> None:
        self._unseen.discard(name)

    def warn_unseen(self) -> None:
        """Warns of names in ``shared`` that no state of the call had, where a state was made smaller: of typos."""
        if self._ran and self._unseen:
            names = sorted(map(repr, self._unseen))
            warnings.warn(f"shared: no state of this call has {', '.join(names)} in it", stacklevel=2)

    def takes(self, leaf: Tensor, path: tuple, first: Tensor | None, batch: int) -> bool:
        """True if a tensor has a row for each sample; asked where no name says so."""
        is_rows = leaf.dim() > 0 and leaf.shape[0] == batch
        if is_rows and self._known.get(path) == leaf.shape:  # its size is the batch's only now
            is_rows = False
        elif is_rows and _may_be_pairs(leaf, first):
            warnings.warn(
                f"state{_shown(path)}: a tensor {list(leaf.shape)} with {batch} samples is taken as a mask of pairs of "
                f"positions, which all samples share; say which it is with shared={{{path[-1]!r}: True}} or False",
                stacklevel=2,
            )
            is_rows = False
        if not is_rows:
            self._known[path] = leaf.shape
        return is_rows


def _may_be_pairs(leaf: Tensor, first: Tensor | None) -> bool:
    """A second tensor ``[n, n]``: of ints it is ids or a tokenizer's mask; shaped as the first one, a state like it."""
    is_square = first is not None and leaf.dim() == 2 and leaf.shape[1] == leaf.shape[0]
    is_mask = leaf.dtype == torch.bool or leaf.is_floating_point()
    return is_square and is_mask and leaf.shape != first.shape


class _Slot:
    """The place for a tensor's rows."""

    def __init__(self, number: int):
        self.number = number


class _Walk:
    """One pass over a state: its tensors with rows are listed, and a like state has slots for them."""

    def __init__(self, compaction: Compaction, plan: SamplePlan):
        self.compaction, self.plan = compaction, plan
        self.rows: list[Tensor] = []
        self.first: Tensor | None = None
        self.found = False
        self._slots: dict[int, _Slot] = {}
        self._caches: dict[int, Any] = {}

    def value(self, value: Any, path: tuple, named: bool | None) -> Any:
        if path and path[-1] in self.compaction.shared:
            self.compaction.see(path[-1])
            named = self.compaction.shared[path[-1]]
        if named is True:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path, named)
        if _is_cache(value):
            return self._cache(value)
        if isinstance(value, PackedSequence):
            raise TypeError(
                f"state{_shown(path)}: expected padded sequences [n, T, ...], got a PackedSequence"
            )
        return _rebuilt(value, lambda child, key: self.value(child, (*path, key), named), self.plan, path)

    def _tensor(self, leaf: Tensor, path: tuple, named: bool | None) -> Any:
        batch = self.plan.batch
        if named is False:
            if leaf.dim() == 0 or leaf.shape[0] != batch:
                raise ValueError(
                    f"state{_shown(path)}: expected [{batch}, ...], as shared={{{path[-1]!r}: False}} says, "
                    f"got shape {tuple(leaf.shape)}"
                )
        elif id(leaf) not in self._slots and not self.compaction.takes(leaf, path, self.first, batch):
            return leaf
        self.first, self.found = leaf if self.first is None else self.first, True
        if id(leaf) not in self._slots:  # a tensor that stands twice stays one
            self._slots[id(leaf)] = _Slot(len(self.rows))
            self.rows.append(leaf)
        return self._slots[id(leaf)]

    def _cache(self, cache: Any) -> Any:
        if id(cache) not in self._caches:
            self._caches[id(cache)] = _smaller_cache(cache, self.plan)
        return self._caches[id(cache)]


def _rebuilt(value: Any, child: Callable[[Any, Any], Any], plan: SamplePlan | None, path: tuple) -> Any:
    """A container like ``value``, of what ``child(part, key)`` makes of its parts; anything else as it is."""
    if isinstance(value, (str, bytes, torch.Size, nn.Module, type)) or callable(value):
        return value
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key in list(value):
            made[key] = child(value[key], key)
        return made
    if isinstance(value, (tuple, list)):
        parts = [child(part, i) for i, part in enumerate(value)]
        if hasattr(value, "_fields"):
            parts = [child(part, name) for part, name in zip(value, value._fields, strict=True)]
            return type(value)(*parts)
        return parts if type(value) is list else type(value)(parts)
    if dataclasses.is_dataclass(value):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):  # object's: a frozen one too
                object.__setattr__(made, field.name, child(getattr(value, field.name), field.name))
        return made
    if type(value) in pytree.SUPPORTED_NODES:
        children, tree = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        return pytree.tree_unflatten([child(part, i) for i, part in enumerate(children)], tree)
    held = [part for part in getattr(value, "__dict__", {}).values() if isinstance(part, Tensor)]
    if plan is not None and any(part.dim() and part.shape[0] == plan.batch for part in held):
        raise TypeError(
            f"state{_shown(path)}: expected tensors, tuples, lists, dicts, dataclasses or a transformers' cache, got "
            f"{type(value).__name__}, which holds tensors [{plan.batch}, ...]; if all samples share it, name it in shared"
        )
    return value


def _filled(state: Any, rows: list[Tensor]) -> Any:
    if isinstance(state, _Slot):
        return rows[state.number]
    if isinstance(state, Tensor) or _is_cache(state):
        return state
    return _rebuilt(state, lambda part, key: _filled(part, rows), None, ())


def _shown(path: tuple) -> str:
    return "".join(f"[{key!r}]" for key in path)


# --------------------------------------------------------------------------------- transformers' caches


def _is_cache(value: Any) -> bool:
    """One of transformers' caches or of their layers."""
    return hasattr(value, "reorder_cache") and not isinstance(value, (type, nn.Module))


def _smaller_cache(cache: Any, plan: SamplePlan) -> Any:
    """A cache like ``cache`` with the rows of a plan; the caller's keeps all of them.

    ``reorder_cache(index)`` is what every kind of layer has; it selects rows and puts new tensors in the layer.
    """
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if name == "layers":
            setattr(made, name, [_smaller_cache(layer, plan) for layer in value])
        elif _is_cache(value):
            setattr(made, name, _smaller_cache(value, plan))
        elif isinstance(value, Tensor) and value.dim() == 0:  # a static layer counts in place
            setattr(made, name, value.clone())
        elif isinstance(value, (dict, list)):
            setattr(made, name, copy.copy(value))
    if hasattr(cache, "layers") or hasattr(cache, "self_attention_cache"):
        return made
    made.reorder_cache(plan.index.long())
    for name in ("keys", "values"):  # allocated, but with nothing in them yet
        value = getattr(made, name, None)
        if isinstance(value, Tensor) and value is getattr(cache, name) and value.numel():
            setattr(made, name, value.index_select(0, plan.index.long().to(value.device)))
    if getattr(made, "batch_size", None) == plan.batch:
        made.batch_size = plan.num_rows
    return made
