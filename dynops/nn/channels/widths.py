"""Slimmable layers: one set of parameters, run at several widths, for a whole batch or for each sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from ...geometry import is_int
from ...ops import channel_conv2d, channel_linear
from ...plans import ChannelPlan
from ..from_dense import conv_options

Width = int | float | Tensor


class Slimmable:
    """A layer with a width: what :func:`set_width` finds."""

    width: Width | None = None


def set_width(module: nn.Module, width: Width | None) -> nn.Module:
    """Sets the width at which every slimmable layer in ``module`` runs where a call names none.

    Args:
        width: what the layers take: the index of a switch, for universally slimmable layers a multiplier, a
            tensor ``[N]`` of either; None: the widest. A layer that cannot have it raises when it is called.

    Raises:
        ValueError: a module without slimmable layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Slimmable)]
    if not layers:
        raise ValueError(f"module: expected one with slimmable layers, got a {type(module).__name__} without")
    for layer in layers:
        layer.width = width
    return module


class Side:
    """The channels of a layer's input or output: a list, one for each switch, or any width up to ``most``."""

    def __init__(self, channels: int | list[int], name: str, slims: bool = True, ratio: int = 1):
        self.universal = is_int(channels)
        self.list = [channels] if self.universal else list(channels)
        if not self.list or not all(is_int(c, 1) for c in self.list):
            raise ValueError(f"{name}: expected an int >= 1 or a list of them, got {channels!r}")
        self.most, self.slims, self.ratio = max(self.list), slims, ratio

    def of(self, width: Width | None) -> int | Tensor:
        """The channels at a width: an int, or ints ``[N]`` where it is a tensor and they differ."""
        if width is None or (self.universal and not self.slims):
            return self.most
        return self._scaled(width) if self.universal else self._listed(width)

    def _listed(self, width: Width) -> int | Tensor:
        switches = len(self.list)
        if isinstance(width, Tensor):
            _of_samples(width, torch.int64, f"the index of one of {switches} switches")
            if modes.may_look(width) and width.numel():
                _within(int(width.min()), int(width.max()), 0, switches - 1)
            if len(set(self.list)) == 1:
                return self.most
            return torch.tensor(self.list, device=width.device)[width.long()]
        if not is_int(width):
            raise TypeError(f"width: expected the index of one of {switches} switches, got {width!r}")
        _within(width, width, 0, switches - 1)
        return self.list[width]

    def _scaled(self, width: Width) -> int | Tensor:
        if isinstance(width, Tensor):
            _of_samples(width, torch.float32, "a multiplier in (0, 1]")
            # float32 has 0.9 as 0.89999998: rounded, so that it has the channels that 0.9 has
            channels = (width.double() * self.most / self.ratio).round(decimals=3)
            return _divisible(channels, self.ratio, self.most)
        if isinstance(width, bool) or not isinstance(width, (int, float)):
            raise TypeError(f"width: expected a multiplier in (0, 1], got {width!r}")
        if not 0 < width <= 1:
            raise ValueError(f"width: expected a multiplier in (0, 1], got {width!r}")
        value = torch.tensor(width * self.most / self.ratio, dtype=torch.float64, device="cpu")
        return int(_divisible(value, self.ratio, self.most))


def _of_samples(width: Tensor, kind: torch.dtype, what: str) -> None:
    if width.dim() != 1 or width.is_floating_point() != kind.is_floating_point or width.dtype == torch.bool:
        raise TypeError(
            f"width: expected {what} for each sample, [N], got {width.dtype} {tuple(width.shape)}"
        )


def _within(least: int, most: int, low: int, high: int) -> None:
    if least < low or most > high:
        raise ValueError(f"width: expected {low} to {high}, got {least} to {most}")


def _divisible(channels: Tensor, ratio: int, most: int) -> Tensor:
    """The multiple of 8 nearest to ``channels``, none more than 10 % less, times ``ratio``; ``most`` at the most."""
    rounded = ((channels + 4).floor().long() // 8 * 8).clamp(min=1)
    rounded = torch.where(rounded < 0.9 * channels, rounded + 8, rounded)
    return (rounded * ratio).clamp(max=most)


def _prefix(channels: int | Tensor, most: int) -> ChannelPlan | None:
    """The plan of a width for each sample, or None where all samples have all channels."""
    return ChannelPlan.prefix(channels, most) if isinstance(channels, Tensor) else None


def _same_switches(first: Side, second: Side, names: str) -> None:
    if first.universal != second.universal or len(first.list) != len(second.list):
        raise ValueError(
            f"{names}: expected two ints or two lists of the same length, got {first.list} and {second.list}"
        )


class SlimmableConv2d(Slimmable, nn.Conv2d):
    """``nn.Conv2d`` that runs at several widths: the first channels of its input and of its output.

    The parameters and ``state_dict`` are those of the ``nn.Conv2d`` of the widest switch. With lists the layer has
    a switch for each entry, and a width is the index of one; with ints it is universally slimmable: a width
    is a multiplier in (0, 1], rounded to a multiple of 8 channels as the published code does.

    Args:
        in_channels_list, out_channels_list: lists of as many entries as there are switches, or two ints.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as in ``nn.Conv2d``.
        groups_list: groups of each switch, ``[1]`` for 1 in all. Channels of a group are those of the widest switch. A
            universally slimmable layer takes ``[1]`` or, for a depthwise one, ``[in_channels]``.
        us: of a universally slimmable layer: whether its input and its output slim.
        ratio: of a universally slimmable layer: the input's and the output's channels are multiples of it.

    Shape:
        - width: None (what :func:`set_width` set, or the widest); for the whole batch an int or float; or a tensor
          ``[N]``, a width for each sample.
        - input: for the whole batch ``[N, channels of the width, H, W]``; for each sample ``[N, C, H, W]``, of which
          channels past a sample's width are not read.
        - output: for the whole batch the first channels, ``[N, channels of the width, out_H, out_W]``; for each sample
          ``[N, O, out_H, out_W]``, zero past a sample's width.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Yu et al., Slimmable Neural Networks (ICLR 2019); Yu and Huang, Universally Slimmable Networks (ICCV 2019).
    """

    def __init__(
        self,
        in_channels_list: list[int] | int,
        out_channels_list: list[int] | int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups_list: list[int] | tuple[int, ...] = (1,),
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        us: tuple[bool, bool] = (True, True),
        ratio: tuple[int, int] = (1, 1),
    ):
        inputs = Side(in_channels_list, "in_channels_list", us[0], ratio[0])
        outputs = Side(out_channels_list, "out_channels_list", us[1], ratio[1])
        _same_switches(inputs, outputs, "in_channels_list, out_channels_list")
        super().__init__(
            inputs.most, outputs.most, kernel_size, stride, padding, dilation, max(groups_list), bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.in_channels_list, self.out_channels_list = inputs.list, outputs.list
        self.groups_list = list(groups_list)
        if len(self.groups_list) == 1:
            self.groups_list *= len(inputs.list)
        self._inputs, self._outputs = inputs, outputs
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups == 1:
            return
        depthwise = self.groups == self.in_channels == self.out_channels
        fits = depthwise if self._inputs.universal else self._groups_fit()
        if not fits:
            raise ValueError(
                f"groups_list: expected groups of the same channels in every switch ({self.in_channels // self.groups} "
                f"in, {self.out_channels // self.groups} out), got {self.groups_list} for {self.in_channels_list} and "
                f"{self.out_channels_list}"
            )

    def _groups_fit(self) -> bool:
        switches = zip(self.in_channels_list, self.out_channels_list, self.groups_list, strict=True)
        return len(self.groups_list) == len(self.in_channels_list) and all(
            i * self.groups == self.in_channels * g and o * self.groups == self.out_channels * g
            for i, o, g in switches
        )

    def forward(self, input: Tensor, width: Width | None = None) -> Tensor:
        width = self.width if width is None else width
        inputs, outputs = self._inputs.of(width), self._outputs.of(width)
        if isinstance(width, Tensor):
            return self._per_sample(input, inputs, outputs)
        return self._per_batch(input, inputs, outputs)

    def _per_batch(self, input: Tensor, inputs: int, outputs: int) -> Tensor:
        if input.dim() in (3, 4) and input.shape[-3] != inputs:
            raise ValueError(
                f"input: expected {inputs} channels at this width, got shape {tuple(input.shape)}"
            )
        groups = self.groups * inputs // self.in_channels if self.groups > 1 else 1
        weight = self.weight[:outputs, : inputs // groups]
        bias = None if self.bias is None else self.bias[:outputs]
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, groups)

    def _per_sample(self, input: Tensor, inputs: int | Tensor, outputs: int | Tensor) -> Tensor:
        return channel_conv2d(
            input,
            self.weight,
            self.bias,
            _prefix(inputs, self.in_channels),
            _prefix(outputs, self.out_channels),
            **conv_options(self),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in={self.in_channels_list}, out={self.out_channels_list}"


class SlimmableLinear(Slimmable, nn.Linear):
    """``nn.Linear`` that runs at several widths: the first features of its input and of its output.

    As :class:`SlimmableConv2d`.

    Args:
        in_features_list, out_features_list: lists of as many entries as there are switches, or two ints.
        bias, device, dtype: as in ``nn.Linear``.
        us: of a universally slimmable layer: whether its input and its output slim.

    Shape:
        - input: ``[..., features of the width]``; with a width for each sample ``[N, ..., I]``.
        - output: ``[..., features of the width]``; with a width for each sample ``[N, ..., O]``, zero past it.
    """

    def __init__(
        self,
        in_features_list: list[int] | int,
        out_features_list: list[int] | int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        us: tuple[bool, bool] = (True, True),
    ):
        inputs = Side(in_features_list, "in_features_list", us[0])
        outputs = Side(out_features_list, "out_features_list", us[1])
        _same_switches(inputs, outputs, "in_features_list, out_features_list")
        super().__init__(inputs.most, outputs.most, bias, device, dtype)
        self.in_features_list, self.out_features_list = inputs.list, outputs.list
        self._inputs, self._outputs = inputs, outputs

    def forward(self, input: Tensor, width: Width | None = None) -> Tensor:
        width = self.width if width is None else width
        inputs, outputs = self._inputs.of(width), self._outputs.of(width)
        if isinstance(width, Tensor):
            plans = _prefix(inputs, self.in_features), _prefix(outputs, self.out_features)
            return channel_linear(input, self.weight, self.bias, *plans)
        if input.shape[-1] != inputs:
            raise ValueError(
                f"input: expected {inputs} features at this width, got shape {tuple(input.shape)}"
            )
        bias = None if self.bias is None else self.bias[:outputs]
        return F.linear(input, self.weight[:outputs, :inputs], bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in={self.in_features_list}, out={self.out_features_list}"
