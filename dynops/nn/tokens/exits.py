"""TokenExit: each token of a sequence leaves at its own depth, and remains as a key for the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from ...ops import gather_samples, scatter_samples
from ...plans import SamplePlan, most_of
from ..apart import apart
from ..from_dense import FromDense
from ..samples.criteria import Criterion, decide, max_probability
from ..samples.exits import _fractions, at_most, module_list


class TokenExitOutput(NamedTuple):
    """``logits`` ``[B, T, ...]``: of each token those of the exit where it left, zero at padding. ``hidden``
    ``[B, T, C]``: its state there. ``exits``: int64 ``[B, T]``, that exit, from 0; -1 at padding.
    """

    logits: Tensor
    hidden: Tensor
    exits: Tensor


class TokenExit(nn.Module):
    """A chain of stages with an exit after each, for every token by itself, with its state copied up.

    ``rows = stages[e](hidden, plan); logits = heads[e](rows)``: a stage computes the tokens of the plan,
    which have not left, and may read the states of all. A token that has left keeps the state of its last
    stage. Which tokens go on is read back once at each exit on a GPU; where none leaves nothing is compacted,
    and where all have left the later stages do not run.

    In training mode, or with ``all_exits=True``, every exit sees every token (aligned training). With
    ``all_exits=False`` tokens leave in training too, with gradients (mixed training, with random ``exits``).

    Args:
        stages: E modules ``(hidden [B, T, C], plan, **context) -> rows [P, C]``, plan a
            :class:`~dynops.SamplePlan` of the B·T tokens with P in it: :class:`TokenEncoderLayer`,
            :class:`TokenSequential`, or others.
        heads: E modules, rows ``[P, C]`` -> logits ``[P, ...]``.
        criterion: as in :class:`EarlyExit`, over tokens in place of samples; its state is the rows. None:
            ``exits`` is passed in each call.
        max_fraction: the largest share of the tokens (without padding) that may go on past an exit, a number
            or one for each exit; the least confident go on.

    Shape:
        - hidden: ``[B, T, C]``.
        - padding_mask: bool ``[B, T]``, true at padding, which leaves before the first stage; None: no
          padding.
        - exits: int ``[B, T]``, the exit of each token, decided before (a depth that was predicted, or drawn
          for training); the criterion is then not asked. A number past the last exit is the last one.
        - context: keyword arguments that every stage gets; so is ``padding_mask`` where there is one.
        - output: :class:`TokenExitOutput`; with all exits a list of E logits ``[B, T, ...]``.

    Stages and heads are functions of values, as in :class:`EarlyExit`. Logits have the dtype of the first exit's;
    ``hidden`` has the wider one of the input's and the first stage's (under autocast).

    ``torch.compile`` of a surrounding model breaks its graph here, unless all exits are asked for.
    ``state_dict`` keys: ``stages.e.…``, ``heads.e.…``, ``criterion.…``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Elbayad et al., Depth-adaptive transformer (ICLR 2020); Dehghani et al., Universal transformers
    (ICLR 2019).
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        criterion=None,
        max_fraction: float | Sequence[float] | None = None,
    ):
        super().__init__()
        self.stages, self.heads = module_list("stages", stages), module_list("heads", heads)
        self.num_exits = len(self.stages)
        if len(self.heads) != self.num_exits:
            raise ValueError(
                f"heads: expected one for each of {self.num_exits} stages, got {len(self.heads)}"
            )
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion: expected a Criterion or a callable, got {type(criterion).__name__}")
        if isinstance(criterion, Criterion):
            criterion.check_exits(self.num_exits)
        self.criterion = criterion
        self.max_fraction = max_fraction
        _fractions(max_fraction, self.num_exits)

    def forward(
        self,
        hidden: Tensor,
        padding_mask: Tensor | None = None,
        exits: Tensor | None = None,
        all_exits: bool | None = None,
        **context: Any,
    ) -> TokenExitOutput | list[Tensor]:
        _check_hidden(hidden)
        for name, value in (("padding_mask", padding_mask), ("exits", exits)):
            _check_tokens(value, name, hidden)
        if padding_mask is not None:
            context["padding_mask"] = padding_mask
        if self.training if all_exits is None else all_exits:
            return self._every(hidden, context)
        if self.criterion is None and exits is None:
            raise ValueError("exits: expected [B, T], as the layer has no criterion, got None")
        modes.refuse_fixed_sizes(hidden, "TokenExit: without all_exits=True")
        if torch.compiler.is_compiling():
            return modes.outside_graph(self._compacted, hidden, exits, context)
        return self._compacted(hidden, exits, context)

    def _every(self, hidden: Tensor, context: dict) -> list[Tensor]:
        shape, logits = hidden.shape, []
        plan = SamplePlan.full(shape[0] * shape[1], hidden.device)
        for exit, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            rows = apart(stage, hidden, plan, options=context)
            out = apart(head, rows).unflatten(0, shape[:2])
            hidden = _copied_up(rows, plan, hidden, exit)
            if "padding_mask" in context:
                padding = context["padding_mask"]
                out = out.masked_fill(padding.view(*shape[:2], *[1] * (out.dim() - 2)), 0)
            logits.append(out)
        return logits

    def _compacted(self, hidden: Tensor, exits: Tensor | None, context: dict) -> TokenExitOutput:
        shape = hidden.shape
        padding = context.get("padding_mask")
        plan = (
            SamplePlan.full(shape[0] * shape[1], hidden.device)
            if padding is None
            else SamplePlan.from_mask(~padding.reshape(-1))
        )
        tokens, memory, gone, like = plan.num_rows, None, [], None
        for exit, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            rows = apart(stage, hidden, plan, options=context)
            _check_rows(rows, plan, shape[2], f"stages[{exit}]")
            logits = apart(head, rows)
            like = logits if exit == 0 else like
            _check_alike(logits, like, exit)
            logits = logits.to(like.dtype)
            hidden = _copied_up(rows, plan, hidden, exit)
            if exit == self.num_exits - 1:
                gone.append((logits, plan, exit))
                break
            leave, memory = self._leave(logits, exit, rows, memory, exits, plan, tokens)
            staying = SamplePlan.from_mask(~leave)
            if staying.is_empty:
                gone.append((logits, plan, exit))
                break
            if staying.is_full:
                continue
            leaving = SamplePlan.from_mask(leave, staying.batch - staying.num_rows)  # nothing read back
            leaving = SamplePlan(leaving.index, staying.batch)
            gone.append((gather_samples(logits, leaving), plan.shrink(leaving), exit))
            memory, plan = gather_samples(memory, staying), plan.shrink(staying)
        return _collected(gone, hidden)

    @torch.no_grad()
    def _leave(self, logits, exit, rows, memory, exits, plan: SamplePlan, tokens: int) -> tuple[Tensor, Any]:
        confidence = None
        if exits is not None:
            leave = gather_samples(exits.reshape(-1), plan) <= exit
        else:
            leave, confidence, memory = decide(self.criterion, logits, exit, rows, memory)
        most = most_of(_fractions(self.max_fraction, self.num_exits)[exit], tokens)
        if leave.shape[0] > most:
            confidence = max_probability(logits) if confidence is None else confidence
            leave = ~at_most(~leave, confidence, most)
        return leave, memory

    def extra_repr(self) -> str:
        return "" if self.max_fraction is None else f"max_fraction={self.max_fraction}"


class TokenSequential(nn.Sequential):
    """``nn.Sequential`` of modules that treat each token by itself, as a stage of :class:`TokenExit`.

    Shape:
        - hidden: ``[B, T, C]``.
        - plan: a :class:`~dynops.SamplePlan` of the B·T tokens; None: the layer is ``nn.Sequential``.
        - context: whatever the other stages need; nothing of it is used.
        - output: ``[P, C]``, the plan's tokens.
    """

    def forward(self, hidden: Tensor, plan: SamplePlan | None = None, **context: Any) -> Tensor:
        return super().forward(hidden if plan is None else _rows(hidden, plan))


class TokenEncoderLayer(FromDense, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` on the tokens of a plan alone, as a stage of :class:`TokenExit`.

    Queries, attention and MLP are those of the plan's tokens; keys and values are projected from all tokens
    of the sequences that have one in it. On these tokens the result is the dense layer's, but for rounding.
    Constructor (with ``batch_first=True``), parameters and ``state_dict`` are those of
    ``nn.TransformerEncoderLayer``; so is the result without a plan.

    Shape:
        - src: ``[B, T, C]``.
        - plan: a :class:`~dynops.SamplePlan` of the B·T tokens, compact; None: the dense layer.
        - padding_mask: bool ``[B, T]``, true at keys that nobody reads.
        - src_mask: ``[T, T]``, bool (true: may not attend) or floating (added), for example a causal one.
        - output: ``[P, C]``, the plan's tokens; without a plan ``[B, T, C]``.

    The numbers of active tokens of the sequences are read back once on a GPU, unless the plan is full.
    Queries are padded to the most that a sequence has.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    _dense = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        plan: SamplePlan | None = None,
        *,
        padding_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
    ) -> Tensor:
        if plan is None:
            return super().forward(src, src_mask, padding_mask)
        if not self.self_attn.batch_first:
            raise ValueError("batch_first: expected True, as hidden states are [B, T, C]")
        _check_hidden(src)
        _check_tokens(padding_mask, "padding_mask", src)
        if src_mask is not None and tuple(src_mask.shape) != (src.shape[1], src.shape[1]):
            raise ValueError(f"src_mask: expected [T, T] with T {src.shape[1]}, got {tuple(src_mask.shape)}")
        rows = _rows(src, plan)
        if rows.shape[0] == 0:
            return rows
        if self.norm_first:
            rows = rows + self._attend(self.norm1(rows), src, plan, padding_mask, src_mask)
            return rows + self._ff_block(self.norm2(rows))
        rows = self.norm1(rows + self._attend(rows, src, plan, padding_mask, src_mask))
        return self.norm2(rows + self._ff_block(rows))

    def _attend(self, queries: Tensor, src: Tensor, plan: SamplePlan, padding_mask, src_mask) -> Tensor:
        """Self-attention of the rows ``[P, C]``, after its output projection and dropout."""
        attention, slots = self.self_attn, _Slots(plan, *src.shape[:2])
        src, padding_mask = slots.live_part(src), slots.live_part(padding_mask)
        if self.norm_first:
            src = self.norm1(src)
        width, heads = src.shape[2], attention.num_heads
        weight = attention.in_proj_weight.split([width, 2 * width])
        bias = (None, None)
        if attention.in_proj_bias is not None:
            bias = attention.in_proj_bias.split([width, 2 * width])
        query = slots.padded(F.linear(queries, weight[0], bias[0])).unflatten(2, (heads, -1)).transpose(1, 2)
        key, value = F.linear(src, weight[1], bias[1]).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        mask = _attention_mask(slots, padding_mask, src_mask, query.dtype)
        dropout = attention.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.dropout1(attention.out_proj(slots.rows(out.transpose(1, 2).flatten(2))))


class _Slots:
    """Places a plan's tokens in ``[L, M]``: L sequences that have one, M the most that a sequence has."""

    def __init__(self, plan: SamplePlan, batch: int, tokens: int):
        self.shape, self.plan, self.live = (batch, tokens), None, None
        self.position = None  # [P] in the sequence; None: all, in order
        if plan.is_full:
            return
        index = plan.index.long()
        sequence, self.position = index // tokens, index % tokens
        counts = torch.zeros(batch, dtype=torch.int64, device=index.device)
        counts = counts.index_add(0, sequence, torch.ones_like(sequence))
        before = counts.cumsum(0) - counts
        rank = torch.arange(len(index), device=index.device) - before[sequence]
        on_host = counts.cpu()
        live = (on_host > 0).nonzero().flatten()
        if len(live) < batch:
            self.live = SamplePlan(live.int().to(index.device), batch)
            sequence = (counts > 0).cumsum(0).sub(1)[sequence]
        self.shape = (len(live), int(on_host.max()))
        slot = sequence * self.shape[1] + rank
        if len(index) < self.shape[0] * self.shape[1]:  # else they are in their slots already
            self.plan = SamplePlan(slot.int(), self.shape[0] * self.shape[1])

    def live_part(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.live is None else gather_samples(x, self.live)

    def padded(self, rows: Tensor) -> Tensor:
        """``[P, F]`` to ``[L, M, F]``."""
        return (rows if self.plan is None else scatter_samples(rows, self.plan)).unflatten(0, self.shape)

    def rows(self, padded: Tensor) -> Tensor:
        """``[L, M, F]`` to ``[P, F]``."""
        flat = padded.flatten(0, 1)
        return flat if self.plan is None else gather_samples(flat, self.plan)


def _attention_mask(slots: _Slots, padding_mask, src_mask, dtype: torch.dtype) -> Tensor | None:
    """Makes the mask of ``scaled_dot_product_attention`` (bool: true = attend), ``[L or 1, 1, M or 1, T]``."""
    allowed = None if padding_mask is None else ~padding_mask[:, None, None, :]
    if src_mask is None:
        return allowed
    own = src_mask[None] if slots.position is None else slots.padded(src_mask[slots.position])
    own = own[:, None]  # [L or 1, 1, M, T]; in slots without a token zeros: they may attend
    if own.dtype == torch.bool:
        return ~own if allowed is None else ~own & allowed
    own = own.to(dtype)
    return own if allowed is None else own.masked_fill(~allowed, -math.inf)


def _rows(hidden: Tensor, plan: SamplePlan) -> Tensor:
    """``[P, C]``: the plan's tokens of ``[B, T, C]``."""
    flat = hidden.flatten(0, 1)
    return flat if plan.is_full else gather_samples(flat, plan)


def _copied_up(rows: Tensor, plan: SamplePlan, hidden: Tensor, exit: int) -> Tensor:
    """``[B, T, C]``: the plan's tokens as they are now, the others as they were.

    Autocast may have the rows narrower; the dtype is settled at the first exit, which every token reaches.
    """
    dtype = torch.promote_types(rows.dtype, hidden.dtype) if exit == 0 else hidden.dtype
    if plan.is_full:
        return rows.reshape(hidden.shape).to(dtype)
    return scatter_samples(rows.to(dtype), plan, hidden.flatten(0, 1).to(dtype)).view(hidden.shape)


def _collected(gone: list[tuple[Tensor, SamplePlan, int]], hidden: Tensor) -> TokenExitOutput:
    """Each token's logits and exit in its place, from those that left together."""
    shape = hidden.shape[:2]
    rows = torch.cat([logits for logits, _, _ in gone])
    index = torch.cat([plan.index for _, plan, _ in gone]).long()
    exits = torch.cat([torch.full_like(plan.index, exit, dtype=torch.int64) for _, plan, exit in gone])
    logits = rows.new_zeros(shape.numel(), *rows.shape[1:]).index_copy(0, index, rows)
    left_at = exits.new_full((shape.numel(),), -1).index_copy(0, index, exits)
    return TokenExitOutput(logits.unflatten(0, shape), hidden, left_at.view(shape))


def _check_hidden(hidden: Tensor) -> None:
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        what = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden: expected [B, T, C], got {what}")


def _check_tokens(value: Tensor | None, name: str, hidden: Tensor) -> None:
    """True if ``value`` is None or has one number for each token: bool for a padding mask, else int."""
    if value is None:
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(hidden.shape[:2]):
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected [B, T] {tuple(hidden.shape[:2])}, got {what}")
    if (name == "padding_mask") != (value.dtype == torch.bool) or value.is_floating_point():
        expected = "bool" if name == "padding_mask" else "an int dtype"
        raise TypeError(f"{name}: expected {expected}, got {value.dtype}")


def _check_alike(logits: Tensor, like: Tensor, exit: int) -> None:
    if logits.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"heads[{exit}]: expected logits [P, ...] with {tuple(like.shape[1:])} for each token, as heads[0] has "
            f"them, got {tuple(logits.shape[1:])}"
        )


def _check_rows(rows: Tensor, plan: SamplePlan, width: int, name: str) -> None:
    if not isinstance(rows, Tensor) or tuple(rows.shape) != (plan.num_rows, width):
        what = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{name}: expected rows [{plan.num_rows}, {width}], got {what}")
