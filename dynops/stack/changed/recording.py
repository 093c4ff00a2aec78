"""Recording: a function that a model called becomes a step of the tape."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..maps.layout import NCHW
from ..maps.pointwise import words
from .contents import Contents, modes_now
from .finding import rule_of
from .rules import Neighbourhood, PixelByPixel, Rule
from .stored import Stored
from .tape import ALL, GIVEN, Kind, Step, Value, widest
from .views import Attention, Statistics

_VIEWS = words("""
view reshape flatten permute transpose __getitem__ chunk split narrow unbind select squeeze unsqueeze expand contiguous
detach to float half type movedim swapaxes unflatten T mT view_as reshape_as expand_as swapdims moveaxis tensor_split
hsplit data
""")
VALUE = object()  # in the place of a tensor, among the leaves of a result


def random_state(device: torch.device) -> Tensor:
    """The states of the generators that a function on a device draws from; a GPU's is kept on the host."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


class Recording(Contents):
    """The part of a :class:`~.frame.Frame` that records steps."""

    def _record(self, func, name: str, key: tuple, values: list, plains: list, inplace: bool):
        step = Step(len(self.tape.steps), func, name, key, list(dict.fromkeys(values)), list(plains))
        for i, x in enumerate(plains):
            self._note_plain(step, i, x)
        step.modes = modes_now()
        known = [self.names[id(x)] for x in plains if id(x) in self.names]
        step.label = f"{known[0].rpartition('.')[0]} ({name})" if known else name
        step.target = step.inputs[0] if inplace else None
        began = time.perf_counter()
        drawn = random_state(self.options.device)
        out = self.called(step, lambda v: self.whole(v).clone() if v is step.target else self.whole(v))
        self._timed(step, began, "dense")
        step.draws = not torch.equal(drawn, random_state(self.options.device))
        leaves, step.spec = pytree.tree_flatten(out)
        if not any(isinstance(x, Tensor) for x in leaves):  # a number that Python decides by
            self.tape.pure = False
            return out
        self.tape.pure &= not step.copied and not step.draws
        self.tape.steps.append(step)
        self.next = len(self.tape.steps)
        step.leaves = leaves
        step.rule = Rule() if step.draws else rule_of(self, step, out)
        step.leaves = [VALUE if isinstance(x, Tensor) else x for x in leaves]
        if step.rule.__class__ is Statistics and step.rule.kept:
            step.rule.dense(self, step)  # notes the statistics
        axes = step.axes
        kind = self._kind_of(step)
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor):
                continue
            value = self.tape.new(
                step, len(step.outs), x, *self._axes_of(step, x, axes[i] if axes else None), kind
            )
            value.plan, value.dense = ALL, x
            self._note_sharing(step, value, x)
            step.outs.append(value)
        for i, v in enumerate(step.inputs):
            v.readers.append((step.rule.reads_own_place(step, i), kind))
        step.threshold = self.options.threshold_of(step.label, leaves)
        if not self.options.threshold and isinstance(step.rule, PixelByPixel):
            step.widest = next(
                (i for i, v in enumerate(step.inputs) if v.kind is kind and v.size == step.size), None
            )
        step.of = step.rows = math.prod(step.outs[0].size) if step.outs[0].size else 1
        return self._returned(step)

    def _note_plain(self, step: Step, i: int, x: Tensor) -> None:
        """Takes a tensor that is no value; a copy of one that is no parameter, as the model may write into it."""
        is_parameter = id(x) in self.names
        step.plains[i] = x if is_parameter else x.clone()
        (step.copied.discard if is_parameter else step.copied.add)(i)

    def _kind_of(self, step: Step) -> Kind:
        """Where what a step makes changes, as far as the forward alone says it."""
        if self.options.spread != "exact":
            return GIVEN
        rule, maps = step.rule, [(i, v) for i, v in enumerate(step.inputs) if v.axes is not None]
        if isinstance(rule, Neighbourhood) and maps and not rule.reads_own_place(step, 0):
            return Kind(step.inputs[0].kind, rule.reads)
        own = [v.kind for i, v in maps if rule.reads_own_place(step, i)]
        joins = len(own) == len(maps) or (type(rule) is Attention and self.options.attention == "kept")
        return Kind() if not own or not joins else widest(own) or Kind()

    def _axes_of(self, step: Step, x: Tensor, axes) -> tuple:
        rule = step.rule
        if isinstance(rule, PixelByPixel):
            return axes, step.size
        if isinstance(rule, (Statistics, Attention)):
            return step.inputs[0].axes, step.inputs[0].size
        if isinstance(rule, Neighbourhood):
            return NCHW, rule.size
        if x.dim() == 4 and x.is_floating_point() and any(v.axes is not None for v in step.inputs):
            return NCHW, (x.shape[0], *x.shape[2:])
        return None, None

    def _note_sharing(self, step: Step, value: Value, x: Tensor) -> None:
        memory = x.untyped_storage().data_ptr()
        for v in step.inputs:
            if step.name in _VIEWS or (
                v.dense is not None and v.dense.untyped_storage().data_ptr() == memory
            ):
                v.shares |= value.shares
                value.shares = v.shares

    def _is_shared(self, value: Value, x: Tensor) -> bool:
        """True where the content of a value is the memory of a value that is kept, or of a tensor that is none."""
        memory = x.untyped_storage().data_ptr()
        for number in value.shares:
            kept = self.tape.values[number].stored
            kept = kept.grid if type(kept) is Stored else kept
            if kept is not None and kept.untyped_storage().data_ptr() == memory:
                return True
        return any(p.untyped_storage().data_ptr() == memory for p in value.step.plains)

    def _timed(self, step: Step, began: float, how: str, rows: int = 1) -> None:
        step.seconds = time.perf_counter() - began
        step.ran[how] += 1
        if how == "rows" and step.ran[how] == 1:  # it packs weights
            return
        each = step.seconds / max(rows, 1)
        step.times[how] = min(each, step.times.get(how, each))
