"""Followed: the tensor that a model's own Python computes with while a stream is active."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..maps.functions import _METADATA, _QUESTIONS


class Followed(Tensor):
    """A value of a call. It has no content of its own: a function of torch that takes it becomes a step of the call.

    Attributes:
        frame: the call; None once it has ended.
        value: what it is now. A function that works in place gives it another one.
        plain: its content, from the end of the call on, or since something took it that cannot be a step.
    """

    @staticmethod
    def __new__(cls, frame, value):
        made = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        made.frame, made.value, made.plain = frame, value, None
        return made

    def __repr__(self, **options):
        return f"Followed({unfollowed(self)!r})"

    def __del__(self):
        if self.plain is None and self.frame is not None:
            self.frame.forget(self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
            if name in _METADATA or name == "requires_grad":
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        elif name in _QUESTIONS:
            if name == "is_contiguous":
                return True
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        frame = _frame_of(args) or _frame_of(tuple(kwargs.values()))
        if frame is None:
            return func(*plain_tree(args), **plain_tree(kwargs))
        return frame.call(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached only from C++: functions of Python are taken before."""
        return func(*plain_tree(args), **plain_tree(kwargs or {}))

    def __reduce_ex__(self, protocol):
        return unfollowed(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return unfollowed(self).clone()


def _frame_of(args: tuple):
    """The call that one of the arguments belongs to, or None."""
    for x in args:
        if type(x) is Followed:
            if x.plain is None:
                return x.frame
        elif (type(x) in (tuple, list) and (found := _frame_of(tuple(x))) is not None) or (
            type(x) is dict and (found := _frame_of(tuple(x.values()))) is not None
        ):
            return found
    return None


def unfollowed(x: Followed) -> Tensor:
    """The content. From now on it is the tensor's own, and no step reads it."""
    if x.plain is None:
        x.plain, x.frame = x.frame.content(x.value), None
    return x.plain


def plain_tree(tree):
    """A tree with the contents of followed tensors in their place."""
    return pytree.tree_map_only(Followed, unfollowed, tree)
