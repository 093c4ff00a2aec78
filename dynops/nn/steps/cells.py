"""Shared parts of recurrent layers that skip: arguments, cells on rows, packed sequences of ragged runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ... import modes
from ...ops import gather_samples, scatter_samples
from ...plans import SamplePlan, named
from ..apart import apart_as

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")  # nn.RNNBase.mode
_CELLS = {"GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell}
_PACKED = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}

State = tuple[Tensor, ...]  # [B, H] each: h of every layer, then, of an LSTM, c of every layer


# --------------------------------------------------------------------------------------- cells


def run_cells(mode: str, weights: list[tuple], x: Tensor, state: State) -> State:
    """One step of a stack of layers on ``[n, I]``; ``weights``: (w_ih, w_hh, b_ih, b_hh) of each layer."""
    if mode != "LSTM":
        new = []
        for layer, weight in enumerate(weights):
            x = _CELLS[mode](x, state[layer], *weight)
            new.append(x)
        return tuple(new)
    hidden, cell = [], []
    for layer, weight in enumerate(weights):
        x, c = torch.lstm_cell(x, (state[layer], state[len(weights) + layer]), *weight)
        hidden.append(x)
        cell.append(c)
    return (*hidden, *cell)


def finish_cell(mode: str, by_input: State, by_hidden: State, h: Tensor, c: Tensor | None) -> State:
    """The pointwise end of a cell: (h,) or (h, c) from its gates' products with the input and with h."""
    if mode == "LSTM":
        i, f, g, o = (a + b for a, b in zip(by_input, by_hidden, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if mode == "GRU":
        r = torch.sigmoid(by_input[0] + by_hidden[0])
        z = torch.sigmoid(by_input[1] + by_hidden[1])
        n = torch.tanh(by_input[2] + r * by_hidden[2])
        return ((1 - z) * n + z * h,)
    activation = torch.tanh if mode == "RNN_TANH" else torch.relu
    return (activation(by_input[0] + by_hidden[0]),)


def compacted_cell(
    cell: Callable[[Tensor, Any], Any],
    x: Tensor,
    state: Any,
    update: Tensor | SamplePlan,
    *,
    dense: bool = False,
) -> Any:
    """One step of a recurrent cell on those samples that update: ``u * cell(x, state) + (1 - u) * state``.

    Args:
        cell: ``(x, state) -> state``, as ``nn.GRUCell`` and ``nn.LSTMCell``.
        x: ``[N, ...]``.
        state: ``[N, ...]``, or a pytree of such tensors that the cell takes and returns.
        update: u, ``[N]``: bool, integer (nonzero = update) or floating; or a :class:`~dynops.SamplePlan`.
        dense: runs the cell on every sample and multiplies, for the exact gradient of every u.

    Returns:
        The new state. Where nobody updates the state itself: the cell does not run.

    Raises:
        TypeError, ValueError: an ``update`` that does not fit, or NaN in it.

    The new state has the dtypes of the old one, whoever updates. The cell is a function of values: what it writes in place is its own.

    On a GPU the number of samples that update is read back to the host, unless ``dense``.
    """
    floating = isinstance(update, Tensor) and update.is_floating_point()
    if dense:
        u = update.mask() if isinstance(update, SamplePlan) else update
        u = u if floating else u != 0
        new = _as_state(apart_as(cell, lambda both: cell(*both), (x, state)), state)
        return _map_states(lambda a, b: _mix(u, a, b), new, state)
    plan = update if isinstance(update, SamplePlan) else named("update", "keep", SamplePlan.from_mask, update)
    if plan.is_empty:
        return state
    scale = update if floating else None
    if plan.is_full:
        new = _as_state(apart_as(cell, lambda both: cell(*both), (x, state)), state)
    else:
        new = _as_state(cell(gather_samples(x, plan), gather_samples(state, plan)), state)
        scale = None if scale is None else gather_samples(scale, plan)
    if plan.is_full and scale is None:
        return new
    return scatter_samples(new, plan, state, scale=scale)


def _as_state(new: Any, state: Any) -> Any:
    """In the state's dtypes, whoever updates: autocast may have the cell's narrower."""
    return _map_states(lambda a, b: a.to(b.dtype) if isinstance(a, Tensor) else a, new, state)


def _mix(u: Tensor, new: Tensor, old: Tensor) -> Tensor:
    u = u.to(new.dtype).view(-1, *[1] * (new.dim() - 1))
    return u * new + (1 - u) * old


def _map_states(function, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return function(new, old)
    return pytree.tree_map(function, new, old)


# ------------------------------------------------------------------------------- packed sequences


class Packing(NamedTuple):
    """Ragged runs in the order of a ``PackedSequence``: all first steps, then all second ones …

    ``order``: int64 ``[n]``, the sequences with a step, longest first; ``batch_sizes``: int64 on the host,
    the sequences that have a j-th step; ``sequence`` and ``step``: int64 ``[P]``, of each row the place in
    ``order`` and j.
    """

    order: Tensor
    batch_sizes: Tensor
    sequence: Tensor
    step: Tensor

    @classmethod
    def of(cls, counts: Tensor, device: torch.device) -> Packing:
        """``counts``: int64 ``[B]`` on the host, the steps of each sequence."""
        ordered, order = counts.sort(descending=True, stable=True)
        order = order[: int((ordered > 0).sum())]
        longest = int(ordered[0]) if len(order) else 0
        ends = torch.bincount(counts, minlength=longest + 1)  # sequences of each length
        batch_sizes = counts.shape[0] - ends.cumsum(0)[:longest]
        step = torch.arange(longest, device="cpu").repeat_interleave(batch_sizes)
        starts = (batch_sizes.cumsum(0) - batch_sizes)[step]
        sequence = torch.arange(step.shape[0], device="cpu") - starts
        return cls(order.to(device), batch_sizes, sequence.to(device), step.to(device))


def run_packed(
    mode: str, weights: list[tuple], data: Tensor, batch_sizes: Tensor, hidden: tuple
) -> tuple[Tensor, tuple]:
    """PyTorch's recurrent layer on packed rows ``[P, I]``; ``hidden``: (h,) or (h, c) of ``[L, n, H]``."""
    flat = [tensor for weight in weights for tensor in weight if tensor is not None]
    train = torch.is_grad_enabled()  # cuDNN keeps what its backward needs in training only
    options = (flat, weights[0][2] is not None, len(weights), 0.0, train, False)
    if mode == "LSTM":
        out, *last = torch.lstm(data, batch_sizes, hidden, *options)
    else:
        out, *last = _PACKED[mode](data, batch_sizes, hidden[0], *options)
    return out, tuple(last)


def run_scaled(
    mode: str, weight: tuple, data: Tensor, sizes: list[int], state: State, scale: Tensor
) -> tuple[Tensor, Tensor, State]:
    """A layer on packed rows, updates multiplied: (h of the cells for the next layer, mixed h, last
    state)."""
    w_ih, w_hh, b_ih, b_hh = weight
    gates = w_ih.shape[0] // w_hh.shape[1]
    inputs = F.linear(data, w_ih, b_ih).split(sizes)  # one GEMM for all steps
    computed, mixed, ended = [], [], []
    for by_input, u in zip(inputs, scale.split(sizes), strict=True):
        n = len(u)
        if n < len(state[0]):
            ended.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        by_hidden = F.linear(state[0], w_hh, b_hh).chunk(gates, 1)
        c = state[1] if len(state) == 2 else None
        new = finish_cell(mode, by_input.chunk(gates, 1), by_hidden, state[0], c)
        state = tuple(u * a + (1 - u) * b for a, b in zip(new, state, strict=True))
        computed.append(new[0])
        mixed.append(state[0])
    last = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return torch.cat(computed), torch.cat(mixed), last


# ------------------------------------------------------------------------------------ arguments


def read_layer(layer: nn.Module) -> tuple[str, int, dict[str, nn.Parameter]]:
    """Mode, layers and parameters, named as in ``nn.LSTM``, of a layer or cell that can skip steps."""
    if isinstance(layer, nn.RNNBase):
        refused = {"bidirectional": False, "proj_size": 0, "dropout": 0.0}
        for name, wanted in refused.items():
            if getattr(layer, name) != wanted:
                raise ValueError(f"layer: expected {name}={wanted}, got {name}={getattr(layer, name)}")
        names = layer._flat_weights_names
        return layer.mode, layer.num_layers, {name: getattr(layer, name) for name in names}
    if not isinstance(layer, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        raise TypeError(
            f"layer: expected nn.LSTM, nn.GRU, nn.RNN or one of their cells, got {type(layer).__name__}"
        )
    names = ("weight_ih", "weight_hh") + (("bias_ih", "bias_hh") if layer.bias else ())
    return cell_mode(layer), 1, {f"{name}_l0": getattr(layer, name) for name in names}


def cell_mode(cell: nn.Module) -> str:
    """The ``nn.RNNBase.mode`` of a cell."""
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def check_steps(x, features: int, batch_first: bool) -> Tensor:
    """``x`` as ``[B, T, I]``."""
    if isinstance(x, PackedSequence):
        raise TypeError("x: expected a padded tensor and `lengths`, got a PackedSequence")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 3 or x.shape[2] != features:
        layout = "[B, T" if batch_first else "[T, B"
        raise ValueError(f"x: expected {layout}, {features}], got shape {tuple(x.shape)}")
    return x if batch_first else x.transpose(0, 1)


def check_lengths(lengths, batch: int, steps: int, device: torch.device) -> Tensor | None:
    """int64 ``[B]`` on ``device``, or None. Values are checked where that waits for no device."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers [B], got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected [{batch}], as x has sequences, got shape {tuple(lengths.shape)}")
    checkable = modes.may_look(lengths)
    if checkable and batch and not (int(lengths.min()) >= 0 and int(lengths.max()) <= steps):
        raise ValueError(
            f"lengths: expected values in [0, {steps}], got {int(lengths.min())} to {int(lengths.max())}"
        )
    return lengths.to(device=device, dtype=torch.int64).clamp(0, steps)


def check_decisions(
    value, name: str, shape: tuple[int, int], device: torch.device, batch_first: bool
) -> Tensor:
    """A decision for each step as ``[B, T]``, bool, integer or floating."""
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(
            f"{name}: expected a real tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    expected = shape if batch_first else shape[::-1]
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected {expected}, as x has steps, got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected it on x's device {device}, got {value.device}")
    return value if batch_first else value.t()


def check_state(state, mode: str, layers: int, batch: int, hidden: int, x: Tensor) -> State:
    """``nn.LSTM``'s state, ``[L, B, H]``, as the h of every layer (and then the c); None: zeros."""
    count = 2 if mode == "LSTM" else 1
    if state is None:
        return (x.new_zeros(batch, hidden),) * (layers * count)
    parts = tuple(state) if mode == "LSTM" and isinstance(state, (tuple, list)) else (state,)
    if len(parts) != count or not all(isinstance(part, Tensor) for part in parts):
        what = "(h, c)" if mode == "LSTM" else "h"
        raise TypeError(f"state: expected {what}, tensors [L, B, H], got {type(state).__name__}")
    for part in parts:
        if tuple(part.shape) != (layers, batch, hidden):
            raise ValueError(f"state: expected ({layers}, {batch}, {hidden}), got shape {tuple(part.shape)}")
        if part.device != x.device:
            raise ValueError(f"state: expected it on x's device {x.device}, got {part.device}")
    return tuple(row for part in parts for row in part.to(x.dtype).unbind(0))


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, as it is for ``nn.LSTM``; else that of ``x``."""
    return modes.autocast_dtype(x) or x.dtype


def alive_steps(lengths: Tensor | None, steps: int) -> Tensor | None:
    """bool ``[B, T]``: the steps before a sequence's end; None: all."""
    if lengths is None:
        return None
    return torch.arange(steps, device=lengths.device) < lengths[:, None]
