"""Says so where a model of transformers is told to use an implementation of experts and none of its modules does."""

from __future__ import annotations

import functools
import warnings
import weakref

from torch import nn
from transformers import PreTrainedModel

_names: set[str] = set()  # what dynops is registered as
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules of experts that a warning named


def notice(name: str) -> None:
    """Makes transformers warn if a model is set to ``experts_implementation=name`` and does not use it."""
    if not _names:
        PreTrainedModel.set_experts_implementation = _after_setting(
            PreTrainedModel.set_experts_implementation
        )
        PreTrainedModel.post_init = _after_making(PreTrainedModel.post_init)
    _names.add(name)


def _after_setting(set_experts_implementation):
    @functools.wraps(set_experts_implementation)
    def wrapper(self, experts_implementation, *args, **kwargs):
        result = set_experts_implementation(self, experts_implementation, *args, **kwargs)
        asked = experts_implementation
        for name in _names.intersection(asked.values() if isinstance(asked, dict) else [asked]):
            if not _users(self, name):
                _warn(self, name, _experts(self))
        return result

    return wrapper


def _after_making(post_init):
    @functools.wraps(post_init)
    def wrapper(self, *args, **kwargs):
        result = post_init(self, *args, **kwargs)
        name = getattr(self.config, "_experts_implementation", None)
        # a model without experts may be a part of one that has some, as a vision tower is
        experts = [module for module in _experts(self) if module not in _told] if name in _names else []
        if experts and not _users(self, name):
            _warn(self, name, experts)
        return result

    return wrapper


def _users(model: nn.Module, name: str) -> bool:
    """True if any module looks the implementation up: transformers' decorator gives it flags and the config."""
    found = (m for m in model.modules() if "has_gate" in vars(m) and "is_transposed" in vars(m))
    return any(getattr(m.config, "_experts_implementation", None) == name for m in found)


def _experts(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def _warn(model: nn.Module, name: str, experts: list[nn.Module]) -> None:
    _told.update(experts)
    kinds = sorted({type(module).__name__ for module in experts})
    reason = "it has no experts"
    if kinds:
        reason = (
            f"{', '.join(kinds)} does not use transformers' interface of experts (use_experts_implementation)"
        )
    warnings.warn(
        f"{type(model).__name__}: experts_implementation={name!r} changes nothing, as {reason}; the model runs as before",
        stacklevel=3,
    )
