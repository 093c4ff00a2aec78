"""EarlyExit and Cascade: networks that a sample leaves as soon as its prediction is good enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import modes
from ...geometry import is_share
from ...ops import gather_samples
from ...ops.pixels.rows import memory_format_of
from ...plans import SamplePlan, most_of
from ...stack.sample_stack import SampleStack
from ..apart import apart
from .criteria import Criterion, decide, max_probability
from .losses import gradient_rescale
from .state import Compaction, Shared, check_shared


class ExitOutput(NamedTuple):
    """A sample's ``logits`` ``[N, ...]`` are those of its exit, ``exits`` int64 ``[N]``, from 0."""

    logits: Tensor
    exits: Tensor


class ExitScores(NamedTuple):
    """``logits`` ``[N, ...]`` of all E exits; the criterion's ``confidence`` ``[N]`` at all but the last."""

    logits: list[Tensor]
    confidence: list[Tensor]


class Visit(NamedTuple):
    """One exit's event, see :meth:`EarlyExit.visits`.

    ``exit``: its number. ``index``: int64 ``[n]``, ascending, which samples of the batch are there.
    ``logits``: ``[n, ...]``. ``staying``: the :class:`~dynops.SamplePlan` of those n that go on.
    """

    exit: int
    index: Tensor
    logits: Tensor
    staying: SamplePlan

    def leaving(self) -> SamplePlan:
        """The plan of those n that leave; its size is known, so nothing is read back."""
        staying = self.staying
        if staying.is_empty:
            return SamplePlan.full(staying.batch, staying.device)
        leaves = SamplePlan.from_mask(~staying.mask(), staying.batch - staying.num_rows)
        return SamplePlan(leaves.index, staying.batch)


class _Exits(nn.Module):
    """Base of EarlyExit and Cascade: the batch shrinks, and results go to their own slots."""

    num_exits: int
    _maker: str  # the argument whose modules return logits

    def __init__(self, criterion, max_fraction, shared):
        super().__init__()
        self.shared = check_shared(shared)
        if not callable(criterion):
            raise TypeError(f"criterion: expected a Criterion or a callable, got {type(criterion).__name__}")
        self.criterion = criterion
        self.max_fraction = max_fraction

    def _set_up(self, num_exits: int) -> None:
        self.num_exits = num_exits
        if isinstance(self.criterion, Criterion):
            self.criterion.check_exits(num_exits)
        _fractions(self.max_fraction, num_exits)

    def _step(self, exit: int, state: Any) -> tuple[Tensor, Any, Any]:
        """The logits of an exit, the state for the next stage, and the one that the criterion reads."""
        raise NotImplementedError

    def forward(
        self, x: Any, all_exits: bool | None = None, confidence: bool = False
    ) -> ExitOutput | list[Tensor] | ExitScores:
        if confidence and all_exits is False:
            raise ValueError("confidence: expected all_exits with it, got all_exits=False")
        if confidence or (self.training if all_exits is None else all_exits):
            return self._every(x, confidence)
        if modes.sizes_stay(x):
            return self._chosen(x)
        compiling = torch.compiler.is_compiling()
        return modes.outside_graph(self._compacted, x) if compiling else self._compacted(x)

    def _every(self, x: Any, confidence: bool) -> list[Tensor] | ExitScores:
        state, memory, logits, sure = x, None, [], []
        for exit in range(self.num_exits):
            out, state, seen = self._step(exit, state)
            logits.append(out)
            if confidence and exit < self.num_exits - 1:
                verdict = decide(self.criterion, out, exit, seen, memory)
                memory = verdict.memory
                sure.append(_confidence(verdict.confidence, out))
        return ExitScores(logits, sure) if confidence else logits

    def visits(self, x: Any) -> Iterator[Visit]:
        """Goes from exit to exit with the samples that are still there, and yields a :class:`Visit` at each.

        What ``forward`` is made of, for who wants more than the last logits: ELF's loss, for example, in
        which a sample pays at every exit that it passes, is the sum over the visits of
        ``cross_entropy(visit.logits, labels[visit.index], reduction="sum") / N``. Gradients flow.
        """
        modes.refuse_fixed_sizes(x, f"{type(self).__name__}.visits")
        state, memory, index, batch = x, None, None, 0
        compacted = Compaction(self.shared)
        for exit in range(self.num_exits):
            logits, state, seen = self._step(exit, state)
            if index is None:
                batch = logits.shape[0]
                index = torch.arange(batch, device=logits.device)
            elif logits.shape[0] != index.shape[0]:
                raise ValueError(
                    f"logits: expected [{index.shape[0]}, ...] at exit {exit}, got {tuple(logits.shape)}; did a "
                    "stage mix tensors of some samples with tensors of all? (see shared)"
                )
            if exit == self.num_exits - 1:
                compacted.warn_unseen()
                yield Visit(
                    exit, index, logits, SamplePlan(index.new_empty(0, dtype=torch.int32), len(index))
                )
                return
            leave, memory = self._leave(logits, exit, seen, memory, batch)
            staying = SamplePlan.from_mask(~leave)
            yield Visit(exit, index, logits, staying)
            if staying.is_empty:
                return
            if not staying.is_full:
                state, memory, index = compacted(state, staying, memory, index)

    @torch.no_grad()
    def _leave(
        self, logits: Tensor, exit: int, state, memory, batch: int, there: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """bool ``[n]``: who leaves, the criterion's wish and the cap together; and the criterion's memory.

        ``there``: bool ``[n]``, who has not left before; None: all.
        """
        leave, confidence, memory = decide(self.criterion, logits, exit, state, memory)
        leave = leave if there is None else leave | ~there
        fraction = _fractions(self.max_fraction, self.num_exits)[exit]
        most = most_of(fraction, batch)
        if leave.shape[0] > most:
            leave = ~at_most(~leave, _confidence(confidence, logits), most)
        return leave, memory

    def _compacted(self, x: Any) -> ExitOutput:
        rows, index, exits, like = [], [], [], None
        for visit in self.visits(x):
            like = visit.logits if like is None else like
            self._check_alike(like, visit.exit, visit.logits)
            if visit.staying.is_full and not visit.staying.is_empty:
                continue
            leaving = visit.leaving()
            gone = (visit.logits, visit.index)
            gone = gone if leaving.is_full else gather_samples(gone, leaving)
            rows.append(gone[0].to(like.dtype))
            index.append(gone[1])
            exits.append(torch.full_like(gone[1], visit.exit))
        if len(rows) == 1:  # they all left there, in order
            return ExitOutput(rows[0], exits[0])
        where = torch.cat(index)
        return ExitOutput(_in_slots(torch.cat(rows), where), _in_slots(torch.cat(exits), where))

    def _chosen(self, x: Any) -> ExitOutput:
        """The same where sizes may not depend on values (export, ``vmap``): every exit sees every sample, and each keeps the
        logits of its own."""
        state, memory, out, exits, there = x, None, None, None, None
        for exit in range(self.num_exits):
            logits, state, seen = self._step(exit, state)
            if out is None:
                out, there = logits, torch.ones_like(logits.flatten(1)[:, 0], dtype=torch.bool)
                exits = torch.zeros_like(there, dtype=torch.int64)
            else:
                self._check_alike(out, exit, logits)
                out = torch.where(there.view(-1, *[1] * (out.dim() - 1)), logits.to(out.dtype), out)
                exits = torch.where(there, exit, exits)
            if exit < self.num_exits - 1:
                leave, memory = self._leave(logits, exit, seen, memory, logits.shape[0], there)
                there = there & ~leave
        return ExitOutput(out, exits)

    def _check_alike(self, like: Tensor, exit: int, logits: Tensor) -> None:
        if logits.shape[1:] != like.shape[1:]:
            expected, got = (["n", *t.shape[1:]] for t in (like, logits))
            name = self._maker
            raise ValueError(
                f"{name}[{exit}]: expected logits [{', '.join(map(str, expected))}], as {name}[0] has them, got "
                f"[{', '.join(map(str, got))}]: a sample's logits come from its exit (all_exits=True takes any)"
            )

    def extra_repr(self) -> str:
        return "" if self.max_fraction is None else f"max_fraction={self.max_fraction}"


class EarlyExit(_Exits):
    """A chain of stages with an exit after each: a criterion lets samples leave, and the batch shrinks.

    ``state = stages[e](state); logits = heads[e](state)`` for e = 0 … E - 1. In eval mode the criterion
    chooses after each exit the samples that leave. The state of the others is compacted once, and a sample's logits
    go to its own slot. The last exit takes the rest. If no sample leaves, nothing is copied; if all have left, the
    later stages do not run.

    In training mode, or with ``all_exits=True``, every exit sees every sample. With ``all_exits=False``
    samples leave in training too (ELF), with gradients; BatchNorm then takes its statistics from the samples
    that are still there, and raises where one sample of a 1x1 map is left.

    Args:
        stages: E modules, state -> state. The state is a tensor ``[n, ...]`` or a nesting of tensors: tuples,
            lists, dicts, dataclasses (a ``ModelOutput``), registered pytrees, transformers' caches. It may also
            hold None and other values. Some of its tensors have a row for each sample, the others are shared by
            all: see ``shared``.
        heads: E modules, state -> logits ``[n, ...]``; or -> ``(logits, state)``, the state that the
            criterion and the next stage get (IMTA: features for the next head).
        criterion: a :class:`Criterion` (:class:`MaxSoftmax`, :class:`Entropy`, :class:`Margin`,
            :class:`Patience`, :class:`LearnedExit`, …), or a callable ``(logits, exit, state) -> bool [n]``.
            It decides without gradients. A confidence that is NaN never leaves before the last exit.
        max_fraction: the largest share of the batch that may go on past an exit, a number in [0, 1] or one
            for each exit: ``floor(max_fraction * N)`` samples. If more want to, the least confident go on and
            the others are made to leave: a hard cap on computation, also under a slowdown attack.
        gradient_equilibrium: multiplies the gradient before head e by 1 / (E - e), and the gradient after it by
            (E - e - 1) / (E - e), in all floating tensors of the state (IMTA). If a head returns a state, the
            gradient behind it is multiplied by E - e - 1.
        shared: the parts of a state that all samples share, and that stay whole: names (dict keys, fields, positions in
            a tuple), or a dict ``{name: bool}``, with False for a part that has a row for each sample. A name counts for
            all that lies in its part. The shape decides about other tensors when samples leave. A tensor ``[n, ...]``, n
            the samples that are there, has a row for each. Scalars, ``[1, ...]`` and any other first size are
            shared. If both are possible, a tensor that was shared before stays shared. A bool or floating
            tensor ``[n, n]`` is taken as a mask of T = n positions, with a warning. It is not, if it is the first
            tensor or has its shape. A cache (DynamicCache, StaticCache, EncoderDecoderCache, those of linear
            attention) has rows: stages after the exit get a smaller copy. The caller's cache keeps the rows
            of all samples and what the stages before the exit wrote.

    Shape:
        - x: the first stage's state.
        - output: :class:`ExitOutput`, ``(logits [N, ...], exits int64 [N])``, in the batch's order; with all
          exits a list of E logits ``[N, ...]``, with ``confidence=True`` too :class:`ExitScores`.

    Stages and heads are functions of values: a stage that writes into its input in place changes it for no
    other reader. (A cache is there to be written into.) Logits have the dtype of the first exit's. Where
    samples leave, all heads return logits of one size ``[n, ...]``.

    On a CPU, without gradients, a stage may run on rows, as in :class:`Skip`. Such a stage holds
    convolutions, norms in eval mode, activations and sums, and a 3x3 convolution that Winograd's algorithm
    takes.

    On a GPU the number of samples that go on is read back once at each exit. Under ``torch.compile`` a model
    that lets samples leave breaks its graph here, and runs the stages as they are: compile stages and heads
    themselves (sizes change: ``dynamic=True``). With all exits there is no break. ``state_dict`` keys:
    ``stages.e.…``, ``heads.e.…``, ``criterion.…``.

    Raises:
        TypeError, ValueError: an argument, a state or a verdict that does not fit, with what was expected and
            what came.

    Papers: BranchyNet (ICPR 2016), Conditional deep learning (DATE 2016), MSDNet (ICLR 2018), Shallow-Deep
    Networks (ICML 2019), IMTA (ICCV 2019), RANet (CVPR 2020), DeeBERT, FastBERT, The Right Tool for the Job
    (ACL 2020), PABEE (NeurIPS 2020), ELF (arXiv 2020).
    """

    _maker = "heads"

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        criterion,
        max_fraction: float | Sequence[float] | None = None,
        *,
        gradient_equilibrium: bool = False,
        shared: Shared | None = None,
    ):
        super().__init__(criterion, max_fraction, shared)
        self.stages, self.heads = module_list("stages", stages), module_list("heads", heads)
        if len(self.stages) != len(self.heads):
            raise ValueError(
                f"heads: expected one for each of {len(self.stages)} stages, got {len(self.heads)}"
            )
        self.gradient_equilibrium = gradient_equilibrium
        self._traced: dict[int, SampleStack] = {}
        self._set_up(len(self.stages))

    def _run_stage(self, exit: int, state: Any) -> Any:
        stage, found = self.stages[exit], self._traced.get(exit)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not modes.transformed():
            if found is None or not found.holds(stage, "replace"):
                found = self._traced[exit] = SampleStack(stage, "replace")
            if found.runs_all(state):
                return found.on_all(state)
        return apart(stage, state)

    def __getstate__(self):
        return {**self.__dict__, "_traced": {}}

    def _step(self, exit: int, state: Any) -> tuple[Tensor, Any, Any]:
        left = self.num_exits - exit
        state = self._run_stage(exit, state)
        seen = gradient_rescale(state, 1 / left) if self.gradient_equilibrium else state
        out = apart(self.heads[exit], seen)
        through = isinstance(out, tuple) and len(out) == 2
        logits, after = out if through else (out, state)
        _check_logits(logits, f"heads[{exit}]")
        seen = after if through else seen
        if self.gradient_equilibrium and left > 1:
            after = gradient_rescale(after, left - 1 if through else (left - 1) / left)
        return logits, after, seen


class Cascade(_Exits):
    """Models of growing cost: each runs on the samples that the models before it did not settle.

    ``logits = models[i](x)`` for i = 0 … M - 1, on the samples that are left; the last model takes the rest.
    Training mode, ``all_exits``, ``max_fraction``, the result and the reads of a GPU are as in :class:`EarlyExit`.

    Args:
        models: M modules, x -> logits ``[n, ...]`` of the same samples' shape, or, in eval mode,
            :class:`ExitOutput` (an EarlyExit in a cascade; ``exits`` then counts models).
        criterion: see :class:`EarlyExit`; its state is x. :class:`Margin` (Big/little), :class:`LearnedExit`
            or :class:`IDKClass` (IDK cascades).
        max_fraction: the largest share of the batch that may go on to the next model.
        shared: which parts of x all samples share, see :class:`EarlyExit`. What a model writes into x in place is its own.

    Shape:
        - x: a tensor ``[N, ...]`` or a state as :class:`EarlyExit` has it; it is compacted where samples leave.
        - output: :class:`ExitOutput`.

    Raises:
        TypeError, ValueError: an argument or a verdict that does not fit, with what was expected and what
            came.

    Papers: Park et al., Big/little deep neural network (CODES+ISSS 2015); Bolukbasi et al., Adaptive neural
    networks for efficient inference (ICML 2017); Wang et al., IDK cascades (UAI 2018).
    """

    _maker = "models"

    def __init__(
        self,
        models: Iterable[nn.Module],
        criterion,
        max_fraction: float | Sequence[float] | None = None,
        *,
        shared: Shared | None = None,
    ):
        super().__init__(criterion, max_fraction, shared)
        self.models = module_list("models", models)
        self._set_up(len(self.models))

    def _step(self, exit: int, state: Any) -> tuple[Tensor, Any, Any]:
        logits = apart(self.models[exit], state)
        logits = logits.logits if isinstance(logits, ExitOutput) else logits
        _check_logits(logits, f"models[{exit}]")
        return logits, state, state


def at_most(keep: Tensor, confidence: Tensor, most: int) -> Tensor:
    """bool ``[n]``: of the kept the ``most`` least confident (NaN is the least), of equals the first.

    Reads nothing back.
    """
    order = torch.where(confidence.isnan(), -torch.inf, confidence).argsort(stable=True)
    kept = keep[order]
    return torch.zeros_like(keep).scatter(0, order, kept & (kept.cumsum(0) <= most))


def module_list(name: str, modules: Iterable[nn.Module]) -> nn.ModuleList:
    made = nn.ModuleList(modules)  # raises TypeError where one is no module
    if len(made) == 0:
        raise ValueError(f"{name}: expected one module or more, got none")
    return made


def _confidence(confidence: Tensor | None, logits: Tensor) -> Tensor:
    return max_probability(logits) if confidence is None else confidence


def _fractions(max_fraction, num_exits: int) -> list[float]:
    """One for each exit but the last."""
    each = max_fraction if isinstance(max_fraction, (list, tuple)) else [max_fraction] * (num_exits - 1)
    each = [1.0 if fraction is None else fraction for fraction in each]
    if len(each) < num_exits - 1 or not all(map(is_share, each)):
        raise ValueError(
            f"max_fraction: expected a number in [0, 1], or one for each of {num_exits} exits but the last, "
            f"got {max_fraction!r}"
        )
    return each


def _in_slots(rows: Tensor, index: Tensor) -> Tensor:
    """``out[index[i]] = rows[i]``; ``index`` has every position once."""
    out = rows.new_empty(rows.shape)
    if rows.dim() == 4:
        out = torch.empty_like(rows, memory_format=memory_format_of(rows))
    return out.index_copy_(0, index, rows)


def _check_logits(logits: Tensor, name: str) -> None:
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        what = "shape ()" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name}: expected logits [n, ...], got {what}")
