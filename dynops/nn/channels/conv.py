"""A convolution and a linear layer on the live channels of each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import modes
from ...ops import channel_conv2d, channel_linear, packed_channel_conv2d
from ...plans import ChannelPlan, as_channel_plan
from ...stack.norm import fold, uses_batch_statistics
from ..from_dense import FromDense, conv_options, with_batch
from .norm import norm_channels


class ChannelConv2d(FromDense, nn.Conv2d):
    """``nn.Conv2d`` that reads and computes only the live channels of each sample.

    Constructor, parameters and ``state_dict`` are those of ``nn.Conv2d``; so is the result, bit for bit,
    where there is neither a plan nor another argument. Called as ``layer(x, in_plan, out_plan)``.

    Shape:
        - input: ``[N, C, H, W]`` (channels_last is the fast format) or ``[C, H, W]``; with ``packed=True`` and an
          ``in_plan`` ``[N, in_plan.width, H, W]``, its live channels.
        - in_plan, out_plan: a :class:`dynops.ChannelPlan`, or a mask ``[N, C]`` (a subset for each sample) or
          ``[C]`` (one for all), nonzero = live; None: all channels. ``in_plan`` may have heads.
        - norm: an ``nn.BatchNorm2d`` (of O features) that follows; its statistics in training are those of the
          live channels (:class:`ChannelBatchNorm2d`). Without gradients in eval mode it is fused.
        - scale: ``[N, O]``, a soft gate, through which the gate's gradient flows.
        - activation: None or a name that ``dynops.ops.channel_conv2d`` takes.
        - base: ``[N, O, out_H, out_W]``, the output at channels that are not live; zero if None.
        - output: ``where(out_mask, activation(scale * norm(conv(where(in_mask, input, 0)))), base)``, format and
          dtype of ``input``; with ``packed=True`` and an ``out_plan`` its live channels,
          ``[N, out_plan.width, out_H, out_W]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: RNP (NIPS 2017), FBS (ICLR 2019), Batch-Shaping (ICLR 2020).
    """

    _dense = nn.Conv2d

    def forward(
        self,
        input: Tensor,
        in_plan: ChannelPlan | Tensor | None = None,
        out_plan: ChannelPlan | Tensor | None = None,
        *,
        scale: Tensor | None = None,
        base: Tensor | None = None,
        norm: nn.BatchNorm2d | None = None,
        activation: str | None = None,
        packed: bool = False,
    ) -> Tensor:
        if _nothing(in_plan, out_plan, scale, base, norm, activation):
            return nn.Conv2d.forward(self, input)
        if packed and base is not None:
            raise ValueError("base: expected None with packed=True, which has no channels that are not live")
        x, batched = with_batch(input)
        if not batched:
            scale = scale[None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
            base = base[None] if isinstance(base, Tensor) and base.dim() == 3 else base
        in_plan, out_plan = _plan(in_plan, "in_plan"), _plan(out_plan, "out_plan")
        out = self._run(x, in_plan, out_plan, scale, base, norm, activation, packed)
        return out if batched else out[0]

    def _run(self, x, in_plan, out_plan, scale, base, norm, activation, packed: bool) -> Tensor:
        if norm is None:
            return self._conv(x, self.bias, in_plan, out_plan, scale, base, activation, packed)
        if norm.num_features != self.out_channels:
            raise ValueError(f"norm: expected {self.out_channels} features, got {norm.num_features}")
        if _folds(norm, x):
            scale, bias = self._with_norm(norm, x, scale)
            return self._conv(x, bias, in_plan, out_plan, scale, base, activation, packed)
        out = self._conv(x, self.bias, in_plan, out_plan, None, None, None, packed)
        out = norm_channels(norm, out, out_plan, scale, activation, packed and out_plan is not None)
        if base is None or out_plan is None:
            return out
        return torch.where(out_plan.mask().view(-1, self.out_channels, 1, 1), out, base)

    def _conv(self, x, bias, in_plan, out_plan, scale, base, activation, packed: bool) -> Tensor:
        run, rest = (packed_channel_conv2d, {}) if packed else (channel_conv2d, {"base": base})
        return run(
            x,
            self.weight,
            bias,
            in_plan,
            out_plan,
            **conv_options(self),
            activation=activation,
            scale=scale,
            **rest,
        )

    def _with_norm(self, norm: nn.BatchNorm2d, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scale ``[N, O]`` and bias ``[O]`` with ``scale * (conv + bias)`` the scaled norm of the convolution.

        ``f * (conv + b) + s = f * (conv + b + s / f)``; a factor f of zero is taken for 1e-20, which leaves s.
        """
        factor, shift = fold(norm)
        factor = torch.where(factor.abs() < 1e-20, 1e-20, factor)
        bias = shift / factor
        bias = (bias if self.bias is None else bias + self.bias).to(self.weight.dtype)
        return (factor.repeat(len(x), 1) if scale is None else factor * scale), bias


def _nothing(*arguments) -> bool:
    return all(value is None for value in arguments)


def _plan(mask_or_plan, name: str) -> ChannelPlan | None:
    return None if mask_or_plan is None else as_channel_plan(mask_or_plan, name)


def _folds(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """True if the convolution's scale and bias can take the norm: no gradient, and a range that holds shift / factor."""
    if torch.is_grad_enabled() or modes.transformed() or uses_batch_statistics(norm):
        return False
    return (modes.autocast_dtype(x) or x.dtype) != torch.float16


class ChannelLinear(FromDense, nn.Linear):
    """``nn.Linear`` that reads and computes only the live features of each sample.

    Constructor, parameters and ``state_dict`` are those of ``nn.Linear``; so is the result, bit for bit, where
    there is neither a plan nor another argument. Called as ``layer(x, in_plan, out_plan)``.

    Shape:
        - input: ``[N, ..., I]`` (the plans' lists are those of the N samples) or ``[I]``; with ``packed=True`` and an
          ``in_plan`` ``[N, ..., in_plan.width]``.
        - in_plan, out_plan: a :class:`dynops.ChannelPlan`, or a mask ``[N, I]`` or ``[I]``; None: all.
        - scale: ``[N, O]``; base: ``[N, ..., O]``; activation: as in :class:`ChannelConv2d`.
        - output: ``where(out_mask, activation(scale * linear(where(in_mask, input, 0))), base)``; with ``packed=True``
          and an ``out_plan`` its live features, ``[N, ..., out_plan.width]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: conditional computation (Bengio et al., 2015), FBS (ICLR 2019).
    """

    _dense = nn.Linear

    def forward(
        self,
        input: Tensor,
        in_plan: ChannelPlan | Tensor | None = None,
        out_plan: ChannelPlan | Tensor | None = None,
        *,
        scale: Tensor | None = None,
        base: Tensor | None = None,
        activation: str | None = None,
        packed: bool = False,
    ) -> Tensor:
        if _nothing(in_plan, out_plan, scale, base, activation):
            return nn.Linear.forward(self, input)
        if not isinstance(input, Tensor) or input.dim() == 0:
            what = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"input: expected a tensor [N, ..., I] or [I], got {what}")
        if packed and base is not None:
            raise ValueError("base: expected None with packed=True, which has no features that are not live")
        batched = input.dim() > 1
        if not batched:
            input = input[None]
            scale, base = (t[None] if isinstance(t, Tensor) and t.dim() == 1 else t for t in (scale, base))
        plans = _plan(in_plan, "in_plan"), _plan(out_plan, "out_plan")
        if packed:
            out = self._packed(input, *plans, scale, activation)
        else:
            out = channel_linear(input, self.weight, self.bias, *plans, activation=activation, scale=scale, base=base)  # fmt: skip
        return out if batched else out[0]

    def _packed(self, x: Tensor, in_plan, out_plan, scale, activation) -> Tensor:
        """The layer as a 1x1 convolution of a map ``[N, width, 1, rows]``."""
        rows = x.shape[1:-1].numel()
        as_map = x.reshape(x.shape[0], 1, rows, x.shape[-1]).permute(0, 3, 1, 2)
        weight = self.weight[:, :, None, None]
        out = packed_channel_conv2d(as_map, weight, self.bias, in_plan, out_plan, activation=activation, scale=scale)  # fmt: skip
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], out.shape[1])
