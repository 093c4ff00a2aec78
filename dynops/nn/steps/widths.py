"""Recurrent steps that update a part of the state: partial_update and SkimRNN (a small or a big cell)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from ...geometry import is_int
from ...ops import gather_samples, scatter_samples
from ...plans import SamplePlan, named
from . import cells as step_cells
from .cells import State, finish_cell

_CELL_CLASSES = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN_TANH": nn.RNNCell, "RNN_RELU": nn.RNNCell}

# -------------------------------------------------------------------------------- partial update


def prefix_mask(
    fraction: Tensor, size: int, sharpness: float = 1.0, epsilon: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The soft mask of a state's first rows: ``sigmoid(sharpness * (fraction * size - i))``, i = 1 ... size.

    Values above ``1 - epsilon`` become 1 and those below ``epsilon`` 0, exactly.

    Args:
        fraction: m, floating ``[N]`` in [0, 1], for example ``sigmoid(u h + v x)``. NaN: width 0.
        size: D, the rows of the state.
        sharpness: of the edge; raised while training.
        epsilon: in [0, 0.5).

    Returns:
        The mask ``[N, D]``, with the gradient of its soft values, and the widths int64 ``[N]``: nonzero rows.

    Paper: Jernite et al., Variable Computation in Recurrent Neural Networks (ICLR 2017).
    """
    if not isinstance(fraction, Tensor) or not fraction.is_floating_point() or fraction.dim() != 1:
        what = tuple(fraction.shape) if isinstance(fraction, Tensor) else type(fraction).__name__
        raise TypeError(f"fraction: expected a floating tensor [N], got {what}")
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon: expected a number in [0, 0.5), got {epsilon!r}")
    row = torch.arange(
        1, size + 1, device=fraction.device, dtype=torch.promote_types(fraction.dtype, torch.float32)
    )
    soft = torch.sigmoid(sharpness * (fraction[:, None].to(row.dtype) * size - row))
    mask = torch.where(soft > 1 - epsilon, 1.0, soft)
    mask = torch.where(soft >= epsilon, mask, 0.0)
    return mask.to(fraction.dtype), (mask != 0).sum(1)


def partial_update(
    cell: nn.LSTMCell | nn.GRUCell | nn.RNNCell,
    x: Tensor,
    state: Tensor | tuple[Tensor, Tensor],
    width: Tensor | int,
    *,
    mask: Tensor | None = None,
    input_width: Tensor | int | None = None,
    dense: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Takes one step of a cell: each sample reads and updates the first rows of its state, and copies the others.

    With e the mask of the first ``width`` rows and e' the mask of the first ``input_width`` features::

        e * cell(e' * x, e * h) + (1 - e) * h            (c of an LSTM like h)

    Samples of equal widths run together, on the upper left parts of the weights, which are not copied. A few
    distinct widths are fast; round them if there are many.

    Args:
        cell: ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` of I inputs and H rows.
        x: ``[N, I]``.
        state: h ``[N, H]``, of an LSTM ``(h, c)``.
        width: integers ``[N]`` in [0, H], or one for all.
        mask: e itself, floating ``[N, H]``, zero from ``width`` on, as :func:`prefix_mask` makes both. Its
            gradient lacks the part of rows that were not computed.
        input_width: integers ``[N]`` in [0, I], or one for all; None: I.
        dense: computes the equation as it stands; a mask gets its exact gradient.

    Returns:
        The new state. On a GPU the widths are read back to the host, unless ``dense`` or they are ints.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Jernite et al., Variable Computation in Recurrent Neural Networks (ICLR 2017).
    """
    if not isinstance(cell, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        raise TypeError(f"cell: expected nn.LSTMCell, nn.GRUCell or nn.RNNCell, got {type(cell).__name__}")
    mode, batch = step_cells.cell_mode(cell), x.shape[0]
    parts = state if isinstance(state, tuple) else (state,)
    if x.dim() != 2 or x.shape[1] != cell.input_size:
        raise ValueError(f"x: expected [N, {cell.input_size}], got shape {tuple(x.shape)}")
    if len(parts) != (2 if mode == "LSTM" else 1):
        raise TypeError(f"state: expected {'(h, c)' if mode == 'LSTM' else 'h'}, got {len(parts)} tensors")
    for part in parts:
        if tuple(part.shape) != (batch, cell.hidden_size):
            raise ValueError(f"state: expected ({batch}, {cell.hidden_size}), got shape {tuple(part.shape)}")
    width = _check_width(width, "width", batch, cell.hidden_size)
    input_width = _check_width(input_width, "input_width", batch, cell.input_size)
    if mask is not None and tuple(mask.shape) != (batch, cell.hidden_size):
        raise ValueError(f"mask: expected ({batch}, {cell.hidden_size}), got shape {tuple(mask.shape)}")
    run = _dense_prefix if dense else _grouped_prefix
    new = run(cell, mode, x, tuple(parts), width, input_width, mask)
    return new if mode == "LSTM" else new[0]


def _check_width(width, name: str, batch: int, size: int) -> Tensor | int:
    if width is None:
        return size
    if is_int(width, 0) and width <= size:
        return width
    if not isinstance(width, Tensor) or width.is_floating_point() or width.dtype == torch.bool:
        what = width.dtype if isinstance(width, Tensor) else repr(width)
        raise TypeError(f"{name}: expected integers [{batch}] or an int in [0, {size}], got {what}")
    if tuple(width.shape) != (batch,):
        raise ValueError(f"{name}: expected [{batch}], got shape {tuple(width.shape)}")
    return width


def _dense_prefix(cell, mode: str, x: Tensor, state: State, width, input_width, mask: Tensor | None) -> State:
    def prefix(size: int, wide) -> Tensor:
        end = wide[:, None] if isinstance(wide, Tensor) else wide
        return (torch.arange(size, device=x.device) < end).to(x.dtype)

    e = prefix(cell.hidden_size, width)
    e = e if mask is None else e * mask
    reads = (e * state[0], *state[1:])
    new = cell(x * prefix(cell.input_size, input_width), reads if mode == "LSTM" else reads[0])
    new = new if mode == "LSTM" else (new,)
    return tuple(e * a + (1 - e) * b for a, b in zip(new, state, strict=True))


def _grouped_prefix(
    cell, mode: str, x: Tensor, state: State, width, input_width, mask: Tensor | None
) -> State:
    batch = x.shape[0]
    widths = width.tolist() if isinstance(width, Tensor) else [width] * batch
    inputs = input_width.tolist() if isinstance(input_width, Tensor) else [input_width] * batch
    groups: dict[tuple[int, int], list[int]] = {}
    for sample, pair in enumerate(zip(widths, inputs, strict=True)):
        groups.setdefault(pair, []).append(sample)
    for name, values, size in (("width", widths, cell.hidden_size), ("input_width", inputs, cell.input_size)):
        if values and not (min(values) >= 0 and max(values) <= size):
            raise ValueError(f"{name}: expected values in [0, {size}], got {min(values)} to {max(values)}")
    done = []
    for (rows, features), samples in groups.items():
        picks = None if len(samples) == batch else torch.tensor(samples, device=x.device)

        def pick(tensor, picks=picks):
            return tensor if picks is None or tensor is None else tensor.index_select(0, picks)

        before = tuple(pick(s) for s in state)
        done.append(
            before if rows == 0 else _prefix_cell(cell, mode, pick(x), before, rows, features, pick(mask))
        )
    if len(done) <= 1:
        return done[0] if done else state
    order = [sample for samples in groups.values() for sample in samples]
    order = torch.tensor(order, device="cpu").argsort().to(x.device)
    return tuple(torch.cat(parts).index_select(0, order) for parts in zip(*done, strict=True))


def _prefix_cell(
    cell, mode: str, x: Tensor, state: State, rows: int, features: int, mask: Tensor | None
) -> State:
    e = None if mask is None else mask[:, :rows]
    old = tuple(s[:, :rows] for s in state)
    read = old[0] if e is None else e * old[0]
    by_input = _prefix_gates(x[:, :features], cell.weight_ih, cell.bias_ih, rows, cell.hidden_size)
    by_hidden = _prefix_gates(read, cell.weight_hh, cell.bias_hh, rows, cell.hidden_size)
    new = finish_cell(mode, by_input, by_hidden, read, old[1] if mode == "LSTM" else None)
    if e is not None:
        new = tuple(e * a + (1 - e) * b for a, b in zip(new, old, strict=True))
    return tuple(torch.cat([a, s[:, rows:]], 1) for a, s in zip(new, state, strict=True))


def _prefix_gates(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, hidden: int) -> State:
    """``[n, rows]`` of each gate. A batched product takes the parts of the weights by their strides."""
    weight = weight.view(-1, hidden, weight.shape[1])[:, :rows, : x.shape[1]].transpose(1, 2)
    x = x.expand(weight.shape[0], *x.shape)
    if bias is None:
        return torch.bmm(x, weight).unbind(0)
    return torch.baddbmm(bias.view(-1, 1, hidden)[:, :, :rows], x, weight).unbind(0)


# --------------------------------------------------------------------------------------- SkimRNN


class SkimOutput(NamedTuple):
    """The result of :class:`SkimRNN`.

    ``output``: ``[B, T, H]``. ``state``: as ``nn.LSTM`` has it, ``(h, c)`` or ``h``, ``[1, B, H]``. ``skim``:
    ``[B, T]``, 1 where the small cell ran. ``log_skim``: ``[B, T]``, the gate's log-probability of skimming,
    None where the choices were given.
    """

    output: Tensor
    state: Any
    skim: Tensor
    log_skim: Tensor | None


class SkimRNN(nn.Module):
    """Runs at each step the big cell, or the small one, which updates the first rows of the state::

        h_t = big(x_t, h)                                     where the gate reads
        h_t = [small(x_t, h[:S]), h[S:]]                      where it skims         (c of an LSTM like h)

    The gate is linear in ``[x_t, h]``. Each step runs both cells once, each on the sequences that chose it.

    Args:
        input_size, hidden_size, bias, batch_first: as in ``nn.LSTM``, of one layer.
        small_size: S, the rows that the small cell updates, 1 to H.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        temperature: of the Gumbel-softmax in training. An attribute: lower it while training.
        soft: in training both cells run and are mixed by soft Gumbel weights (the paper's training).
            Otherwise the choice is hard, with the soft one's gradient.
        dense: runs both cells for all sequences, for the gate's exact gradient. Without it the gradient of a
            choice is that of taking the chosen update instead of none.

    Shape (with ``batch_first``; else B and T change places in all but the states):
        - x: ``[B, T, I]``.
        - state: None (zeros) or what ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` take, ``[1, B, H]``.
        - skim: None: the gate decides; in eval mode by the larger logit, without noise. Or ``[B, T]``, bool,
          integer or floating zeros and ones, 1 = skim.
        - lengths: integers ``[B]``; beyond them nothing is computed and the outputs are 0.
        - output: :class:`SkimOutput`. The paper adds ``-weight * log_skim.mean()`` to the loss.

    Parameters: ``big.…`` and ``small.…``, those of PyTorch's cells, and ``gate.…``. A gate that is NaN reads
    with the big cell in eval mode; in training it raises, unless dense or soft. On a GPU two sizes are read
    back to the host at each step, unless dense. ``torch.compile`` of a surrounding model breaks its graph
    here unless dense.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Seo et al., Neural Speed Reading via Skim-RNN (ICLR 2018).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        small_size: int,
        *,
        mode: str = "LSTM",
        bias: bool = True,
        batch_first: bool = False,
        temperature: float = 1.0,
        soft: bool = False,
        dense: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if mode not in step_cells.MODES:
            raise ValueError(f"mode: expected one of {step_cells.MODES}, got {mode!r}")
        if not is_int(small_size, 1) or small_size > hidden_size:
            raise ValueError(f"small_size: expected an int in [1, {hidden_size}], got {small_size!r}")
        factory = {"device": device, "dtype": dtype}
        options = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
        self.mode, self.batch_first = mode, batch_first
        self.input_size, self.hidden_size, self.small_size = input_size, hidden_size, small_size
        self.temperature, self.soft, self.dense = temperature, soft, dense
        kind = _CELL_CLASSES[mode]
        self.big = kind(input_size, hidden_size, bias, **options, **factory)
        self.small = kind(input_size, small_size, bias, **options, **factory)
        self.gate = nn.Linear(input_size + hidden_size, 2, **factory)  # logits of reading and of skimming

    def forward(
        self,
        x: Tensor,
        state: Tensor | tuple | None = None,
        skim: Tensor | None = None,
        lengths: Tensor | list[int] | None = None,
    ) -> SkimOutput:
        x = step_cells.check_steps(x, self.input_size, self.batch_first)
        batch, steps = x.shape[:2]
        x = x.to(step_cells.computing_dtype(x))
        lengths = step_cells.check_lengths(lengths, batch, steps, x.device)
        state = step_cells.check_state(state, self.mode, 1, batch, self.hidden_size, x)
        if skim is not None:
            skim = step_cells.check_decisions(skim, "skim", (batch, steps), x.device, self.batch_first)
            skim = (skim if skim.is_floating_point() else skim != 0).to(x.dtype)
        both = self.dense or (self.soft and self.training and skim is None)
        with modes.without_autocast(x):
            arguments = x, state, skim, step_cells.alive_steps(lengths, steps), both
            return self._steps(*arguments) if both else modes.outside_graph(self._steps, *arguments)

    def _steps(
        self, x: Tensor, state: State, skim: Tensor | None, alive: Tensor | None, both: bool
    ) -> SkimOutput:
        outputs, choices, logs = [], [], []
        if both and alive is not None:
            x = x.masked_fill(~alive[:, :, None], 0)
        update = self._both if both else self._chosen
        big, small = (self._function(cell, x.dtype) for cell in (self.big, self.small))
        for t, x_t in enumerate(x.unbind(1)):
            ends = None if alive is None else alive[:, t]
            if skim is None:
                choice, log = self._choose(x_t, state[0])
                logs.append(log if ends is None else torch.where(ends, log, 0))
            else:
                choice = skim[:, t]
            choice = choice if ends is None else torch.where(ends, choice, 0)
            state = update(big, small, x_t, state, choice, ends)
            outputs.append(state[0])
            choices.append(choice)
        output = torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape[0], 0, self.hidden_size)
        choices = torch.stack(choices, 1) if choices else x.new_zeros(x.shape[0], 0)
        logs = None if skim is not None else torch.stack(logs, 1) if logs else x.new_zeros(x.shape[0], 0)
        if alive is not None:
            output = output.masked_fill(~alive[:, :, None], 0)
        if not self.batch_first:
            output, choices = output.transpose(0, 1), choices.transpose(0, 1)
            logs = None if logs is None else logs.transpose(0, 1)
        hidden = tuple(s[None] for s in state)
        return SkimOutput(output, hidden if self.mode == "LSTM" else hidden[0], choices, logs)

    def _function(self, cell: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, State], State]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weight = tuple(None if getattr(cell, n) is None else getattr(cell, n).to(dtype) for n in names)
        return lambda x, state: step_cells.run_cells(self.mode, [weight], x, state)

    def _choose(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The skimming ``[B]`` and its log-probability."""
        weight, bias = self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype)
        logits = F.linear(torch.cat([x, h], 1), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log = F.log_softmax(logits, 1)[:, 1].to(x.dtype)
        if not self.training:
            return (logits[:, 1] > logits[:, 0]).to(x.dtype), log
        return F.gumbel_softmax(logits, self.temperature, hard=not self.soft)[:, 1].to(x.dtype), log

    def _both(self, big, small, x: Tensor, state: State, skim: Tensor, alive: Tensor | None) -> State:
        read, skimmed = big(x, state), self._widen(small(x, self._prefix(state)), state)
        skim = skim[:, None]
        new = tuple((1 - skim) * a + skim * b for a, b in zip(read, skimmed, strict=True))
        if alive is None:
            return new
        return tuple(torch.where(alive[:, None], a, b) for a, b in zip(new, state, strict=True))

    def _chosen(self, big, small, x: Tensor, state: State, skim: Tensor, alive: Tensor | None) -> State:
        # a skim that is NaN goes to the small plan, which raises
        keep = skim == 0 if alive is None else (skim == 0) & alive
        plans = (named("skim", "keep", SamplePlan.from_mask, skim), SamplePlan.from_mask(keep))
        trains = modes.differentiated(skim)
        new = state
        for plan, cell, share in zip(plans, (small, big), (skim, 1 - skim), strict=True):
            if plan.is_empty:
                continue
            before = state if plan.is_full else gather_samples(state, plan)
            rows = x if plan.is_full else gather_samples(x, plan)
            if cell is small:
                after = self._widen(small(rows, self._prefix(before)), before)
            else:
                after = big(rows, before)
            if plan.is_full and not trains:
                return after
            new = scatter_samples(after, plan, new, scale=gather_samples(share, plan) if trains else None)
        return new

    def _prefix(self, state: State) -> State:
        return tuple(s[:, : self.small_size] for s in state)

    def _widen(self, small: State, state: State) -> State:
        return tuple(torch.cat([a, s[:, self.small_size :]], 1) for a, s in zip(small, state, strict=True))

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, small_size={self.small_size}, mode={self.mode!r}, "
            f"batch_first={self.batch_first}, soft={self.soft}, dense={self.dense}"
        )
