"""Forwards with several outputs: lists, tuples, dicts and what else ``torch.utils._pytree`` knows, of tensors."""

from __future__ import annotations

from torch import fx
from torch.utils import _pytree as pytree

NAME = "dynops.stack.tracing.outputs:joined"  # of the step that ends such a trace


def parted(out) -> tuple[list | object, pytree.TreeSpec | None]:
    """The leaves of what a forward returned, and their structure; None: it is one value."""
    leaves, spec = pytree.tree_flatten(out)
    one = isinstance(out, fx.Proxy) or spec.is_leaf() or not any(isinstance(x, fx.Proxy) for x in leaves)
    return (out, None) if one else (leaves, spec)


def joined(leaves: tuple, spec: pytree.TreeSpec):
    """The output of the leaves."""
    return pytree.tree_unflatten(leaves, spec)
