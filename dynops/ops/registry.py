"""Registers an op under ``torch.ops.dynops``: its schema, its reference, its fake, its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..observers import observed, refuse_tracing
from .flops import register_formulas

library = torch.library.Library("dynops", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """A registered op, called by the shortest way.

    Where something looks on (a compiler, a tensor subclass, a dispatch mode, a profiler) the call goes through
    the dispatcher; where a gradient is needed through one ``autograd.Function``, which took 60 us less of a
    small layer's training step than ``register_autograd``; else straight to the implementation.
    """

    def __init__(self, name: str, implementation: Callable, function: type[torch.autograd.Function] | None):
        self.overload = getattr(torch.ops.dynops, name).default
        self.implementation, self.function = implementation, function

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if torch._C._are_functorch_transforms_active():  # torch.func.grad
            run = self.overload if self.function is None else self.function.transformed.apply
            return run(*arguments)
        if observed():
            register_formulas()
            return self.overload(*arguments)
        needs_grad = False
        for value in arguments:
            if isinstance(value, Tensor):
                if type(value) not in _PLAIN:
                    return self.overload(*arguments)
                needs_grad |= value.requires_grad
        if needs_grad and self.function is not None and torch.is_grad_enabled():
            return self.function.apply(*arguments)
        return self.implementation(*arguments)


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Op:
    """Defines ``dynops::<schema>`` with a Python implementation for every device, and its gradient if any.

    A kernel that the binary registers for one device goes before it.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, _untraced(name), "Tracer")
    torch.library.register_fake(f"dynops::{name}", fake, lib=library)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"dynops::{name}", "CUDA"):
        implementation = _or_binary(name, implementation)
    if backward is None:
        return Op(name, implementation, None)
    torch.library.register_autograd(f"dynops::{name}", backward, setup_context=setup_context, lib=library)
    return Op(name, implementation, _function(name, implementation, setup_context, backward))


def _untraced(name: str) -> Callable:
    """What TorchScript's tracer calls in the place of an op that something calls by its name, as plans do."""

    def run(*arguments, **named):
        refuse_tracing()

    return run


def _or_binary(name: str, implementation: Callable) -> Callable:
    """``implementation``, but on a GPU the kernel that the binary registers under this op's name."""
    overload = getattr(torch.ops.dynops, name).default

    def run(*arguments):
        if any(isinstance(value, Tensor) and value.is_cuda for value in arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*arguments)
        return implementation(*arguments)

    return run


def _function(name: str, implementation, setup_context, backward) -> type[torch.autograd.Function]:
    def forward(ctx, *inputs):
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    once = once_differentiable(backward)

    def backward_once(ctx, *grads):  # what once_differentiable does is needed under create_graph only
        return (once if torch.is_grad_enabled() else backward)(ctx, *grads)

    def make(**methods):
        methods = {key: staticmethod(method) for key, method in methods.items()}
        return type(name, (torch.autograd.Function,), methods)

    # torch.func asks for a setup_context of its own; with one, torch binds a signature at each call: 40 us
    function = make(forward=forward, backward=backward_once)
    function.transformed = make(forward=implementation, setup_context=setup_context, backward=once)
    return function
