"""Convolutions that compute their weight from their parameters alone, as weight standardisation does: it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ... import modes
from ...kept import kept

_NUMBERS = (int, float, bool, str, tuple, type(None))


class _Call(NamedTuple):
    """The one convolution that a forward calls on its input."""

    weight: Tensor
    bias: Tensor | None
    arguments: tuple  # stride, padding, dilation, groups


class _Recorder(TorchFunctionMode):
    """Records the calls of ``F.conv2d``."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            self.calls.append((args, kwargs or {}, out))
        return out


def constant_conv(module: nn.Module, forward: Callable, x: Tensor):
    """``forward(module, x)`` of a subclass of nn.Conv2d by one convolution with a kept weight.

    NotImplemented where a gradient is needed, or the forward does anything else: pads, or makes its weight of its input.
    """
    parameters = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    if not parameters or module.training or modes.differentiated(x, *parameters) or module._modules:
        return NotImplemented
    settings = tuple([(k, v) for k, v in vars(module).items() if isinstance(v, _NUMBERS)])
    found = kept.get(
        ("convolution", type(module), settings), lambda: _weight_and_more(module, forward), *parameters
    )
    if len(found) == 1:  # it is no such convolution
        return NotImplemented
    weight, bias, numbers = found
    stride, padding, dilation, (groups, with_bias) = numbers.view(4, 2).tolist()
    return F.conv2d(x, weight, bias if with_bias else None, stride, padding, dilation, groups)


def _weight_and_more(module: nn.Module, forward: Callable) -> tuple[Tensor, ...]:
    """The weight, the bias and the sizes as tensors, as they are kept; one empty tensor where there is no such thing."""
    calls = [_probed(module, forward, seed) for seed in (0, 1)]
    none = (torch.empty(0),)
    if None in calls or not torch.equal(calls[0].weight, calls[1].weight):
        return none
    weight, bias, (stride, padding, dilation, groups) = calls[0]
    pairs = [v if isinstance(v, (tuple, list)) else (v, v) for v in (stride, padding, dilation)]
    if any(isinstance(v, str) for pair in pairs for v in pair):
        return none
    numbers = torch.tensor([*map(list, pairs), [groups, bias is not None]])
    bias = torch.empty(0) if bias is None else bias.clone()
    return weight.clone(), bias, numbers


def _probed(module: nn.Module, forward: Callable, seed: int) -> _Call | None:
    """What a forward calls on a random input."""
    weight = module.weight
    extent = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    values = torch.randn(1, module.in_channels, *extent, generator=torch.Generator().manual_seed(seed))
    probe = values.to(weight.device, weight.dtype)
    with _Recorder() as recorder:
        out = forward(module, probe)
    if len(recorder.calls) != 1:
        return None
    args, kwargs, made = recorder.calls[0]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= {**dict(zip(names, args, strict=False)), **kwargs}
    if given["input"] is not probe or made is not out:
        return None
    return _Call(given["weight"], given["bias"], tuple(given[name] for name in names[3:]))
