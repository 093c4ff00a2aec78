"""Tracker: hooks on a model, and whose rows each call runs on. What MacCounter and Recorder share."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import ConvExperts, GroupedDynamicConv2d
from ..ops import probing
from ..ops.observers import observers, observing
from ..plans import SamplePlan
from .mac_sums import Sums
from .row_maps import Owners
from .row_tracking import Frame, device_of, first_tensor, rows_of, special_frame
from .rules import OPAQUE


class Call(NamedTuple):
    """``value``: the first tensor that a module reads; ``frames``: those that its call opened."""

    module: nn.Module
    frames: list[Frame]
    value: Any


class Tracker:
    """Context manager: hooks on every module of a model while it is open, in the thread that opened it."""

    def __init__(self, model: nn.Module, batch_dim: int = 0):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.model, self.batch_dim = model, batch_dim
        self._hooks: list = []
        self._names: dict[nn.Module, str] = {}
        self._frames: list[Frame] = []
        self._calls: list[Call] = []
        self._keeps: set[nn.Module] = set()
        self.returned: dict[nn.Module, Any] = {}  # the outputs that the call around them asks for

    def opened(self, name: str, module: nn.Module) -> None:
        """A module gets its hooks."""

    def called(self, call: Call, args: tuple, kwargs: dict, out: Any) -> None:
        """A call has returned, inside of the frames that it opened."""

    def finished(self, frame: Frame) -> None:
        """The outermost call has returned."""

    def price(self, module: nn.Module, args: tuple) -> Sums:
        """The MACs of a sample in a module that did not run."""
        return Sums(1)

    def __enter__(self):
        if self._hooks:
            raise RuntimeError(
                f"{type(self).__name__}: expected one that is not open, got one that was entered already"
            )
        hidden = {m for o in self.model.modules() if isinstance(o, OPAQUE) for m in o.modules() if m is not o}
        for name, module in self.model.named_modules():
            if module in hidden:
                continue
            self._names[module] = name
            self._keeps.update(_kept_outputs(module))
            self.opened(name, module)
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        self._observing = observing(self)
        self._observing.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._names = [], {}
        self._frames, self._calls = [], []
        self._keeps, self.returned = set(), {}
        self._observing.__exit__()

    # -------------------------------------------------------------------------------------- hooks

    def _foreign(self) -> bool:
        """True if a call is another thread's, task's or generator's."""
        return self not in observers() or probing.by() not in (None, self)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._foreign():
            return
        value = first_tensor((*args, *kwargs.values()))
        frames = []
        if not self._frames:
            self._frames.append(Frame(rows_of(value, self.batch_dim), device_of(value)))
            frames.append(self._frames[-1])
        if (frame := self._frames[-1].enter(module, value)) is not None:
            self._frames.append(frame)
            frames.append(frame)
        if (frame := special_frame(module, args, kwargs, value, self)) is not None:
            frame.way = self._frames[-1].way_from(value, frame.rows)
            self._frames.append(frame)
            frames.append(frame)
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, SamplePlan):
                self._frames[-1].told(argument)
        self._calls.append(Call(module, frames, value))

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if self._foreign() or not self._calls or self._calls[-1].module is not module:
            return
        call = self._calls.pop()
        raised = out is None and sys.exc_info()[0] is not None
        if not raised:
            self.called(call, args, kwargs, out)
            if module in self._keeps:
                self.returned[module] = out
        for frame in reversed(call.frames):
            self._frames.pop()
            if raised:
                continue
            frame.close(module, args, kwargs, out, self)
            if self._frames:
                self._frames[-1].leave(frame, module)
                self._know(frame, out)
            else:
                self.finished(frame)
        if not self._frames:
            self.returned.clear()

    def _know(self, frame: Frame, out: Any) -> None:
        """Gives a module's result the rows of its input."""
        if not isinstance(frame.way, Owners):
            return
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == len(frame.way.owner):
                self._frames[-1].know(leaf, frame.way)

    def gathered(self, x: Any, plan, rows: Any) -> None:
        """``ops.gather_samples`` was called."""
        if self._frames and not self._foreign():
            self._frames[-1].gathered(x, plan, rows)

    def filled(self, plan, channels: int, mode: str, kernel_size: int) -> None:
        """``ops.interpolate_pixels`` was called."""


def _kept_outputs(module: nn.Module) -> list[nn.Module]:
    """The modules inside whose output says what ``module`` computes."""
    if isinstance(module, ConvExperts) and module.gate is not None:
        return [module.gate]
    if isinstance(module, GroupedDynamicConv2d):
        return [getattr(module, f"headconv_{i}") for i in range(module.heads)]
    return []
