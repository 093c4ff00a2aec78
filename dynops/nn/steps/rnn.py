"""SkipRNN: a recurrent layer that copies its state past some steps, and computes only the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from . import cells as step_cells
from .cells import Packing, State, compacted_cell, run_cells, run_packed, run_scaled

THRESHOLD = 0.5  # above it a probability rounds to 1


class SkipState(NamedTuple):
    """The state that a :class:`SkipRNN` carries from one call to the next.

    ``hidden``: as ``nn.LSTM`` has it, ``(h, c)``, or ``h`` of the other cells, ``[L, B, H]``.
    ``probability``: float64 ``[B]``, the accumulated update probability of the next step.
    """

    hidden: Any
    probability: Tensor


class SkipOutput(NamedTuple):
    """``output`` ``[B, T, H]``, ``state`` (:class:`SkipState`) and ``updates`` ``[B, T]``, 1 where the state
    was computed."""

    output: Tensor
    state: SkipState
    updates: Tensor


class SkipRNN(nn.RNNBase):
    """Takes the place of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``; where a sequence skips a step it copies its
    state.

    With S the cell, s the state, u the decision and p the accumulated probability of an update (Skip RNN)::

        u_t     = p_t > 0.5                                   backward: the identity (straight-through)
        s_t     = u_t * S(s_{t-1}, x_t) + (1 - u_t) * s_{t-1}
        d_t     = sigmoid(gate(s_t))
        p_{t+1} = u_t * d_t + (1 - u_t) * (p_t + min(d_t, 1 - p_t))              p_1 = 1

    Only what updates is computed. Without gradients each sequence goes from update to update at its own pace,
    as d_t says when the next one is: as many steps as the longest chain of updates, all sequences side by
    side. With gradients every step gathers those sequences that update. Decisions that the caller gives for
    all steps need neither: the chosen steps run as one packed sequence through PyTorch's recurrent layer.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first: as in ``nn.LSTM``. All layers update together,
            and the gate reads the top one (the authors' multi-layer form).
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU". The gate reads c of an LSTM (as the authors' code
            does), else h.
        dense: computes every step of every sequence and multiplies by u. The output is the same; the gate's
            gradient is exact for every step. Without it ``S - s`` of a skipped step is not known: a skipped u
            gets no gradient through the state, only through p and losses on ``updates``; all others are
            exact. The paper trains dense. In the dense form a NaN of a skipped step spreads.
            An attribute: it may be changed at any time.

    Shape (with ``batch_first``; else B and T change places in all but the states):
        - x: ``[B, T, I]``.
        - state: None (zeros, and every sequence reads its first step), what ``nn.LSTM`` takes, or a
          :class:`SkipState`.
        - updates: None: the layer's own gate. Or ``[B, T]``, bool, integer or floating: nonzero = update; a
          float is u itself, and gets a gradient. Or a callable ``(x_t [B, I], h [B, H]) -> u_t [B]`` that
          decides at each step, for example an agent (Structural-Jump-LSTM) or a predictor of the change
          (skipping without retraining).
        - lengths: integers ``[B]``, the steps of each sequence; None: T. Beyond them nothing is computed,
          output and updates are 0.
        - output: :class:`SkipOutput`. Add ``weight * updates.mean()`` to the loss for the paper's budget. The
          state is each sequence's after its last step; after given decisions its probability is 1.

    The parameters have the names of ``nn.LSTM``; ``gate.weight`` and ``gate.bias`` (which starts at 1) are
    new. A gate that is NaN never updates; a NaN in given decisions raises. With given decisions the gate gets
    no gradient. A level of a hierarchy (HM-RNN without its flush, Focused Hierarchical RNN) is another layer
    with the lower level's boundaries as ``updates``.

    On a GPU the number of sequences is read back at each step (without gradients at each update; given
    decisions: twice a call); ``dense=True`` reads nothing back. ``torch.compile`` of a surrounding model
    breaks its graph here unless dense.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Campos et al., Skip RNN (ICLR 2018); Hansen et al., Structural-Jump-LSTM (ICLR 2019); Tao et al.,
    Skipping RNN State Updates without Retraining the Original Model (SenSys-ML 2019).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        mode: str = "LSTM",
        dense: bool = False,
        device=None,
        dtype=None,
    ):
        if mode not in step_cells.MODES:
            raise ValueError(f"mode: expected one of {step_cells.MODES}, got {mode!r}")
        factory = {"device": device, "dtype": dtype}
        super().__init__(mode, input_size, hidden_size, num_layers, bias, batch_first, **factory)
        self.gate = nn.Linear(hidden_size, 1, **factory)
        self.dense = dense
        nn.init.ones_(self.gate.bias)  # sigmoid(1) > 0.5: training starts with every step read

    @classmethod
    def from_dense(cls, layer: nn.Module, *, batch_first: bool | None = None, dense: bool = False) -> SkipRNN:
        """The same parameters, shared, and a new gate.

        Args:
            layer: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` (one direction, no dropout, no projection),
                ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``.
            batch_first: None: as the layer has it, False for a cell.
            dense: as above.
        """
        mode, layers, found = step_cells.read_layer(layer)
        sizes = (layer.input_size, layer.hidden_size, layers, layer.bias)
        if batch_first is None:
            batch_first = getattr(layer, "batch_first", False)
        new = cls(*sizes, batch_first, mode=mode, dense=dense, device="meta")
        for name, value in found.items():
            setattr(new, name, value)
        weight = new.weight_ih_l0
        new.gate = nn.Linear(layer.hidden_size, 1, device=weight.device, dtype=weight.dtype)
        nn.init.ones_(new.gate.bias)
        return new.train(layer.training)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gate" in self._modules:  # not yet when nn.RNNBase calls it
            nn.init.ones_(self.gate.bias)

    def forward(
        self,
        x: Tensor,
        state: Tensor | tuple | SkipState | None = None,
        updates: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        lengths: Tensor | list[int] | None = None,
    ) -> SkipOutput:
        x = step_cells.check_steps(x, self.input_size, self.batch_first)
        dtype = step_cells.computing_dtype(x)
        with modes.without_autocast(x):
            run = self._prepare(x.to(dtype), state, lengths)
            if isinstance(updates, Tensor) or not (updates is None or callable(updates)):
                shape = tuple(x.shape[:2])
                updates = step_cells.check_decisions(updates, "updates", shape, x.device, self.batch_first)
            if self.dense:
                return self._by_time(run, updates)
            return modes.outside_graph(self._compacted, run, updates)

    def _prepare(self, x: Tensor, state, lengths) -> _Run:
        batch, steps = x.shape[:2]
        probability = None
        if isinstance(state, SkipState):
            state, probability = state
        state = step_cells.check_state(state, self.mode, self.num_layers, batch, self.hidden_size, x)
        if probability is None:
            probability = torch.ones(batch, dtype=torch.float64, device=x.device)
        elif tuple(probability.shape) != (batch,):
            raise ValueError(f"state: expected a probability [{batch}], got shape {tuple(probability.shape)}")
        lengths = step_cells.check_lengths(lengths, batch, steps, x.device)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        weights = []
        for layer in range(self.num_layers):
            tensors = [getattr(self, f"{kind}_l{layer}").to(x.dtype) for kind in kinds]
            weights.append((*tensors, None, None)[:4])
        return _Run(x, state, probability.to(x.device, torch.float64), lengths, weights)

    def _compacted(self, run: _Run, updates) -> SkipOutput:
        if isinstance(updates, Tensor):
            return self._given(run, updates)
        if updates is None and not _needs_gradient(self, run):
            return self._by_update(run)
        return self._by_time(run, updates)

    def _rate(self, state: State) -> Tensor:
        """d: float64 ``[B]``. Sums of float32 numbers are then exact: their order changes no decision."""
        read = state[-1]  # the top layer's c, or its h
        weight, bias = self.gate.weight.to(read.dtype), self.gate.bias.to(read.dtype)
        return torch.sigmoid(F.linear(read, weight, bias).double().squeeze(-1))

    # ------------------------------------------------------------------ step by step

    def _by_time(self, run: _Run, updates) -> SkipOutput:
        state, probability, top = run.state, run.probability, self.num_layers - 1
        alive = step_cells.alive_steps(run.lengths, run.x.shape[1])
        x = run.x if alive is None or not self.dense else run.x.masked_fill(~alive[:, :, None], 0)
        outputs, gates = [], []
        rate = self._rate(state) if updates is None else None
        for t, x_t in enumerate(x.unbind(1)):
            if updates is None:
                u = _Round.apply(probability)
            else:
                u = updates(x_t, state[top]) if callable(updates) else updates[:, t]
                u = (u if u.is_floating_point() else u != 0).to(torch.float64)
            u = u if alive is None else torch.where(alive[:, t], u, 0)
            state = self._step(run, x_t, state, u.to(x.dtype))
            outputs.append(state[top])
            gates.append(u)
            if updates is None:
                rate = self._rate(state)
                summed = probability + torch.minimum(rate, 1 - probability)
                after = u * rate + (1 - u) * summed
                probability = after if alive is None else torch.where(alive[:, t], after, probability)
        if not outputs:
            outputs, gates = [x.new_zeros(x.shape[0], 0, self.hidden_size)], [x.new_zeros(x.shape[0], 0)]
            return self._result(outputs[0], state, probability, gates[0])
        if updates is not None:
            probability = torch.ones_like(probability)
        output = torch.stack(outputs, 1)
        output = output if alive is None else output.masked_fill(~alive[:, :, None], 0)
        return self._result(output, state, probability, torch.stack(gates, 1).to(x.dtype))

    def _step(self, run: _Run, x_t: Tensor, state: State, u: Tensor) -> State:
        def cell(rows: Tensor, before: State) -> State:
            return run_cells(self.mode, run.weights, rows, before)

        return compacted_cell(cell, x_t, state, u, dense=self.dense)

    def _result(self, output: Tensor, state: State, probability: Tensor, updates: Tensor) -> SkipOutput:
        """Back to the caller's layout."""
        layers = self.num_layers
        hidden = torch.stack(state[:layers])
        if self.mode == "LSTM":
            hidden = (hidden, torch.stack(state[layers:]))
        if not self.batch_first:
            output, updates = output.transpose(0, 1), updates.transpose(0, 1)
        return SkipOutput(output, SkipState(hidden, probability), updates)

    # -------------------------------------------------------------- update by update

    def _by_update(self, run: _Run) -> SkipOutput:
        """Without gradients: the j-th update of every sequence at once, wherever in time it is."""
        flat, batch_stride, time_stride = run.flat()
        batch, steps = run.x.shape[:2]
        index, state = torch.arange(batch, device=flat.device), run.state
        end = torch.full_like(run.probability, steps) if run.lengths is None else run.lengths.double()
        base, since, rate = run.probability, torch.zeros_like(run.probability), self._rate(state)
        time = torch.where(base > THRESHOLD, 0, _count_to(THRESHOLD - base, rate))  # float64; inf, NaN: never
        final, final_probability = [s.clone() for s in state], run.probability.clone()
        first_row, rows, slots = index * batch_stride, [], []
        while len(index):
            stay = (time < end).nonzero(as_tuple=True)[0]
            if len(stay) < len(index):
                for whole, part in zip(final, state, strict=True):
                    whole.index_copy_(0, index, part)
                at_end = (base + (end - since) * rate).clamp(max=1)
                final_probability.index_copy_(0, index, torch.where(end > 0, at_end, base))
                if not len(stay):
                    break
                state = tuple(s.index_select(0, stay) for s in state)
                index, time, end, first_row = (t[stay] for t in (index, time, end, first_row))
            slot = first_row + time.long() * time_stride
            state = run_cells(self.mode, run.weights, flat.index_select(0, slot), state)
            rows.append(state[self.num_layers - 1])
            slots.append(slot)
            base, since, rate = 0.0, time, self._rate(state)
            time = time + _count_to(THRESHOLD, rate)
        slot = torch.cat(slots) if slots else index.new_zeros(0)
        if time_stride != 1:
            slot = slot % batch * steps + slot // batch
        updates = flat.new_zeros(batch * steps).index_fill(0, slot, 1).view(batch, steps)
        row = torch.full((batch * steps,), -1, device=flat.device)
        row[slot] = torch.arange(len(slot), device=flat.device)
        row = row.view(batch, steps).cummax(1).values if steps and batch else row.view(batch, steps)
        output = run.spread(rows, row, run.state[self.num_layers - 1])
        return self._result(output, tuple(final), final_probability, updates)

    # --------------------------------------------------------------- given decisions

    def _given(self, run: _Run, updates: Tensor) -> SkipOutput:
        """The chosen steps of all sequences as one packed sequence, as all is known before the first one
        runs."""
        batch, steps = run.x.shape[:2]
        layers, device = self.num_layers, run.x.device
        alive = step_cells.alive_steps(run.lengths, steps)
        u = updates if alive is None else torch.where(alive, updates, 0)
        scaled = self._is_scaled(u)
        keep = u != 0
        seen = keep.cumsum(1)  # [B, T]: updates up to this step
        counts = keep.sum(1)
        packing = Packing.of(counts.cpu(), device)
        order = packing.order
        sizes = packing.batch_sizes.tolist()
        starts = (packing.batch_sizes.cumsum(0) - packing.batch_sizes).to(device)
        rank = torch.zeros(batch, dtype=torch.int64, device=device)
        rank[order] = torch.arange(len(order), device=device)
        row = torch.full((batch, steps), -1, device=device)
        if sizes:
            row = torch.where(seen > 0, starts[(seen - 1).clamp(min=0)] + rank[:, None], row)
        sequence, step = keep.nonzero(as_tuple=True)
        slots = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        slots[row[sequence, step]] = sequence * steps + step
        state, rows = run.state, []
        if sizes:
            flat, batch_stride, time_stride = run.flat()
            data = flat.index_select(0, slots // steps * batch_stride + slots % steps * time_stride)
            first = tuple(s.index_select(0, order) for s in state)
            scale = u.reshape(-1).index_select(0, slots).to(flat.dtype)[:, None] if scaled else None
            out, last = self._run_chosen(run, data, packing, first, scale)
            rows = [out]
            state = tuple(s.index_copy(0, order, after) for s, after in zip(state, last, strict=True))
        output = run.spread(rows, row, run.state[layers - 1])
        gates = (u if u.is_floating_point() else keep).to(run.x.dtype)
        return self._result(output, state, torch.ones_like(run.probability), gates)

    @staticmethod
    def _is_scaled(u: Tensor) -> bool:
        """True if the decisions multiply: they have a gradient, or another value than 0 and 1."""
        if not u.is_floating_point():
            return False
        nan, soft = torch.stack([u.isnan().any(), ((u != 0) & (u != 1)).any()]).tolist()
        if nan:
            raise ValueError("updates: expected numbers, got NaN")
        return soft or modes.differentiated(u)

    def _run_chosen(
        self, run: _Run, data: Tensor, packing: Packing, first: State, scale: Tensor | None
    ) -> tuple[Tensor, State]:
        """Packed outputs ``[P, H]`` and the states after the last update, from those before the first."""
        layers = self.num_layers
        if scale is None:
            hidden = tuple(torch.stack(first[i : i + layers]) for i in range(0, len(first), layers))
            out, last = run_packed(self.mode, run.weights, data, packing.batch_sizes, hidden)
            return out, tuple(s for part in last for s in part.unbind(0))
        sizes = packing.batch_sizes.tolist()
        last = [None] * len(first)
        for layer, weight in enumerate(run.weights):
            before = first[layer::layers]
            data, out, last[layer::layers] = run_scaled(self.mode, weight, data, sizes, before, scale)
        return out, tuple(last)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}, dense={self.dense}"


class _Run(NamedTuple):
    """A call's tensors in one dtype."""

    x: Tensor  # [B, T, I], perhaps a transposed view
    state: State
    probability: Tensor  # float64 [B]
    lengths: Tensor | None
    weights: list[tuple]

    def flat(self) -> tuple[Tensor, int, int]:
        """All steps as rows ``[B * T, I]`` without a copy; the strides, in rows, of sequences and of
        steps."""
        batch, steps = self.x.shape[:2]
        swapped = self.x.transpose(0, 1)
        if swapped.is_contiguous() and not self.x.is_contiguous():
            return swapped.flatten(0, 1), 1, batch
        return self.x.flatten(0, 1), steps, 1

    def spread(self, rows: list[Tensor], row: Tensor, initial: Tensor) -> Tensor:
        """``[B, T, H]``: ``rows[row]`` at each step, the initial state where row is -1, 0 after the end."""
        batch, steps = row.shape
        table = torch.cat([*rows, initial, initial.new_zeros(1, initial.shape[1])])
        none = len(table) - 1 - batch + torch.arange(batch, device=row.device)
        row = torch.where(row < 0, none[:, None], row)
        alive = step_cells.alive_steps(self.lengths, steps)
        row = row if alive is None else torch.where(alive, row, len(table) - 1)
        return table.index_select(0, row.reshape(-1)).view(batch, steps, initial.shape[1])


class _Round(torch.autograd.Function):
    """1 above 0.5, else 0 (for NaN too); backward: the identity."""

    @staticmethod
    def forward(ctx, probability: Tensor) -> Tensor:
        return (probability > THRESHOLD).to(probability.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _count_to(room: Tensor | float, rate: Tensor) -> Tensor:
    """The least k >= 0 with ``k * rate > room``, for a room >= 0; inf or NaN where there is none."""
    count = torch.floor(room / rate)
    return count + (count * rate <= room)


def _needs_gradient(layer: SkipRNN, run: _Run) -> bool:
    return modes.differentiated(run.x, *run.state, run.probability, *layer.parameters())
