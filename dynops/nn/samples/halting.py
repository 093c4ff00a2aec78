"""Halting: a step that each sample, or each position, repeats as often as its halting scores ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...plans import SamplePlan
from ..apart import apart
from ..halting import HaltingRule, Pondered, first_tensor, run, score_of

LEVELS = ("sample", "position")


class HaltingOutput(NamedTuple):
    """``output``: as the state; ``ponder``: floating, N + R with a gradient through R; ``steps``: int32, N.

    ``ponder`` and ``steps`` are ``[N]`` of samples, ``[B, T]`` of positions, ``[N, 1, H, W]`` of pixels.
    ``ponder.mean()`` times a small factor is the ponder cost that is added to a loss.
    """

    output: Any
    ponder: Tensor
    steps: Tensor


class Halting(nn.Module):
    """Adaptive computation time: repeats a step until the halting scores of a sample or position reach 1.

    Called as ``output, ponder, steps = layer(state)``. With ``s_n = step(s_{n-1}, n)`` and
    ``h_n = halt(s_n)``, a sample takes N steps, the smallest N with ``h_1 + … + h_N >= 1 - epsilon``, at most
    ``max_steps``, and::

        R = 1 - (h_1 + … + h_{N-1})                                      the remainder
        output = h_1 s_1 + … + h_{N-1} s_{N-1} + R s_N                   or s_N with weighted=False
        ponder = N + R

    A step runs on a batch of those that have not halted, in training too. All gradients are those of the
    formula, N taken as constant: the scores get theirs through the output and through R. Graves' ACT, and
    with ``step`` a block of shared weights IamNN; with ``n`` choosing the layer, networks whose depth depends
    on the token.

    Args:
        step: a module or function ``(state, n) -> state`` for n = 1, 2, …; states of one shape from the first
            step on. It treats each sample by itself: in training mode a BatchNorm in it takes its statistics
            from those that still run, however few (see ``dense``). What a step reads and never changes
            (Graves' input) may be a part of the state.
        halt: a module or function ``state -> score``, for example a Linear and a sigmoid. A score is a
            probability in [0, 1] for each sample, ``[K]`` or ``[K, 1, ...]``; NaN counts as 0. Or a
            :class:`dynops.gates.Decision`, of which the score counts (with ``weighted=False`` the mask). It
            is not called after the last step.
        max_steps: where everything halts.
        epsilon: lets a sample halt after one step.
        level: "sample", or "position": the state is a tensor ``[B, T, C]``, and each of its positions halts
            by itself. The step then gets rows ``[P, C]`` of the positions that run and returns their new
            rows; so does ``halt``.
        mixes: at the level "position", the step reads other positions too, as attention does. It is called as
            ``step(hidden, plan, n)`` and returns the new rows ``[P, C]`` of the positions that run (Universal
            Transformer). ``hidden`` holds all states ``[B, T, C]``, of halted positions their last; ``plan`` is
            the :class:`~dynops.SamplePlan` of the ``B * T`` positions. See :func:`pad_positions`.
        weighted: False: the output is the last state, and the score is a decision: best a hard one with a
            gradient (:mod:`dynops.gates`), 1 = this step was the last. Its gradient is that of a gate on the
            next step, ``s_{n+1} = s_n + (1 - h_n) (step(s_n) - s_n)``, the gate being 1 in the forward pass
            (dynamic recursion).
        dense: runs every step on everything, and those that halted keep their state. The result is the same
            up to rounding, but for BatchNorm in training mode, whose statistics then include them; a step
            that does not treat samples by themselves is the other difference. Runs ``max_steps`` steps. An
            attribute: it may be changed at any time.
        max_fraction: the largest share of the batch (of its positions) that goes on after a step,
            ``floor(max_fraction * N)``: those whose scores have the smallest sum; the others halt. A bound on
            the time that no input can break; a sample's result then depends on its batch. None: no bound.

    Shape:
        - state: a tensor ``[N, ...]``, or a pytree of them, any dtype; ``[B, T, C]`` at the level "position".
        - output: :class:`HaltingOutput`. Leaves that are not floating have their last value. Sums are
          float32 at least.

    ``step`` and ``halt`` are functions of values: one that writes in place gets a copy of a state that is read again.
    The output has the dtype that the first step returns. Later states are cast to it.

    On a GPU each step reads the number of samples that run back to the host, but with ``dense``.
    ``torch.compile`` of a surrounding model breaks its graph here and runs the steps as they are, but with
    ``dense``, where it compiles them all.

    Raises:
        TypeError, ValueError: an argument, or what ``step`` or ``halt`` returned, that does not fit.

    Papers: Graves, Adaptive Computation Time (2016); Dehghani et al., Universal Transformers (ICLR 2019; its
    code scores a state before the step, not after it); Leroux et al., IamNN (2018); Guo et al., Dynamic
    Recursive Neural Network (CVPR 2019); Elbayad et al., Depth-Adaptive Transformer (ICLR 2020).
    """

    def __init__(
        self,
        step: Callable,
        halt: Callable,
        max_steps: int,
        epsilon: float = 0.01,
        level: str = "sample",
        *,
        mixes: bool = False,
        weighted: bool = True,
        dense: bool = False,
        max_fraction: float | None = None,
    ):
        super().__init__()
        for name, value in (("step", step), ("halt", halt)):
            if not callable(value):
                raise TypeError(f"{name}: expected a module or a function, got {type(value).__name__}")
        if level not in LEVELS:
            raise ValueError(f"level: expected one of {LEVELS}, got {level!r}")
        if mixes and level == "sample":
            raise ValueError(
                "mixes: expected False at the level 'sample': a step treats each sample by itself"
            )
        HaltingRule(max_steps, epsilon, weighted, max_fraction)
        self.step, self.halt = step, halt
        self.max_steps, self.epsilon, self.max_fraction = max_steps, epsilon, max_fraction
        self.level, self.mixes, self.weighted, self.dense = level, mixes, weighted, dense

    def forward(self, state: Any) -> HaltingOutput:
        if self.level == "position":
            return self._positions(state)
        batch = first_tensor(state).shape[0]
        for leaf in pytree.tree_leaves(state):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != batch):
                raise ValueError(f"state: expected [{batch}, ...] in every tensor, got {tuple(leaf.shape)}")

        def step(rows, everything, plan, n):
            return apart(self.step, rows, n)

        return HaltingOutput(*self._run(state, batch, step))

    def _positions(self, state: Tensor) -> HaltingOutput:
        if not isinstance(state, Tensor) or state.dim() != 3:
            what = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state: expected a tensor [B, T, C] at the level 'position', got {what}")
        size = state.shape[:2]

        def step(rows, everything, plan, n):
            if not self.mixes:
                return apart(self.step, rows, n)
            hidden = everything.reshape(*size, *everything.shape[1:])
            return apart(self.step, hidden, plan, n)

        output, ponder, steps = self._run(state.flatten(0, 1), size.numel(), step)
        return HaltingOutput(output.reshape(*size, *output.shape[1:]), ponder.view(size), steps.view(size))

    def _run(self, state: Any, batch: int, step: Callable) -> Pondered:
        rule = HaltingRule(self.max_steps, self.epsilon, self.weighted, self.max_fraction)

        def score(rows, everything, plan, n):
            return score_of(apart(self.halt, rows), ((plan.num_rows,),), not self.weighted)

        return run(rule, state, batch, step, score, self.mixes, self.dense)

    def extra_repr(self) -> str:
        text = f"max_steps={self.max_steps}, epsilon={self.epsilon}, level={self.level!r}"
        text += f", mixes={self.mixes}, weighted={self.weighted}, dense={self.dense}"
        return text if self.max_fraction is None else f"{text}, max_fraction={self.max_fraction}"


def pad_positions(rows: Tensor, plan: SamplePlan, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows of positions as one padded batch, for an attention whose queries are the positions that run.

    Args:
        rows: ``[P, C]``, of the positions of ``plan`` among ``B * T``.
        plan: a compact :class:`~dynops.SamplePlan`, as a step of :class:`Halting` gets it.
        size: ``(B, T)``.

    Returns:
        ``(padded, slots)``: ``[B, Q, C]``, Q the most positions that one sequence has, zeros behind the
        others'; and int64 ``[P]`` with ``padded.flatten(0, 1)[slots] == rows``. Reads Q back to the host.
    """
    batch, time = size
    if plan.count is not None or plan.batch != batch * time or len(rows) != plan.num_rows:
        raise ValueError(f"rows, plan: expected [P, C] and a compact plan of {batch} * {time}, got {plan}")
    sequence = plan.index.long() // max(time, 1)
    counts = torch.bincount(sequence, minlength=batch)
    longest = int(counts.max()) if plan.num_rows else 0
    before = (counts.cumsum(0) - counts)[sequence]  # rows of earlier sequences
    slots = sequence * longest + torch.arange(plan.num_rows, device=plan.device) - before
    padded = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, slots, rows)
    return padded.view(batch, longest, *rows.shape[1:]), slots
