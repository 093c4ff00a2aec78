"""The loop of adaptive computation time: rows leave it as their halting scores add up to 1.

A row is what may halt by itself: a sample, a position of a sequence or a pixel. Let h be the score of step n
and ``total`` the sum of those before it. A row halts at the first step with ``total + h >= 1 - epsilon``, or
at the last step. That step has the weight ``R = 1 - total`` (the remainder), each one before it its score;
the weights add up to 1, and the ponder cost is ``n + R``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import modes
from ..geometry import is_int, is_share
from ..ops import gather_samples, scatter_samples
from ..ops.samples import SampleLayout
from ..plans import SamplePlan, most_of

Step = Callable[[Any, Any, SamplePlan, int], Any]
"""``step(rows, everything, plan, n)``: the new rows ``[K, ...]`` of the plan, in the n-th step, n from 1.
``everything`` ``[B, ...]``: those rows among the ones that halted, where the loop ``mixes``; else None."""

Score = Callable[[Any, Any, SamplePlan, int], Tensor]
"""``score(rows, everything, plan, n)``: floating ``[K]``, after the n-th step; not after the last one."""


class Pondered(NamedTuple):
    """``output``: a tree of ``[B, ...]``; ``ponder``: ``[B]``, n + R; ``steps``: int32 ``[B]``, n."""

    output: Any
    ponder: Tensor
    steps: Tensor


class HaltingRule:
    """The rule by which a row halts, and the value it leaves behind."""

    def __init__(self, max_steps: int, epsilon: float, weighted: bool, max_fraction: float | None):
        if not is_int(max_steps, 1):
            raise ValueError(f"max_steps: expected an int >= 1, got {max_steps!r}")
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon: expected a number in [0, 1), got {epsilon!r}")
        if max_fraction is not None and not is_share(max_fraction):
            raise ValueError(f"max_fraction: expected a number in [0, 1] or None, got {max_fraction!r}")
        self.max_steps, self.epsilon = max_steps, epsilon
        self.weighted, self.max_fraction = weighted, max_fraction

    def most(self, rows: int) -> int | None:
        """Returns how many of ``rows`` rows may run on after a step; None: all."""
        return None if self.max_fraction is None else most_of(self.max_fraction, rows)

    def halts(self, score: Tensor | None, total: Tensor, most: int | None, running: Tensor | None) -> Tensor:
        """bool ``[K]``: who halts now, or does not run (``running`` is False there). ``score`` None: all."""
        if score is None:
            return torch.ones_like(total, dtype=torch.bool)
        halts = total + score >= 1 - self.epsilon
        if running is not None:
            halts = halts | ~running
        if most is None or most >= len(halts):
            return halts
        # those that are furthest from halting go on; of equals the first ones
        order = (total + score).masked_fill(halts, math.inf).detach().argsort(stable=True)
        return halts.index_fill(0, order[most:], True)


# ------------------------------------------------------------------------------------ the loop


class _Rows(NamedTuple):
    """The state of the loop's rows: one tree, so that one gather makes it smaller."""

    state: Any
    average: list[Tensor | None]  # the weighted sum so far of each floating leaf, float32 at least
    total: Tensor | None  # [K], the sum of the scores so far
    gate: Tensor | None  # [K], ones; their gradient is that of "one more step"


def run(
    rule: HaltingRule, state: Any, batch: int, step: Step, score: Score, mixes: bool, dense: bool
) -> Pondered:
    """:func:`run_dense` or :func:`run_compacted`, the latter outside of a graph that is being compiled."""
    if dense or modes.sizes_stay(state):
        return run_dense(rule, state, batch, step, score)
    if torch.compiler.is_compiling():
        return modes.outside_graph(run_compacted, rule, state, batch, step, score, mixes)
    return run_compacted(rule, state, batch, step, score, mixes)


def run_compacted(
    rule: HaltingRule, state: Any, batch: int, step: Step, score: Score, mixes: bool = False
) -> Pondered:
    """Each step runs on the rows that have not halted. On a GPU their number is read back each time."""
    rows = _Rows(state, [], None, None)
    plan, everything = SamplePlan.full(batch, first_tensor(state).device), state if mixes else None
    left: list[tuple[SamplePlan, Any, Tensor, int]] = []
    for n in range(1, rule.max_steps + 1):
        new = _gated(rows, step(rows.state, everything, plan, n), plan.num_rows)
        if mixes and n < rule.max_steps:
            everything = new if plan.is_full else scatter_samples(new, plan, everything)
        h = score(new, everything, plan, n) if n < rule.max_steps else None
        total = _total(rows, h, new, plan.num_rows)
        halts = rule.halts(h, total, rule.most(batch), None)
        weight = 1 - total if h is None else torch.where(halts, 1 - total, h)
        rows = _after(rule, new, rows.average, total, weight, h)
        keep = None if h is None else SamplePlan.from_mask(~halts)
        if keep is None or keep.is_empty:
            left.append((plan, _output(rule, rows), n + weight, n))
            break
        if not keep.is_full:
            out = keep.dropped()
            gone, ponder = gather_samples((_output(rule, rows), n + weight), out)
            left.append((plan.shrink(out), gone, ponder, n))
            rows, plan = gather_samples(rows, keep), plan.shrink(keep)
    return _in_slots(left)


def run_dense(rule: HaltingRule, state: Any, batch: int, step: Step, score: Score) -> Pondered:
    """The same with every step run on all rows; those that halted keep their state. Nothing is read back."""
    rows, plan = _Rows(state, [], None, None), SamplePlan.full(batch, first_tensor(state).device)
    running = torch.ones(batch, dtype=torch.bool, device=plan.device)
    steps, ponder = torch.zeros_like(running, dtype=torch.int32), None
    for n in range(1, rule.max_steps + 1):
        new = _gated(rows, step(rows.state, rows.state, plan, n), batch)
        if n > 1:
            new = pytree.tree_map(partial(_where, running), new, rows.state)
        h = score(new, new, plan, n) if n < rule.max_steps else None
        total = _total(rows, h, new, batch)
        halts = rule.halts(h, total, rule.most(batch), running)
        weight = 1 - total if h is None else torch.where(halts, 1 - total, h)
        weight = weight.masked_fill(~running, 0)
        h = None if h is None else h.masked_fill(~running, 0)
        rows = _after(rule, new, rows.average, total, weight, h)
        ponder = torch.where(running, n + weight, 0 if ponder is None else ponder)
        steps = steps + running
        running = ~halts
    return Pondered(_output(rule, rows), ponder, steps)


def score_of(value: Any, shapes: tuple[tuple[int, ...], ...], hard: bool, name: str = "halt") -> Tensor:
    """A halting score in the first one of ``shapes``, float32 at least and 0 where it is NaN, or an error.

    Args:
        value: a floating tensor, or a :class:`dynops.gates.Decision`, of which the mask counts (``hard``)
            or the score.
        shapes: those that are taken; further sizes of 1 are too.
    """
    if isinstance(value, tuple) and hasattr(value, "mask"):
        value = value.mask if hard else value.score
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected it to return a floating tensor {list(shapes[0])}, got {what}")
    shape = tuple(value.shape)
    if not any(shape[: len(s)] == s and math.prod(shape[len(s) :]) == 1 for s in shapes):
        raise ValueError(f"{name}: expected it to return {list(shapes[0])}, got shape {shape}")
    value = value.reshape(shapes[0]).to(torch.promote_types(value.dtype, torch.float32))
    return torch.where(value.isnan(), 0, value)


def first_tensor(state: Any) -> Tensor:
    """The leaf that tells batch and device, or an error."""
    for leaf in pytree.tree_leaves(state):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf
    raise TypeError(f"state: expected a tensor [N, ...] or a tree of them, got {type(state).__name__}")


def _gated(rows: _Rows, new: Any, count: int) -> Any:
    """The rows after a step, checked; through ``gate`` flows the gradient of having taken it."""
    for leaf in pytree.tree_leaves(new):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != count):
            raise ValueError(f"step: expected it to return [{count}, ...], got shape {tuple(leaf.shape)}")
    if rows.total is not None:  # not the first step
        new = pytree.tree_map(_as_before, new, rows.state)
    if rows.gate is None:
        return new
    return pytree.tree_map(lambda leaf, old: _lerp(old, leaf, rows.gate), new, rows.state)


def _as_before(leaf: Any, old: Any) -> Any:
    """In the dtype that the first step returned: who halts when is no matter of dtypes. Autocast may have them differ."""
    return leaf.to(old.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _lerp(old: Any, new: Any, gate: Tensor) -> Any:
    if not isinstance(new, Tensor) or not new.is_floating_point():
        return new
    return torch.lerp(old, new, _along(gate, new).to(new.dtype))


def _where(mask: Tensor, new: Any, old: Any) -> Any:
    return torch.where(_along(mask, new), new, old) if isinstance(new, Tensor) else new


def _along(values: Tensor, leaf: Tensor) -> Tensor:
    """``[K]`` as ``[K, 1, ...]``, of the rank of ``leaf``."""
    return values.view(-1, *[1] * (leaf.dim() - 1))


def _total(rows: _Rows, score: Tensor | None, state: Any, count: int) -> Tensor:
    if rows.total is not None:
        return rows.total
    leaf = first_tensor(state)
    like = (
        score
        if score is not None
        else leaf
        if leaf.is_floating_point()
        else torch.empty(0, device=leaf.device)
    )
    return torch.zeros(count, dtype=torch.promote_types(like.dtype, torch.float32), device=leaf.device)


def _after(rule: HaltingRule, state: Any, average: list, total: Tensor, weight: Tensor, score) -> _Rows:
    """The rows with this step added."""
    if rule.weighted:
        leaves = pytree.tree_leaves(state)
        average = [_add(*pair, weight) for pair in zip(average or [None] * len(leaves), leaves, strict=True)]
    if score is None:
        return _Rows(state, average, total, None)
    learns = not rule.weighted and modes.differentiated(score)
    gate = 1 - (score - score.detach()) if learns else None
    return _Rows(state, average, total + score, gate)


def _add(average: Tensor | None, leaf: Any, weight: Tensor) -> Tensor | None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return None
    wide = torch.promote_types(leaf.dtype, torch.float32)
    leaf, weight = leaf.to(wide), _along(weight, leaf).to(wide)
    return leaf * weight if average is None else torch.addcmul(average, leaf, weight)


def _output(rule: HaltingRule, rows: _Rows) -> Any:
    """The state, or its weighted sum; of leaves that are not floating the last value in both."""
    if not rule.weighted:
        return rows.state
    leaves, tree = pytree.tree_flatten(rows.state)
    pairs = zip(rows.average, leaves, strict=True)
    return pytree.tree_unflatten(
        [leaf if sum_ is None else sum_.to(leaf.dtype) for sum_, leaf in pairs], tree
    )


def _in_slots(left: list[tuple[SamplePlan, Any, Tensor, int]]) -> Pondered:
    """Everything that left, in the order of the batch. Each row is moved once, whatever the steps."""
    plans, outputs, ponders, ns = zip(*left, strict=True)
    counts = [torch.full_like(plan.index, n) for plan, n in zip(plans, ns, strict=True)]
    if len(left) == 1:
        return Pondered(outputs[0], ponders[0], counts[0])
    slots = torch.cat([plan.index for plan in plans])
    order = torch.empty_like(slots).scatter_(
        0, slots.long(), torch.arange(len(slots), dtype=slots.dtype, device=slots.device)
    )
    output = pytree.tree_map(lambda *leaves: _sorted(leaves, order), *outputs)
    return Pondered(output, _sorted(ponders, order), _sorted(counts, order))


def _sorted(parts: tuple, order: Tensor) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[-1]
    rows = torch.cat(parts)
    layout = SampleLayout.of(rows)
    return layout.samples(layout.rows(rows).index_select(0, order))
