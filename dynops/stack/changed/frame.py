"""Frame: one call of a model whose values are kept.

A function that the model calls becomes the next step of the tape. Where nothing that it reads has changed it does not
run. Else the rows that changed are computed and written where the value is kept. A value that is not kept is computed
where a later step reads it: of a convolution that only a norm and an activation follow, all three are one kernel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...ops.pixels.rows import gather_rows
from ...plans import PixelPlan
from ..maps import SparseMap
from ..maps.layout import NCHW
from ..maps.pointwise import words
from .followed import Followed, plain_tree
from .inputs import Inputs, differs
from .recording import VALUE
from .rules import BatchNorm, Convolution, PixelByPixel
from .stored import Stored, positions
from .tape import ALL, Step, Tape, Value, frozen

_INPLACE = words("__iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __setitem__ __set__")
_ESCAPES = words("""
numpy __array__ data_ptr untyped_storage storage __dlpack__ as_strided set_ resize_ retain_grad register_hook
share_memory_ __deepcopy__ __reduce_ex__ requires_grad_ backward
""")
_AGAIN = 16  # calls after which rows are tried again
_MOSTLY = 0.9  # of the pixels: above it rows are not tried before they have been measured


class OtherSizes(Exception):
    """A function returns other sizes than in the call before, as they follow from the data."""


class Unfollowable(Exception):
    """The model writes into a tensor that another one shows: its steps cannot be told apart."""


class Frame(Inputs):
    """A call.

    Args:
        tape: what the last calls left.
        options: the stream's.
        names: of parameters and buffers, by id.
        fresh: everything is computed anew.
    """

    def __init__(self, tape: Tape, options, names: dict[int, str], fresh: bool):
        super().__init__(tape, options)
        self.names = names
        self.fresh = fresh or not tape.inputs
        self.next = 0  # the step that is expected
        self.replays = False
        for value in tape.values:
            value.plan = value.dense = None
            value.alive = 0
        for step in tape.steps:
            step.held = None

    # ------------------------------------------------------------------------------------- calls

    def call(self, func: Callable, name: str, args: tuple, kwargs: dict):
        """A function of torch that the model called."""
        if name in _ESCAPES or "out" in kwargs:
            self.tape.pure = False
            return func(*plain_tree(args), **plain_tree(kwargs))
        values: list[Value] = []
        plains: list[Tensor] = []
        key = (name, frozen(args, values, plains, Followed), frozen(kwargs, values, plains, Followed))
        inplace = (
            name in _INPLACE
            or (name.endswith("_") and not name.endswith("__"))
            or kwargs.get("inplace") is True
        )
        target = (args[0] if args else kwargs.get("input")) if inplace else None
        if inplace and type(target) is not Followed:  # a tensor of the model's own
            self.tape.pure = False
            return func(*self._contents(args), **self._contents(kwargs))
        if inplace:
            self._check_alone(target)
        step = self._expected(func, name, key, values, plains)
        if step is None:
            made = self._record(func, name, key, values, plains, inplace)
        else:
            try:
                made = self._again(step)
            except OtherSizes:
                self.tape.cut(step.number)
                made = self._record(func, name, key, values, plains, inplace)
        if inplace and isinstance(made, Followed):
            return self._exchange(target, made)
        if inplace:  # __setitem__ returns nothing
            raise Unfollowable(f"{name} of a part of a tensor")
        return made

    def _contents(self, tree):
        return pytree.tree_map_only(
            Followed, lambda x: x.plain if x.plain is not None else self.whole(x.value), tree
        )

    def _check_alone(self, target: Followed) -> None:
        shares = target.value.shares
        others = sum(self.tape.values[n].alive for n in shares if n < len(self.tape.values))
        if others > 1 and sum(v is not None and v.value.number in shares for v in self._living()) > 1:
            raise Unfollowable("a function works in place on a tensor that a view shows")

    def _exchange(self, target: Followed, made: Followed) -> Followed:
        old = target.value
        target.value = made.value
        made.value.alive += 1
        old.alive -= 1
        if old.alive <= 0:
            self._gone(old)
        return target

    def _expected(self, func, name: str, key: tuple, values: list, plains: list) -> Step | None:
        """The step that the tape has here, if the model does what it did."""
        steps = self.tape.steps
        if self.next < len(steps):
            step = steps[self.next]
            if step.key == key:
                self.constants_moved = self._take(step, plains)
                self.next += 1
                step.func = func
                return step
            self.tape.cut(self.next)
        return None

    def _take(self, step: Step, plains: list[Tensor]) -> bool:
        """Takes the tensors of this call. True where one that is no parameter differs from the last call's."""
        moved = False
        for i, x in enumerate(plains):
            old = step.plains[i]
            if x is old or (i in step.copied and id(x) not in self.names and torch.equal(old, x)):
                continue
            moved = True
            self._note_plain(step, i, x)
        return moved

    # --------------------------------------------------------------------------------- later calls

    def _again(self, step: Step):
        """Runs a step where something that it reads changed."""
        rule, outs, x = step.rule, step.outs, step.passes
        step.rows, step.seconds = 0, 0.0
        if x is not None and x.plan is not ALL and self.shift is None and not self.constants_moved:
            outs[0].plan = x.plan  # it is computed where it is read
            step.rows = 0 if x.plan is None else len(x.plan)
            return self._returned(step)
        moved = self.constants_moved or step.draws or any(v.plan is not None for v in step.inputs)
        moved = moved or (self.shift is not None and outs[0].axes is not None)
        if not moved:
            return self._returned(step)
        if rule.compares:
            self._run_and_compare(step)
            return self._returned(step)
        plan = rule.spread(self, step)
        if self.shift is not None and (
            any(out.number in self.misaligned for out in outs) or rule.knows_places(step)
        ):
            plan = ALL
        if plan is not None and plan is not ALL:
            plan = self.in_blocks(plan)
        for out in outs:
            out.plan = plan
        if plan is None:
            return self._returned(step)
        step.rows = step.of if plan is ALL else len(plan)
        if plan is ALL:
            self._run_whole(step)
        elif any(out.stored is not None for out in outs):
            self._run_rows(step, plan)
        return self._returned(step)

    def _run_whole(self, step: Step) -> None:
        if step.waits:
            step.held = self.whole(step.inputs[0])
            return
        if step.threshold > 0 and not self.fresh and all(type(out.stored) is Stored for out in step.outs):
            made = [x for x in step.rule.dense(self, step) if isinstance(x, Tensor)]
            for out, x in zip(step.outs, made, strict=True):
                full = self.full(out.size)
                written = out.stored.write(Stored(x, out.axes, out.size, True).rows, full, step.threshold)
                out.plan = ALL if bool(written.all()) else self._part_of(full, written)
            return
        began = time.perf_counter()
        kept = [out.stored is not None or not out.decided for out in step.outs]
        for out in step.outs:  # the allocator gives the memory again: new pages cost 10 % of ResNet-50
            out.stored = None
        made = [x for x in step.rule.dense(self, step) if isinstance(x, Tensor)]
        for out, x, keeps in zip(step.outs, made, kept, strict=True):
            if keeps:
                self.keep(out, x, own=not self._is_shared(out, x))
            else:
                out.dense = x
        self._timed(step, began, "dense")

    def _run_and_compare(self, step: Step) -> None:
        self.constants_moved = False
        made = [x for x in step.rule.dense(self, step) if isinstance(x, Tensor)]
        if len(made) != len(step.outs) or any(
            x.shape != out.shape for x, out in zip(made, step.outs, strict=True)
        ):
            for out in step.outs:  # sizes that follow from the data
                out.plan = ALL
            raise OtherSizes
        step.rows = step.of
        for out, x in zip(step.outs, made, strict=True):
            if out.stored is None:
                out.plan, out.dense = ALL, x
            elif self.everything and step.threshold <= 0:  # 80 comparisons of EfficientNet-B0: 8 ms of 90
                out.plan = ALL
                self.keep(out, x, own=not self._is_shared(out, x))
            elif type(out.stored) is not Stored:
                if not _same(out.stored, x, step.threshold):
                    out.plan, out.stored = ALL, x.clone()
            else:
                moved = differs(out.stored.dense, x, step.threshold)
                if step.threshold > 0:
                    out.stored.note_owed(out.stored.dense, x, moved)
                out.plan = self.plan_of(moved)
                if step.threshold > 0 and out.plan is not None and out.plan is not ALL:
                    rows = gather_rows(x, out.plan.index, None)
                    out.stored.rows.index_copy_(0, positions(out.plan), rows)
                elif out.plan is not None:
                    self.keep(out, x, own=not self._is_shared(out, x))

    def _run_rows(self, step: Step, plan: PixelPlan) -> None:
        began, share = time.perf_counter(), len(plan) / step.of
        if step.rule.may_be_dense and step.threshold <= 0 and self._dense_is_faster(step, len(plan), share):
            self._run_whole(step)
            return
        fused = self._fused(step) if step.threshold <= 0 else None
        if fused is not None and fused.into(self, step.outs[0].stored, plan):
            self._timed(step, began, "rows", len(plan))
            return
        made = [x for x in step.rule.rows(self, step, plan) if x is not None]
        for out, x in zip(step.outs, made, strict=True):
            if out.stored is None:
                continue
            if step.threshold <= 0 and self._written_in_place(out, x):
                continue
            rows = x.rows() if type(x) is SparseMap else x
            written = out.stored.write(rows, plan, step.threshold)
            if written is not None and len(step.outs) == 1:
                out.plan = self._part_of(plan, written)
        self._timed(step, began, "rows", len(plan))

    def _written_in_place(self, out: Value, x) -> bool:
        """True where a convolution wrote its rows into the map that is kept."""
        waits = x.convolution() if type(x) is SparseMap and out.axes == NCHW == x.axes else None
        return waits is not None and waits.into(out.stored.dense)

    def _part_of(self, plan: PixelPlan, written: Tensor):
        if bool(written.all()):
            return plan
        index = plan.index[written]
        mask = torch.zeros(math.prod(plan.shape), dtype=torch.bool, device=index.device)
        mask[index.long()] = True
        return self.plan_of(mask.view(plan.shape))

    def _dense_is_faster(self, step: Step, rows: int, share: float) -> bool:
        """What the times of earlier calls say. What lost is tried again now and then, as a time may have been disturbed."""
        if "rows" not in step.times or self.options.is_cuda:
            return share > _MOSTLY
        if share > 0.5 and step.ran["dense"] < 2:  # the first time is that of the recording
            return True
        if step.times["rows"] * rows <= _dense_seconds(step):
            return False
        step.lost += 1
        return step.lost % _AGAIN != 0

    def _returned(self, step: Step):
        if self.replays:
            return None
        leaves, outs = list(step.leaves), iter(step.outs)
        for i, x in enumerate(leaves):
            if x is VALUE:
                leaves[i] = self.follow(next(outs))
        return pytree.tree_unflatten(leaves, step.spec)

    # -------------------------------------------------------------------------------------- replay

    def replay(self) -> None:
        """Runs the steps of the tape as they are, without the model's Python."""
        for value in self.tape.values:
            value.alive = 1
        self._entered.clear()
        self.replays = True
        for step in self.tape.steps:
            self.constants_moved = False
            self._again(step)
            for value in step.last:
                value.dense = None
        self.next = len(self.tape.steps)

    # ------------------------------------------------------------------------------------ lifetimes

    def forget(self, followed: Followed) -> None:
        """A tensor of the model's Python is gone."""
        value = followed.value
        value.alive -= 1
        if value.alive <= 0:
            self._gone(value)

    def _gone(self, value: Value) -> None:
        """Nobody reads a value any more: what was kept for this call alone goes."""
        if not value.decided and value.dense is not None:
            self._decide(value)
        value.dense = None

    def _decide(self, value: Value) -> None:
        """Whether a value is kept: where a step reads more of it than its own pixels, or others change than in what is made.

        One whose step has a threshold by name is kept too, as a threshold compares.
        """
        value.decided = True
        own = all(own and kind is value.kind for own, kind in value.readers)
        needed = value.returned or not own or not value.readers or value.axes is None
        named = isinstance(self.options.threshold, Mapping) and value.step.threshold > 0
        if (needed or named) and self.options.keeps(value):
            self.keep(value, value.dense, own=not self._is_shared(value, value.dense))

    def _note_last(self) -> None:
        """Notes at each step the values that no later one reads, and the convolutions that a norm alone follows."""
        seen: set[int] = set()
        for step in self.tape.steps:
            x = step.inputs[0] if isinstance(step.rule, BatchNorm) else None
            if x is not None and x.step is not None and isinstance(x.step.rule, Convolution):
                alone = (
                    x.stored is None and len(x.readers) == 1 and not x.returned and x.step.modes == step.modes
                )
                x.step.waits = alone and x.step.rule.waits_for_norms
            one = type(step.rule) in (PixelByPixel, BatchNorm) and len(step.inputs) == len(step.outs) == 1
            own = one and step.inputs[0].size == step.size and self.options.block is None and not step.draws
            step.passes = step.inputs[0] if own and step.outs[0].stored is None else None
        for step in reversed(self.tape.steps):
            step.last = [v for v in (*step.inputs, *step.outs) if v.number not in seen]
            seen.update(v.number for v in step.last)

    def close(self) -> None:
        """What is still followed becomes a tensor of its own."""
        self._entered.clear()
        for x in self._living():
            x.plain, x.frame = self.content(x.value), None

    def end(self, out):
        """Ends the call, and returns its result in tensors of their own."""
        for x in pytree.tree_leaves(out):
            if type(x) is Followed and x.plain is None:
                x.value.returned = True
        living = self._living()
        for value in {id(x.value): x.value for x in living}.values():
            if not value.decided and value.dense is not None:
                self._decide(value)
        if self.next < len(self.tape.steps):
            self.tape.cut(self.next)
        self.close()
        for value in self.tape.values:
            value.dense = None
        self._rows.clear()
        self._note_last()
        return pytree.tree_map_only(Followed, lambda x: x.plain, out)


def _dense_seconds(step: Step) -> float:
    """The dense time of a step with those before it that are computed where it is."""
    found, seen, before = 0.0, set(), [step]
    while before:
        one = before.pop()
        if one.number not in seen:
            seen.add(one.number)
            found += one.times.get("dense", 0.0)
            before += [v.step for v in one.inputs if v.stored is None and v.step is not None]
    return found


def _same(a: Tensor, b: Tensor, threshold: float) -> bool:
    if threshold > 0 and a.is_floating_point():
        return bool(((a - b).abs() <= threshold).all())
    return torch.equal(a, b)
