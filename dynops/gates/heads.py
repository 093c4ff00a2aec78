"""Gate heads that decide about a layer for each sample: pooled, recurrent, convolutional."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_features, check_floating, check_int, check_rate
from .functions import Decision, straight_through
from .modules import GumbelSoftmax

LAST_STD = 1e-3  # of the last layer's weights: small, so that at first the bias decides (ConvNet-AIG's code)


def open_(last: nn.Module, *bias: float) -> None:
    """Small weights for the last layer of a gate, and its bias: one number for all outputs, or one for each."""
    nn.init.normal_(last.weight, std=LAST_STD)
    with torch.no_grad():
        last.bias.copy_(torch.tensor(bias, device=last.bias.device))


def logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


def _open_pair(last: nn.Module, open_rate: float) -> None:
    """Two logits, closed and open, of which a softmax gives the second ``open_rate``."""
    open_(last, 0.0, logit(open_rate))


def pool(x: Tensor) -> Tensor:
    """``[N, C]``: the mean of ``[N, C, ...]`` over all positions."""
    return x if x.dim() == 2 else x.mean(tuple(range(2, x.dim())))


class PooledGate(nn.Module):
    """ConvNet-AIG's gate: global average pool, two layers, Gumbel-softmax over two logits.

    ``fc2(relu(fc1bn(fc1(mean(x)))))``; in training mode a sample, in evaluation the larger logit.

    Args:
        channels: C.
        hidden: features between the layers.
        open_rate: the probability, about, that the gate is open at first.
        temperature: of the relaxation; :func:`set_temperature` anneals it.

    Shape:
        - x: ``[N, C]`` or ``[N, C, ...]``.
        - output: :class:`Decision`, mask and score ``[N]``.

    Raises:
        TypeError, ValueError: an argument that does not fit. In training mode a batch of one sample, as every
            batch norm over single features does.

    Paper: Veit and Belongie, Convolutional networks with adaptive inference graphs (ECCV 2018).
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 16,
        *,
        open_rate: float = 0.85,
        temperature: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_int("channels", channels)
        check_int("hidden", hidden)
        check_rate("open_rate", open_rate)
        factory = {"device": device, "dtype": dtype}
        self.channels, self.open_rate = channels, open_rate
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.fc1bn = nn.BatchNorm1d(hidden, **factory)
        self.fc2 = nn.Linear(hidden, 2, **factory)
        self.gumbel = GumbelSoftmax(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        self.fc1bn.reset_parameters()
        _open_pair(self.fc2, self.open_rate)

    def forward(self, x: Tensor) -> Decision:
        check_features(x, self.channels)
        mask, score = self.gumbel(self.fc2(F.relu(self.fc1bn(self.fc1(pool(x))))))
        return Decision(mask[:, 1], score[:, 1])


State = tuple[Tensor, Tensor]


class RecurrentGate(nn.Module):
    """SkipNet's recurrent gate: pool, a projection, one LSTM cell for all layers, straight-through.

    One module serves the whole network. The LSTM steps from layer to layer, and the caller carries its state,
    so that nothing of one input reaches the next::

        state = None
        for layer, block in enumerate(blocks):
            decision, state = gate(x, state, layer)
            x = block(x, decision.mask)

    Args:
        channels: the widths that the gate will see. Each entry has its own projection: give one for each
            layer, as SkipNet's code does, or each width once, which its layers then share.
        hidden: the LSTM's units, and the features of a projection.
        open_rate: the probability, about, that the gate gives at first. Its mask is open from 0.5 on, so at
            first it is open.

    Shape:
        - x: ``[N, C]`` or ``[N, C, ...]``, C of ``channels``.
        - state: None at the first layer, then what the last call returned: two ``[N, hidden]``.
        - layer: the index of the entry of ``channels``; None where C is in it once.
        - output: :class:`Decision` of ``[N]``, and the new state. The score is the probability that SkipNet's
          reinforcement learning samples from (:func:`sample_actions`).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Wang et al., SkipNet: Learning dynamic routing in convolutional networks (ECCV 2018).
    """

    def __init__(
        self, channels: Sequence[int], hidden: int = 10, *, open_rate: float = 0.85, device=None, dtype=None
    ):
        super().__init__()
        check_int("hidden", hidden)
        check_rate("open_rate", open_rate)
        self.channels = tuple(channels)
        if not self.channels:
            raise ValueError("channels: expected at least one width, got none")
        for width in self.channels:
            check_int("channels", width)
        self.hidden, self.open_rate = hidden, open_rate
        factory = {"device": device, "dtype": dtype}
        self.projections = nn.ModuleList(nn.Linear(width, hidden, **factory) for width in self.channels)
        self.rnn = nn.LSTMCell(hidden, hidden, **factory)
        self.proj = nn.Linear(hidden, 1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in self.projections:
            projection.reset_parameters()
        self.rnn.reset_parameters()
        open_(self.proj, logit(self.open_rate))

    def forward(
        self, x: Tensor, state: State | None = None, layer: int | None = None
    ) -> tuple[Decision, State]:
        projection = self.projections[self._entry(x, layer)]
        if state is not None:
            self._check_state(state, x.shape[0])
        state = self.rnn(projection(pool(x)), state)
        return straight_through(self.proj(state[0])[:, 0]), state

    def _entry(self, x: Tensor, layer: int | None) -> int:
        check_floating("x", x)
        if layer is None:
            width = x.shape[1] if x.dim() > 1 else None
            times = self.channels.count(width)
            if times > 1:
                raise ValueError(
                    f"layer: expected an index, as {width} channels are {times} times in {self.channels}"
                )
            if times == 0:
                raise ValueError(f"x: expected [N, C, ...], C of {self.channels}, got shape {tuple(x.shape)}")
            return self.channels.index(width)
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(self.channels):
            raise ValueError(f"layer: expected an int in [0, {len(self.channels)}), got {layer!r}")
        check_features(x, self.channels[layer])
        return layer

    def _check_state(self, state, batch: int) -> None:
        for part in state:
            if part.shape != (batch, self.hidden):
                raise ValueError(
                    f"state: expected two [{batch}, {self.hidden}], got shape {tuple(part.shape)}"
                )

    def extra_repr(self) -> str:
        return f"channels={self.channels}, hidden={self.hidden}"


class ConvGate(nn.Module):
    """SkipNet's feed-forward gates: convolutions, global average pool, two logits, straight-through.

    Form 1 (FFGate-I): 2×2 max pool, 3×3 convolution, 3×3 convolution of stride 2. Form 2 (FFGate-II): the
    convolution of stride 2 only. Each convolution keeps C channels and is followed by batch norm and relu. As
    a share of a basic block, with two 3×3 convolutions of C channels, form 1 costs 5/32 and form 2 costs 1/8:
    far more than a pooled gate.

    Args:
        channels: C.
        form: 1 or 2.
        open_rate: the probability, about, that the gate gives at first. Its mask is open from 0.5 on, so at
            first it is open.

    Shape:
        - x: ``[N, C, H, W]``, H and W at least 2 for form 1.
        - output: :class:`Decision`, mask and score ``[N]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Wang et al., SkipNet: Learning dynamic routing in convolutional networks (ECCV 2018).
    """

    def __init__(self, channels: int, form: int = 1, *, open_rate: float = 0.85, device=None, dtype=None):
        super().__init__()
        check_int("channels", channels)
        check_rate("open_rate", open_rate)
        if form not in (1, 2):
            raise ValueError(f"form: expected 1 (FFGate-I) or 2 (FFGate-II), got {form!r}")
        factory = {"device": device, "dtype": dtype}
        self.channels, self.form, self.open_rate = channels, form, open_rate
        strides = (1, 2) if form == 1 else (2,)
        for i, stride in enumerate(strides, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, channels, 3, stride, 1, bias=False, **factory))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels, **factory))
        self.linear = nn.Linear(channels, 2, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        _open_pair(self.linear, self.open_rate)

    def forward(self, x: Tensor) -> Decision:
        check_features(x, self.channels, 4)
        if self.form == 1:
            if min(x.shape[2:]) < 2:
                raise ValueError(f"x: expected H and W of at least 2, got shape {tuple(x.shape)}")
            x = F.max_pool2d(x, 2)
        x = F.relu(self.bn1(self.conv1(x)))
        if self.form == 1:
            x = F.relu(self.bn2(self.conv2(x)))
        logits = self.linear(pool(x))
        # the sigmoid of the difference is the softmax's second value
        return straight_through(logits[:, 1] - logits[:, 0])

    def extra_repr(self) -> str:
        return f"form={self.form}"
