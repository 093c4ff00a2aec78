"""Activation checkpointing: what is computed again in the backward pass runs in the scopes of its forward pass.

``torch.utils.checkpoint`` restores autocast and the random state, and has no hook for anything else. Its two ways
meet in two classes, whoever imported ``checkpoint`` and whenever: the reentrant one in ``CheckpointFunction``, the
other one in ``_CheckpointFrame`` (looked up in torch 2.13 and 2.14). Their methods are wrapped here. Where a torch has
them no more, the way is to enter the context inside the function that is checkpointed.

What only listens (:mod:`dynops.ops.observers`) does not travel, as it changes no value. Neither do attributes of modules, which
``nn.set_width`` sets as ``module.train()`` does: they must be in the backward pass what they were in the forward pass.
"""

from __future__ import annotations

import contextlib
import functools

from torch.utils import checkpoint

from .scope import Scope

_MARK = "_dynops_scopes"
_installed = hasattr(checkpoint, _MARK)  # by this module before it was loaded anew
_scopes: list[Scope] = checkpoint.__dict__.setdefault(_MARK, [])


def travels(scope: Scope) -> None:
    """Takes the values of ``scope`` at a checkpoint along to its recomputation.

    Args:
        scope: anything with ``values()`` and the context ``only(values)``.
    """
    _scopes.append(scope)


@contextlib.contextmanager
def _restored(held: tuple):
    with contextlib.ExitStack() as stack:
        for scope, values in held:
            stack.enter_context(scope.only(values))
        yield


def _held() -> tuple:
    return tuple([(scope, scope.values()) for scope in _scopes])


def _wrap_reentrant(function) -> None:
    forward, backward = function.forward, function.backward

    @functools.wraps(forward)
    def forward_here(ctx, *args):
        ctx._dynops_held = _held()
        return forward(ctx, *args)

    @functools.wraps(backward)
    def backward_there(ctx, *grads):
        with _restored(ctx._dynops_held):
            return backward(ctx, *grads)

    function.forward, function.backward = staticmethod(forward_here), staticmethod(backward_there)


def _wrap_frame(frame) -> None:
    init = frame.__init__

    @functools.wraps(init)
    def init_here(self, recompute_fn, *args, **kwargs):
        held = _held()

        def recompute(*inputs, **named):
            with _restored(held):
                return recompute_fn(*inputs, **named)

        init(self, recompute, *args, **kwargs)

    frame.__init__ = init_here


if not _installed and hasattr(checkpoint, "CheckpointFunction"):
    _wrap_reentrant(checkpoint.CheckpointFunction)
if not _installed and hasattr(checkpoint, "_CheckpointFrame"):
    _wrap_frame(checkpoint._CheckpointFrame)
