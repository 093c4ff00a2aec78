"""The MACs of PyTorch's layers, from one call of each.

Biases, norms, activations, pooling and softmax have none. A padded border counts as any pixel, as usual.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class Cost(NamedTuple):
    """The MACs of a call: ``each * live`` for each of its rows.

    ``rows``: how many, the first size of its batch. ``each``: a number. ``live``: float64 ``[rows]``, or
    None: ones. ``dense``: the MACs of a row with every gate open; None: ``each``.
    """

    rows: int
    each: float
    live: Tensor | None = None
    dense: float | None = None


def argument(args: tuple, kwargs: dict, position: int, name: str, default=None):
    """An argument of a call, wherever it stands."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def conv(module: nn.modules.conv._ConvNd, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    """Every tap at each output pixel; of a transposed one every tap at each input pixel."""
    dims = len(module.kernel_size)
    rows = out.shape[0] if out.dim() == dims + 2 else 1
    of_taps = argument(args, kwargs, 0, "input", argument(args, kwargs, 0, "x")) if module.transposed else out
    return Cost(rows, conv_macs(module, of_taps.shape[-dims:].numel()))


def conv_macs(module: nn.modules.conv._ConvNd, pixels: float) -> float:
    """MACs of ``pixels`` pixels that meet every tap: outputs, of a transposed convolution inputs."""
    taps = math.prod(module.kernel_size)
    return pixels * taps * module.in_channels * module.out_channels / module.groups


def linear(module: nn.Linear, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    x = argument(args, kwargs, 0, "input", out)  # what a subclass returns may be a tuple: routers are such
    rows = x.shape[0] if x.dim() > 1 else 1
    return Cost(rows, x.shape[1:-1].numel() * float(module.weight.shape[0] * module.weight.shape[1]))


def bilinear(module: nn.Bilinear, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    a, b, o = module.in1_features, module.in2_features, module.out_features
    rows = out.shape[0] if out.dim() > 1 else 1
    return Cost(rows, out.shape[1:-1].numel() * float(o * (a * b + b)))


def cell(module: nn.modules.rnn.RNNCellBase, args: tuple, kwargs: dict, out) -> Cost:
    h = out[0] if isinstance(out, tuple) else out
    return Cost(h.shape[0] if h.dim() > 1 else 1, float(module.weight_ih.numel() + module.weight_hh.numel()))


def step_macs(module: nn.RNNBase) -> float:
    """MACs of one step of one sequence, all layers and directions."""
    directions = 2 if module.bidirectional else 1
    state = module.proj_size or module.hidden_size
    total = 0
    for layer in range(module.num_layers):
        inputs = module.input_size if layer == 0 else state * directions
        total += directions * (_GATES[module.mode] * module.hidden_size * (inputs + state))
        total += directions * module.proj_size * module.hidden_size
    return float(total)


def rnn(module: nn.RNNBase, args: tuple, kwargs: dict, out) -> Cost:
    x = argument(args, kwargs, 0, "input")
    if isinstance(x, PackedSequence):
        lengths = packed_lengths(x)
        return Cost(len(lengths), step_macs(module), lengths, step_macs(module) * len(x.batch_sizes))
    if x.dim() == 2:
        return Cost(1, step_macs(module) * x.shape[0])
    rows, steps = (x.shape[0], x.shape[1]) if module.batch_first else (x.shape[1], x.shape[0])
    return Cost(rows, step_macs(module) * steps)


def packed_lengths(x: PackedSequence) -> Tensor:
    """float64 ``[B]``: the steps of each sequence, in the order in which they were packed."""
    sizes = x.batch_sizes  # on the host, always
    number = torch.arange(int(sizes[0]) if len(sizes) else 0, device="cpu")
    lengths = (sizes[None] > number[:, None]).sum(1).double().to(x.data.device)
    return lengths if x.unsorted_indices is None else lengths[x.unsorted_indices]


def attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict, out) -> Cost:
    """The four projections and the two products, of all pairs, masked or not."""
    query, key, value = (argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
    time = 0 if query.dim() == 2 else 1 if module.batch_first else 0
    batch = 1 if query.dim() == 2 else query.shape[1 - time]
    asked, read, width = query.shape[time], key.shape[time], module.embed_dim
    read_all = read + (module.bias_k is not None) + module.add_zero_attn
    projections = asked * width * width * 2 + read * width * (module.kdim + module.vdim)
    return Cost(batch, float(projections + 2 * asked * read_all * width))


DENSE_RULES = {
    nn.modules.conv._ConvNd: conv,
    nn.Linear: linear,
    nn.Bilinear: bilinear,
    nn.RNNBase: rnn,
    nn.modules.rnn.RNNCellBase: cell,
    nn.MultiheadAttention: attention,
}
