"""JumpReader: a recurrent layer that reads a few steps, jumps, and stops when it knows enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...geometry import is_int
from .cells import Packing, check_lengths
from .frames import encode_rows

# ---------------------------------------------------------------------------------------- policies


class Jump(NamedTuple):
    """A policy's decision for n sequences.

    ``action``: int64 ``[n]``, what was chosen. ``start``: int64 ``[n]``, the next step to read. ``stop``:
    bool ``[n]``. ``log_prob`` and ``entropy``: ``[n]``, float32 (float64 for float64 states).
    """

    action: Tensor
    start: Tensor
    stop: Tensor
    log_prob: Tensor
    entropy: Tensor


class JumpPolicy(nn.Module):
    """A softmax over stopping and jumps; sampled in training, the most likely action in eval mode.

    Action 0 stops. Action k in 1 ... ``max_jump`` goes on k steps after the last one that was read, so that 1
    reads on without a gap. Action ``max_jump + k``, k in 1 ... ``max_back``, goes back by k steps from the
    one that would be read next, at most to the first.

    Args:
        hidden: H.
        max_jump: K, at least 1. With 1 the policy decides when to stop reading (ReasoNet, LARM, Jumper).
        max_back: the most steps back (LSTM-Shuttle; re-reading); 0: forward only.

    Logits with a NaN stop, with log-probability and entropy 0. Parameters: ``linear.weight`` and
    ``linear.bias``.

    Papers: Yu et al., Learning to Skim Text (ACL 2017); Fu and Ma, Speed Reading: Learning to Read
    ForBackward via Shuttle (EMNLP 2018); Fan et al., Watching a Small Portion Could Be as Good as Watching
    All (IJCAI 2018).
    """

    def __init__(self, hidden: int, max_jump: int, max_back: int = 0, *, device=None, dtype=None):
        super().__init__()
        for name, value, least in (("max_jump", max_jump, 1), ("max_back", max_back, 0)):
            if not is_int(value, least):
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        self.max_jump, self.max_back = max_jump, max_back
        self.linear = nn.Linear(hidden, 1 + max_jump + max_back, device=device, dtype=dtype)

    def forward(self, h: Tensor, position: Tensor, length: Tensor) -> Jump:
        """``h``: ``[n, H]``; int64 ``[n]``: ``position``, the step after the last one read, and
        ``length``."""
        logits = self.linear(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lost = logits.isnan().any(1)
        log_probs = F.log_softmax(logits.masked_fill(lost[:, None], 0), 1)
        if self.training:
            action = torch.multinomial(log_probs.detach().exp(), 1).squeeze(1) if len(h) else position
        else:
            action = log_probs.argmax(1) if len(h) else position
        action = action.masked_fill(lost, 0)
        chosen = log_probs.gather(1, action[:, None]).squeeze(1)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        start = torch.where(
            action <= self.max_jump, position + action - 1, (position - action + self.max_jump).clamp(min=0)
        )
        return Jump(action, start, action == 0, chosen.masked_fill(lost, 0), entropy.masked_fill(lost, 0))


class LocationPolicy(nn.Module):
    """Chooses where in [0, 1] of the sequence to look next: ``sigmoid(linear(h))``, with Gaussian noise in training.

    Args:
        hidden: H.
        std: standard deviation of the noise, larger than 0 (AdaFrame trains with a fixed one).
        stop: a callable ``h [n, H] -> bool [n]``, for example a predicted utility that no longer grows; None:
            never stops before ``max_jumps``.

    The action is the step, ``round(place * (length - 1))``; a place that is NaN stops. Parameters:
    ``linear.weight`` and ``linear.bias``.

    Papers: Wu et al., AdaFrame (CVPR 2019); Yeung et al., End-to-end Learning of Action Detection from Frame
    Glimpses in Videos (CVPR 2016).
    """

    def __init__(
        self,
        hidden: int,
        std: float = 0.1,
        stop: Callable[[Tensor], Tensor] | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 < std < math.inf:
            raise ValueError(f"std: expected a number > 0, got {std!r}")
        self.std, self.stop = std, stop
        self.linear = nn.Linear(hidden, 1, device=device, dtype=dtype)

    def forward(self, h: Tensor, position: Tensor, length: Tensor) -> Jump:
        mean = self.linear(h).squeeze(1)
        mean = torch.sigmoid(mean.to(torch.promote_types(mean.dtype, torch.float32)))
        place = mean.detach()
        if self.training:
            place = place + self.std * torch.randn_like(place)
        log_prob = -((place - mean) ** 2) / (2 * self.std**2) - math.log(self.std * math.sqrt(2 * math.pi))
        entropy = torch.full_like(log_prob, 0.5 + math.log(self.std * math.sqrt(2 * math.pi)))
        lost = place.isnan()
        stop = lost if self.stop is None else lost | self.stop(h)
        step = torch.round(place.masked_fill(lost, 0).clamp(0, 1) * (length - 1)).long()
        return Jump(step, step, stop, log_prob.masked_fill(lost, 0), entropy.masked_fill(lost, 0))


# ------------------------------------------------------------------------------------------ reader


class JumpOutput(NamedTuple):
    """The result of :class:`JumpReader`; J is ``max_jumps``.

    ``output``: ``[B, H]``, the top layer's h after the last step that was read. ``state``: as the recurrent
    layer has it, ``[L, B, H]``. ``actions``: int64 ``[B, J]``, -1 where none was taken. ``log_prob`` and
    ``entropy``: ``[B, J]``, 0 there. ``features``: ``[B, J, H]``, the h that each action was taken from, 0
    there, for a baseline. ``starts``: int64 ``[B, J + 1]``, where each run of steps began, -1: none.
    ``read``: int64 ``[B]``, steps that were read.
    """

    output: Tensor
    state: Any
    actions: Tensor
    log_prob: Tensor
    entropy: Tensor
    features: Tensor
    starts: Tensor
    read: Tensor


class JumpReader(nn.Module):
    """Reads some steps, asks the policy where to go on, and so on until it stops: LSTM-Jump.

    A sequence ends when its policy stops, when a jump leads past its end, or with the steps read after
    ``max_jumps`` jumps. Each run of steps is one call of the recurrent layer on a packed sequence of those
    that still read; encoder and layer see no other step.

    REINFORCE, with a reward ``[B]`` and ``baseline [B, J]`` from ``features.detach()``::

        loss = task - ((reward[:, None] - baseline.detach()) * out.log_prob).sum(1).mean()

    Args:
        rnn: ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` of one direction.
        policy: a module ``(h [n, H], position [n], length [n]) -> Jump``: :class:`JumpPolicy`,
            :class:`LocationPolicy` or one's own. A start outside the sequence ends it.
        read: R, the steps of a run.
        max_jumps: J, at least 0.
        encoder: a module ``[P, ...] -> [P, I]`` that runs on the steps that are read, for example an
            ``nn.Embedding`` or a convolutional network of frames; None: ``x`` has the layer's features.

    Shape:
        - x: ``[B, T, ...]``, batch first whatever ``rnn`` has.
        - state: None (zeros) or what ``rnn`` takes.
        - lengths: integers ``[B]``; None: T.
        - output: :class:`JumpOutput`. ``x``, state, layer and encoder get their gradients through what was
          read, the policy through ``log_prob`` and ``entropy``.

    On a GPU each run reads the number of steps of each sequence back to the host. ``torch.compile`` of a
    surrounding model breaks its graph here.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Yu et al., Learning to Skim Text (ACL 2017); Fu and Ma, LSTM-Shuttle (EMNLP 2018); Wu et al.,
    AdaFrame (CVPR 2019); Shen et al., ReasoNet (KDD 2017).
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        policy: nn.Module,
        *,
        read: int = 1,
        max_jumps: int,
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(rnn, (nn.LSTM, nn.GRU, nn.RNN)):
            raise TypeError(f"rnn: expected nn.LSTM, nn.GRU or nn.RNN, got {type(rnn).__name__}")
        if rnn.bidirectional:
            raise ValueError("rnn: expected one direction, got bidirectional=True")
        for name, value, least in (("read", read, 1), ("max_jumps", max_jumps, 0)):
            if not is_int(value, least):
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        self.rnn, self.policy, self.encoder = rnn, policy, encoder
        self.read, self.max_jumps = read, max_jumps

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | list[int] | None = None) -> JumpOutput:
        if not isinstance(x, Tensor) or x.dim() < 2:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a tensor [B, T, ...], got {what}")
        if self.encoder is None and (x.dim() != 3 or x.shape[2] != self.rnn.input_size):
            raise ValueError(f"x: expected [B, T, {self.rnn.input_size}], got shape {tuple(x.shape)}")
        batch, steps = x.shape[:2]
        lengths = check_lengths(lengths, batch, steps, x.device)
        if lengths is None:
            lengths = torch.full((batch,), steps, device=x.device)
        return self._read(x, self._first_state(state, x), lengths)

    def _first_state(self, state: Any, x: Tensor) -> tuple[Tensor, ...]:
        rnn, batch = self.rnn, x.shape[0]
        sizes = [rnn.proj_size or rnn.hidden_size] + [rnn.hidden_size] * (rnn.mode == "LSTM")
        if state is None:
            weight = rnn.weight_ih_l0
            return tuple(weight.new_zeros(rnn.num_layers, batch, size) for size in sizes)
        parts = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        shapes = [(rnn.num_layers, batch, size) for size in sizes]
        if [tuple(getattr(part, "shape", ())) for part in parts] != shapes:
            found = [tuple(getattr(part, "shape", ())) for part in parts]
            raise ValueError(f"state: expected shapes {shapes}, got {found}")
        return parts

    @torch._disable_dynamo
    def _read(self, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor) -> JumpOutput:
        trail = _Trail(x.shape[0], self.max_jumps, x.device)
        start, index = torch.zeros_like(lengths), torch.arange(len(lengths), device=x.device)
        counts = lengths.clamp(max=self.read)  # of the next run; 0: the sequence has ended
        for jump in range(self.max_jumps + 1):
            packing = Packing.of(counts.cpu(), x.device)
            trail.leave(state, index, counts == 0, len(packing.order))
            if not len(packing.order):
                break
            index, start, counts = (t.index_select(0, packing.order) for t in (index, start, counts))
            state = tuple(s.index_select(1, packing.order) for s in state)
            trail.run(jump, index, start, counts)
            state = self._run(x, index, start, packing, state)
            if jump == self.max_jumps:
                trail.leave(state, index, torch.ones_like(index, dtype=torch.bool), 0)
                break
            h, length = state[0][-1], lengths.index_select(0, index)
            decision = self.policy(h, start + counts, length)
            trail.jump(jump, index, decision, h)
            start = decision.start
            goes_on = ~decision.stop & (start >= 0) & (start < length)
            counts = torch.where(goes_on, (length - start).clamp(max=self.read), 0)
        return trail.output(self.rnn.mode == "LSTM", state)

    def _run(
        self, x: Tensor, index: Tensor, start: Tensor, packing: Packing, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        at = index[packing.sequence] * x.shape[1] + start[packing.sequence] + packing.step
        rows = x.flatten(0, 1).index_select(0, at)
        rows = rows if self.encoder is None else encode_rows(self.encoder, rows)
        hidden = state if self.rnn.mode == "LSTM" else state[0]
        _, hidden = self.rnn(PackedSequence(rows, packing.batch_sizes), hidden)
        return hidden if isinstance(hidden, tuple) else (hidden,)

    def extra_repr(self) -> str:
        return f"read={self.read}, max_jumps={self.max_jumps}"


class _Trail:
    """Collects what a reading leaves behind, row by row, and orders it by sequence at the end."""

    def __init__(self, batch: int, jumps: int, device: torch.device):
        self.batch, self.jumps = batch, jumps
        self.starts = torch.full((batch, jumps + 1), -1, device=device)
        self.read = torch.zeros(batch, dtype=torch.int64, device=device)
        self.actions = torch.full((batch, jumps), -1, device=device)
        self.slots, self.log_prob, self.entropy, self.features = [], [], [], []
        self.left, self.states = [], []

    def leave(self, state: tuple[Tensor, ...], index: Tensor, ends: Tensor, remaining: int) -> None:
        """Keeps the states of sequences that end."""
        if remaining == len(index):
            return
        rows = ends.nonzero().squeeze(1)
        self.left.append(index.index_select(0, rows))
        self.states.append(tuple(s.index_select(1, rows) for s in state))

    def run(self, jump: int, index: Tensor, start: Tensor, counts: Tensor) -> None:
        self.starts[index, jump] = start
        self.read[index] += counts

    def jump(self, jump: int, index: Tensor, decision: Jump, h: Tensor) -> None:
        self.actions[index, jump] = decision.action
        self.slots.append(index * self.jumps + jump)
        self.log_prob.append(decision.log_prob)
        self.entropy.append(decision.entropy)
        self.features.append(h)

    def output(self, is_lstm: bool, state: tuple[Tensor, ...]) -> JumpOutput:
        if self.left:
            order = torch.cat(self.left).argsort()
            whole = [torch.cat(parts, 1) for parts in zip(*self.states, strict=True)]
            state = tuple(s.index_select(1, order) for s in whole)
        h = state[0][-1]
        logs = h.new_zeros(0, dtype=torch.promote_types(h.dtype, torch.float32))
        placed = [
            self._place(values, empty)
            for values, empty in (
                (self.log_prob, logs),
                (self.entropy, logs),
                (self.features, h.new_zeros(0, h.shape[1])),
            )
        ]
        return JumpOutput(h, state if is_lstm else state[0], self.actions, *placed, self.starts, self.read)

    def _place(self, values: list[Tensor], empty: Tensor) -> Tensor:
        """``[B, J, ...]``, zero where no action was taken."""
        rows = torch.cat(values) if values else empty
        out = rows.new_zeros(self.batch * self.jumps, *rows.shape[1:])
        if values:
            out = out.index_copy(0, torch.cat(self.slots), rows)
        return out.view(self.batch, self.jumps, *rows.shape[1:])
