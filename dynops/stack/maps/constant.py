"""Convolutions that compute their weight from their parameters alone, as weight standardisation does: it is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
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
    """Records the calls of ``F.conv2d``, and computes none."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        out = torch.empty(0, device="cpu")
        self.calls.append((args, kwargs or {}, out))
        return out


def constant_conv(module: nn.Module, forward: Callable, x: Tensor):
    """``forward(module, x)`` of a subclass of nn.Conv2d by one convolution with a kept weight.

    NotImplemented where a gradient is needed, or the forward does anything else: pads, or makes its weight of its input.
    """
    parameters = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    if is_compiling():  # whose graph makes the weight in each call
        return NotImplemented
    if not parameters or module.training or modes.differentiated(x, *parameters) or module._modules:
        return NotImplemented
    settings = _settings(module, forward)
    if settings is None:
        return NotImplemented
    key = ("convolution", type(module), settings, modes.autocast_dtype(x))
    found = _kept_call(module, forward, key, parameters)
    return NotImplemented if found is None else F.conv2d(x, found.weight, found.bias, *found.arguments)


def _kept_call(module: nn.Module, forward: Callable, key: tuple, parameters: list) -> _Call | None:
    found = kept.get(key, lambda: _weight_and_more(module, forward), *parameters)
    if len(found) == 1:  # it is no such convolution
        return None
    weight, bias, numbers = found
    stride, padding, dilation, (groups, with_bias) = numbers.view(4, 2).tolist()
    return _Call(
        weight, bias if with_bias else None, (tuple(stride), tuple(padding), tuple(dilation), groups)
    )


class Standardised:
    """A subclass of nn.Conv2d whose weight is made of its parameters alone, seen as the convolution that it calls.

    Attributes:
        arguments: stride, padding, dilation and groups.

    Raises:
        ValueError: it is no such module.
    """

    def __init__(self, module: nn.Conv2d, forward: Callable):
        self.module, self.forward = module, forward
        settings = (
            None if module.training or module._modules or not self.tensors() else _settings(module, forward)
        )
        self._key = "convolution", type(module), settings, None
        call = None if settings is None else self._call()
        if call is None:
            raise ValueError(
                f"module: expected a convolution by a weight of its parameters alone, got {module}"
            )
        self.arguments = call.arguments
        self._state = [*vars(module).values()]

    def holds(self) -> bool:
        """True where nothing was set on the module since."""
        return [*vars(self.module).values()] == self._state

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that the weight is made of."""
        return (*self.module._parameters.values(), *self.module._buffers.values())

    @property
    def _parameters(self) -> dict[str, Tensor | None]:
        found = self._call()
        return {"weight": found.weight, "bias": found.bias}

    def _call(self) -> _Call | None:
        return _kept_call(self.module, self.forward, self._key, [t for t in self.tensors() if t is not None])


_OF_MODULES = frozenset(vars(nn.Conv2d(1, 1, 1)))  # hooks and the like


def _settings(module: nn.Module, forward: Callable) -> tuple | None:
    """The numbers of a module and of its classes; None where a forward may read something else, which may change."""
    if _reads_globals(forward):
        return None
    numbers = []
    for name, value in vars(module).items():
        if isinstance(value, _NUMBERS):
            numbers.append((name, value))
        elif name not in _OF_MODULES:
            return None
    for kind in type(module).__mro__:
        if kind is nn.Conv2d:
            break
        numbers += [(name, value) for name, value in vars(kind).items() if isinstance(value, _NUMBERS)]
    return tuple(numbers)


@functools.cache
def _reads_globals(forward: Callable) -> bool:
    """True for a forward with global variables that are no modules, classes or functions."""
    code = getattr(forward, "__code__", None)
    if code is None:
        return True
    found = [forward.__globals__[name] for name in code.co_names if name in forward.__globals__]
    return not all(callable(value) or isinstance(value, ModuleType) for value in found)


def _weight_and_more(module: nn.Module, forward: Callable) -> tuple[Tensor, ...]:
    """The weight, the bias and the sizes as tensors, as they are kept; one empty tensor where there is no such thing."""
    none = (torch.empty(0, device="cpu"),)
    devices = [module.weight.device] if module.weight.is_cuda else []
    with torch.random.fork_rng(devices):
        first, *others = [_probed(module, forward, i) for i in range(3)]
    if first is None or any(other is None or not _same(first, other) for other in others):
        return none
    weight, bias, (stride, padding, dilation, groups) = first
    pairs = [v if isinstance(v, (tuple, list)) else (v, v) for v in (stride, padding, dilation)]
    if any(isinstance(v, str) for pair in pairs for v in pair):
        return none
    numbers = torch.tensor([*map(list, pairs), [groups, bias is not None]], device="cpu")
    bias = torch.empty(0, device="cpu") if bias is None else bias.clone()
    return weight.clone(), bias, numbers


def _same(a: _Call, b: _Call) -> bool:
    if a.arguments != b.arguments or (a.bias is None) != (b.bias is None):
        return False
    return torch.equal(a.weight, b.weight) and (a.bias is None or torch.equal(a.bias, b.bias))


def _probed(module: nn.Module, forward: Callable, i: int) -> _Call | None:
    """What a forward calls on an input of one random value, of batch and size that grow with ``i``."""
    copied = object.__new__(type(module))  # takes what the forward writes
    copied.__dict__.update(vars(module))
    before, weight = dict(copied.__dict__), module.weight
    grown = (1, 2, 5)[i]  # small: a forward may pad, and so copy, it
    sizes = [(d * (k - 1) + 1) * grown for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    value = torch.randn((), generator=torch.Generator("cpu").manual_seed(i), device="cpu").to(
        weight.device, weight.dtype
    )
    probe = value.expand(1 + i, module.in_channels, *sizes)
    with _Recorder() as recorder:
        out = forward(copied, probe)
    if len(recorder.calls) != 1 or vars(copied) != before:
        return None
    args, kwargs, made = recorder.calls[0]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= {**dict(zip(names, args, strict=False)), **kwargs}
    if given["input"] is not probe or made is not out:
        return None
    return _Call(given["weight"], given["bias"], tuple(given[name] for name in names[3:]))
