"""Contenders: calls without arguments, and the versions of a dense function or network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .setting import Setting

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
NO_MAP = {"": torch.contiguous_format}


def formats_of(x: Tensor) -> dict[str, torch.memory_format]:
    """The memory formats to measure ``x`` in: two, or one without a name where it is no map."""
    return FORMATS if x.dim() == 4 else NO_MAP


def bound(function: Callable, *arguments, **options) -> Callable:
    """The call of ``function`` with these arguments."""
    return lambda: function(*arguments, **options)


def with_backward(call: Callable, leaves: Iterable[Tensor], grad: Tensor | None = None) -> Callable:
    """A call that computes the gradients of ``leaves`` too; without ``grad``, those of the sum of squares."""
    leaves = list(leaves)
    if grad is None:
        return lambda: torch.autograd.grad(call().square().sum(), leaves)
    return lambda: torch.autograd.grad(call(), leaves, grad)


def dense_versions(make: Callable, setting: Setting, formats: dict = FORMATS) -> dict[str, Callable]:
    """The calls of ``formats`` x {eager, torch.compile}, with the backward pass where the setting has one.

    Args:
        make: called with a memory format, it returns ``(function, arguments, leaves, grad)``: the gradients are
            those of ``leaves`` for ``grad``, as :func:`with_backward` takes it.
    """
    torch._dynamo.reset()  # a recompilation limit is counted over all layers otherwise
    found = {}
    for name, memory_format in formats.items():
        function, arguments, leaves, grad = make(memory_format)
        functions = {"eager": function}
        if setting.compiles(name):
            functions["compiled"] = torch.compile(function, dynamic=False)
        for kind, own in functions.items():
            call = bound(own, *arguments)
            found[f"{name} {kind}".strip()] = with_backward(call, leaves, grad) if setting.backward else call
    return found


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in eval mode, the statistics of its norms those of the batch ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
