"""Convolutions that decide themselves: dynamic group convolution (DGC) and channel gating (CGNet)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from ...kept import kept
from ...ops import gather_channels, masked_output_conv2d, packed_channel_conv2d
from ...ops.pixels.rows import memory_format_of
from ...plans import ChannelPlan
from ...stack.norm import fold, uses_batch_statistics
from ..exact import ExactBuffers
from ..from_dense import conv_options


class SaliencyHead(nn.Module):
    """One head of :class:`GroupedDynamicConv2d`: the saliency of each input channel, and a convolution of those kept."""

    def __init__(self, in_channels: int, out_channels: int, squeeze_rate: int, kernel_size, device, dtype):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **factory)
        hidden = in_channels // (squeeze_rate // 2 if in_channels < 80 else squeeze_rate)
        self.fc1 = nn.Linear(in_channels, hidden, bias=False, **factory)
        self.fc2 = nn.Linear(hidden, in_channels, **factory)
        nn.init.kaiming_normal_(self.fc1.weight)
        nn.init.kaiming_normal_(self.fc2.weight)
        nn.init.ones_(self.fc2.bias)

    def forward(self, pooled: Tensor, inactive: int) -> tuple[Tensor, ChannelPlan]:
        """The saliency ``[N, C]`` of the channel means ``[N, C]``, and the plan of the channels kept.

        The ``inactive`` least salient are dropped, those that tie with the last of them too, and those of no
        saliency, which contribute nothing.
        """
        saliency = F.relu(self.fc2(F.relu(self.fc1(pooled))))
        mask = saliency > 0
        if inactive > 0:
            mask = saliency > saliency.kthvalue(inactive, 1, keepdim=True).values
        return saliency, ChannelPlan.from_mask(mask, capacity=saliency.shape[1] - inactive)


class GroupedDynamicConv2d(ExactBuffers):
    """Dynamic group convolution: norm, relu, then each head convolves the input channels that it finds most salient.

    The constructor, parameters and ``state_dict`` are those of the published ``DynamicMultiHeadConv``: ``norm``,
    ``headconv_{i}.conv``, ``headconv_{i}.fc1``, ``headconv_{i}.fc2`` and ``_inactive_channels``.

    A head's kept channels are multiplied by their saliency, and only they are read; output channel ``c * heads + h`` is
    channel c of head h. Each sample and head has its own.

    Args:
        in_channels, out_channels: multiples of ``heads``.
        kernel_size, stride, padding, dilation: as in ``nn.Conv2d``.
        heads: groups of output channels.
        squeeze_rate: input channels / hidden channels of the saliency (half of it below 80 input channels).
        gate_factor: the share of the input channels that is kept when training ends.

    Attributes:
        global_progress: of the class, the share of training that is done. In training mode the number of dropped
            channels grows with it, from none at 1/12 to its last value at 3/4.
        inactive_channels: how many a head drops, kept in ``state_dict``.

    Shape:
        - input: ``[N, C, H, W]``.
        - output: the map ``[N, O, out_H, out_W]``, and the lasso loss: the mean saliency, summed over the heads.

    Raises:
        ValueError: channels that are no multiples of ``heads``, or a gate_factor outside (0, 1].

    Paper: Su et al., Dynamic Group Convolution (ECCV 2020).
    """

    global_progress = 0.0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.25,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if heads < 1 or in_channels % heads or out_channels % heads:
            raise ValueError(
                f"heads: expected a divisor of the {in_channels} input and {out_channels} output channels, got {heads}"
            )
        if not 0 < gate_factor <= 1:
            raise ValueError(f"gate_factor: expected it in (0, 1], got {gate_factor!r}")
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.squeeze_rate, self.gate_factor = squeeze_rate, gate_factor
        self.norm = nn.BatchNorm2d(in_channels, device=device, dtype=dtype)
        self.register_buffer("_inactive_channels", torch.zeros(1, device=device, dtype=torch.float32))
        self._inactive = 0  # the buffer's value on the host: reading it there would wait for a GPU
        for i in range(heads):
            head = SaliencyHead(in_channels, out_channels // heads, squeeze_rate, kernel_size, device, dtype)
            self.add_module(f"headconv_{i}", head)

    def _exact(self) -> tuple[str, ...]:
        return ("_inactive_channels",)  # a count: bfloat16 has no 257

    @property
    def inactive_channels(self) -> int:
        return self._inactive

    @inactive_channels.setter
    def inactive_channels(self, value: int) -> None:
        if not 0 <= value <= self.in_channels:
            raise ValueError(f"inactive_channels: expected 0 to {self.in_channels}, got {value}")
        self._inactive = int(value)
        self._inactive_channels.fill_(value)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._inactive = int(self._inactive_channels[0])

    def _schedule(self) -> None:
        progress = type(self).global_progress
        if progress <= 1 / 12:
            return
        share = min(1.5 * (progress - 1 / 12), 1.0)
        inactive = round(self.in_channels * (1 - self.gate_factor) * share)
        if inactive != self._inactive:
            self.inactive_channels = inactive

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self._schedule()
        x = F.relu(self.norm(input))
        pooled = x.mean((2, 3))
        outs, lasso = [], 0.0
        for i in range(self.heads):
            head = getattr(self, f"headconv_{i}")
            saliency, plan = head(pooled, self._inactive)
            lasso = lasso + saliency.mean()
            x_kept = gather_channels(x, plan) * gather_channels(saliency, plan)[:, :, None, None]
            outs.append(
                packed_channel_conv2d(
                    x_kept,
                    head.conv.weight,
                    None,
                    plan,
                    stride=self.stride,
                    padding=self.padding,
                    dilation=self.dilation,
                )
            )
        if memory_format_of(input) == torch.contiguous_format:
            return torch.stack(outs, 2).flatten(1, 2), lasso
        rows = torch.stack([out.permute(0, 2, 3, 1) for out in outs], -1)  # [N, H, W, O / heads, heads]
        return rows.flatten(3).permute(0, 3, 1, 2), lasso


class ChannelGatedConv2d(nn.Conv2d):
    """A convolution that reads the first 1/p of its input channels everywhere, and the rest behind a gate.

    The gate compares the normalised sum over the first channels with a learned threshold of each output channel. If the
    sum is larger, the rest of the input channels is added. ``state_dict`` has the keys of the published ``CGConv2d``:
    ``weight``, ``bias``, ``threshold`` ``[1, O, 1, 1]``, ``mask`` (which weights belong to the first sum) and
    ``bn.running_mean`` and the like.

    Args:
        in_channels to padding_mode: as in ``nn.Conv2d``, but ``bias=False``.
        sparse_bp: with gradients too, compute the rest only where the gate is open, and give the gate a gradient only
            there. Without it a call with gradients computes the rest everywhere, as a closed gate's gradient needs it.
        use_group: the first sum is a convolution of p groups instead: output chunk i reads input chunk i.
        shuffle: shuffle the input channels between p groups first.
        p: partitions of the input channels.
        th: the threshold's initial value.
        alpha: slope of the gate's surrogate gradient, the gradient of ``sigmoid(alpha * (bn(partial) - threshold))``.

    Attributes:
        num_out, num_full: outputs of the last call, and how many of them had all channels.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``; output: as ``nn.Conv2d``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Hua et al., Channel Gating Neural Networks (NeurIPS 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        sparse_bp: bool = False,
        use_group: bool = False,
        shuffle: bool = False,
        p: int = 4,
        th: float = -6.0,
        alpha: float = 2.0,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        self.sparse_bp, self.use_group, self.shuffle = sparse_bp, use_group, shuffle
        self.p, self.th, self.alpha = p, th, alpha
        self._check()
        self.base_channels = in_channels // groups // p  # of a group
        self.bn = nn.BatchNorm2d(out_channels, affine=False, device=device, dtype=dtype)
        self.register_buffer("mask", self._first_weights())
        self.threshold = nn.Parameter(torch.full((1, out_channels, 1, 1), th, device=device, dtype=dtype))
        self._open: Tensor | None = None

    def _check(self) -> None:
        inputs = self.in_channels // self.groups
        if not self.alpha > 0:
            raise ValueError(f"alpha: expected it above 0, got {self.alpha!r}")
        if not 1 <= self.p <= inputs:
            raise ValueError(f"p: expected 1 to {inputs}, the input channels of a group, got {self.p}")
        if self.use_group and self.groups != 1:
            raise ValueError(f"use_group: expected it with groups=1, got groups={self.groups}")
        if self.use_group and (self.in_channels % self.p or self.out_channels % self.p):
            raise ValueError(
                f"p: expected a divisor of {self.in_channels} input and {self.out_channels} output channels with "
                f"use_group, got {self.p}"
            )
        if self.shuffle and self.in_channels % self.p:
            raise ValueError(f"p: expected a divisor of {self.in_channels} input channels with shuffle, got {self.p}")  # fmt: skip

    def _first_weights(self) -> Tensor:
        """One where a weight belongs to the first sum, ``[O, C/groups, kh, kw]``."""
        mask = torch.zeros_like(self.weight, requires_grad=False)
        if not self.use_group:
            mask[:, : self.base_channels] = 1
            return mask
        o, c = self.out_channels // self.p, self.base_channels
        for i in range(self.p):
            mask[i * o : (i + 1) * o, i * c : (i + 1) * c] = 1
        return mask

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        loaded = state_dict.get(f"{prefix}mask")
        if loaded is not None and not torch.equal(loaded.cpu(), self.mask.cpu().to(loaded.dtype)):
            errors.append(
                f"{prefix}mask: expected the mask of p={self.p}, use_group={self.use_group}, got that of others"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input[None])[0]
        if self.shuffle:
            input = input.unflatten(1, (self.p, -1)).transpose(1, 2).flatten(1, 2)
        partial = self._partial(input)
        needs_grad = modes.differentiated(partial, self.threshold)
        if needs_grad or uses_batch_statistics(self.bn):
            excess = self.bn(partial) - self.threshold
            gate = excess > 0
        else:  # the same in one pass: factor * partial + shift > threshold
            factor, shift = fold(self.bn)
            gate = partial > (self.threshold - shift.view(1, -1, 1, 1)) / factor.view(1, -1, 1, 1)
        if not torch.compiler.is_compiling():
            self._open = gate
        if not needs_grad:
            return self._finish(input, gate, partial)
        soft = torch.sigmoid(self.alpha * excess)
        surrogate = soft - soft.detach()  # zero, with the gradient of soft
        if self.sparse_bp:
            out = self._finish(input, gate, partial)
            return out + (out - partial).detach() * surrogate
        rest = self._conv_rest(input)
        return partial + (gate + surrogate) * rest

    def _partial(self, input: Tensor) -> Tensor:
        c = self.base_channels
        if self.use_group:
            o = self.out_channels // self.p
            weight = self._made_of_weight(
                ("first", o, c),
                lambda w: torch.cat([w[i * o : (i + 1) * o, i * c : (i + 1) * c] for i in range(self.p)]),
            )
            return self._dense(input, weight, self.bias, self.p)
        first = input[:, :c] if self.groups == 1 else self._of_groups(input, 0, c)
        return self._dense(first, self.weight[:, :c], self.bias, self.groups)

    def _made_of_weight(self, key, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(self.weight)``; where no gradient is needed the same tensor every time, which is then packed once."""
        if not modes.plain(self.weight):
            return make(self.weight)
        return kept.get(key, lambda: make(self.weight), self.weight, self.mask)

    def _of_groups(self, input: Tensor, begin: int, end: int) -> Tensor:
        """Channels begin to end of each group."""
        return input.unflatten(1, (self.groups, -1))[:, :, begin:end].flatten(1, 2)

    def _rest(self, input: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        """Input, weight and the range of the input's channels of the second sum."""
        c, inputs = self.base_channels, self.in_channels // self.groups
        if self.use_group:
            return input, self._made_of_weight("rest", lambda w: w * (1 - self.mask)), None
        weight = self.weight[:, c:]
        if self.groups == 1:
            return input, weight, (c, inputs)
        return self._of_groups(input, c, inputs), weight, None

    def _finish(self, input: Tensor, gate: Tensor, partial: Tensor) -> Tensor:
        if self.p == 1:
            return partial
        x, weight, channels = self._rest(input)
        return masked_output_conv2d(
            x,
            weight,
            gate,
            partial,
            **conv_options(self),
            in_channels=channels,
        )

    def _conv_rest(self, input: Tensor) -> Tensor:
        if self.p == 1:
            return input.new_zeros(())
        x, weight, channels = self._rest(input)
        return self._dense(x if channels is None else x[:, slice(*channels)], weight, None, self.groups)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    @property
    def num_out(self) -> int:
        return 0 if self._open is None else self._open.numel()

    @property
    def num_full(self) -> int:
        return 0 if self._open is None else int(self._open.count_nonzero())
