"""Calls that only move channels: chunk, split, slices, channel shuffles, and sizes that such calls compute with.

They run on an index map once, when a sequence is bound: int64, the place of each element in the map that it came from.
What they made of it says which channels to take.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..layers.base import Unjoinable

_MOST_ELEMENTS = 1 << 24  # of an index map: 128 MB for a moment


class Moved(NamedTuple):
    """A tensor made of the elements of the map ``root``: ``index`` says which."""

    root: int
    index: Tensor


def whole(root: int, size: tuple[int, int, int], channels: int) -> Moved:
    """The map itself."""
    n, h, w = size
    if n * channels * h * w > _MOST_ELEMENTS:
        raise Unjoinable
    return Moved(root, torch.arange(n * channels * h * w, device="cpu").view(n, channels, h, w))


def moved(call, values: dict[int, object]):
    """What a recorded call makes of values, trees with :class:`Moved` in the place of tensors.

    Raises:
        Unjoinable: they are of several maps, or it makes something else than elements of them.
    """
    leaves = [leaf for tree in values.values() for leaf in pytree.tree_leaves(tree, is_leaf=_is_moved)]
    roots = {leaf.root for leaf in leaves if type(leaf) is Moved}
    if len(roots) > 1:
        raise Unjoinable
    tensors = {v: pytree.tree_map(_index_of, tree, is_leaf=_is_moved) for v, tree in values.items()}
    try:
        made = call(tensors)
    except (RuntimeError, TypeError, ValueError, IndexError):  # which the call itself raises in the layer
        raise Unjoinable from None

    def wrapped(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dtype != torch.int64 or not roots:
            raise Unjoinable
        return Moved(next(iter(roots)), leaf)

    return pytree.tree_map(wrapped, made)


def channels_taken(found, size: tuple[int, int, int], channels: int, last: bool) -> list[int]:
    """The channels of the root, of this size, that a moved map has.

    Args:
        last: its channels are the last dimension.

    Raises:
        Unjoinable: it is no map of the root's pixels.
    """
    if type(found) is not Moved or found.index.dim() != 4:
        raise Unjoinable
    index, (n, h, w) = found.index.permute(0, 3, 1, 2) if last else found.index, size
    if (index.shape[0], *index.shape[2:]) != size:
        raise Unjoinable
    taken = index[0, :, 0, 0] // (h * w)
    expected = torch.arange(n * channels * h * w, device="cpu").view(n, channels, h, w)[:, taken]
    if not torch.equal(index, expected):
        raise Unjoinable
    return taken.tolist()


def is_size(x) -> bool:
    """True for a number or a size, which the model may have asked its input for."""
    return type(x) is int or (type(x) in (tuple, torch.Size) and all(type(n) is int for n in x))


def holds_maps(tree) -> bool:
    """True for a tree with a moved map in it."""
    return any(type(leaf) is Moved for leaf in pytree.tree_leaves(tree, is_leaf=_is_moved))


def _is_moved(tree) -> bool:
    return type(tree) is Moved


def _index_of(leaf):
    return leaf.index if type(leaf) is Moved else leaf
