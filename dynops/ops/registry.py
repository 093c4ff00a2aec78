"""Registers an op under ``torch.ops.dynops``: its schema, its reference, its fake, and its rules.

The rules are those of reverse-mode AD (``backward``), of forward-mode AD (``terms``, or ``jvp``) and of
``torch.func.vmap`` (``vmap``, else slice by slice). A ``backward`` is made of ops, so that it has derivatives too.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .. import modes
from ..scripting import refuse_onnx, refuse_tracing
from .batching import vmap_rules
from .flops import register_formulas

library = torch.library.Library("dynops", "FRAGMENT")
OPS: dict[str, Op] = {}  # by their names


class Op:
    """A registered op, called by the shortest way (``modes.route``).

    Where a gradient is needed that is one ``autograd.Function``, which took 60 us less of a small layer's training
    step than ``register_autograd``.
    """

    def __init__(self, name: str, implementation: Callable, function: type[torch.autograd.Function] | None):
        self.overload = getattr(torch.ops.dynops, name).default
        self.implementation, self.function = implementation, function
        OPS[name] = self

    def __call__(self, *arguments):
        route = modes.route(*arguments)
        if route == modes.DISPATCHED:
            if torch.compiler.is_exporting():
                refuse_onnx()
            if torch.compiler.is_compiling():  # dynamo of torch 2.11 takes no named tuple for an int[]
                arguments = [list(a) if isinstance(a, tuple) else a for a in arguments]
            elif modes.observed():
                register_formulas()
            return self.overload(*arguments)
        if route == modes.DIFFERENTIATED and self.function is not None:
            return self.function.apply(*arguments)
        return self.implementation(*arguments)


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    *,
    terms: str = "",
    jvp: Callable | None = None,
    vmap: Callable | None = None,
) -> Op:
    """Defines ``dynops::<schema>`` with a Python implementation for every device, and its gradient if any.

    A kernel that the binary registers for one device goes before it.

    Args:
        setup_context, backward: as ``torch.library.register_autograd`` has them. ``backward`` calls ops that have a
            gradient. None: the result is integer or bool.
        terms: the result as a sum of products of arguments, for example "x weight, bias": linear in each. From it
            follows the derivative of forward-mode AD.
        jvp: that derivative where ``terms`` cannot say it: ``(op, primals, tangents)`` to the result's tangent.
        vmap: a rule of :mod:`dynops.ops.batching`; None: the op runs slice by slice.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.dynops, name):  # of the binary, for programs without Python
        _check_binary(name, schema)
    else:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # before a kernel under CompositeExplicitAutograd, which the binary has for programs without Python
    library.impl(name, implementation, "CompositeExplicitAutogradNonFunctional")
    library.impl(name, _untraced(name), "Tracer")
    torch.library.register_fake(f"dynops::{name}", fake, lib=library)
    overload = getattr(torch.ops.dynops, name).default
    rule, batched_kernel = vmap_rules(overload, vmap)
    torch.library.register_vmap(f"dynops::{name}", rule, lib=library)
    library.impl(name, batched_kernel, "Batched")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"dynops::{name}", "CUDA"):
        implementation = _or_binary(overload, implementation)
    if backward is None:
        return Op(name, implementation, None)
    jvp = jvp or _jvp_of(overload, terms)
    library.impl(name, _autograd_kernel(overload, setup_context, backward, jvp), "Autograd", with_keyset=True)
    return Op(name, implementation, _function(name, implementation, setup_context, backward))


def save_inputs(ctx, inputs, output) -> None:
    """A ``setup_context`` that keeps every argument of an op for its backward."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]


def saved_inputs(ctx) -> list:
    """The arguments that :func:`save_inputs` kept."""
    pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
    return [option if tensor is None else tensor for tensor, option in pairs]


def _check_binary(name: str, schema: str) -> None:
    built = getattr(torch.ops.dynops, name).default._schema
    if str(built) != str(torch._C.parse_schema(f"dynops::{schema}")):
        raise ImportError(f"dynops._C was built from other sources, with {built}; `make build` makes it anew")


def _untraced(name: str) -> Callable:
    """The op's kernel under TorchScript's tracer, which raises: plans call ops by their names."""

    def run(*arguments, **named):
        refuse_tracing()

    return run


def _or_binary(overload, implementation: Callable) -> Callable:
    """``implementation``, or on a GPU the kernel that the binary registers under this op's name."""

    @functools.wraps(implementation)
    def run(*arguments):
        if any(isinstance(value, Tensor) and value.is_cuda for value in arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*arguments)
        return implementation(*arguments)

    return run


def _function(name: str, implementation, setup_context, backward) -> type[torch.autograd.Function]:
    """The op in eager mode. With a ``setup_context`` of its own torch would bind a signature at each call: 40 us."""

    def forward(ctx, *inputs):
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


# ---------------------------------------------------------------------- in the dispatcher


def _autograd_kernel(overload, setup_context, backward, jvp) -> Callable:
    """The op under torch's Autograd key: both modes of differentiation, at one level of ``torch.func``."""

    def below(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx, *inputs):
        *arguments, keyset = inputs
        if torch._C._are_functorch_transforms_active():  # the levels below have gradients of their own
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below(keyset, arguments)
        else:
            output = below(keyset, arguments)
        try:
            setup_context(ctx, tuple(arguments), output)
        except RuntimeError as error:
            if not hasattr(arguments[0], "fake_mode"):
                raise
            ctx.refusal = str(
                error
            )  # Inductor calls the ops of a graph that needs no gradient in either mode
        return output

    def backward_below(ctx, *grads):
        if hasattr(ctx, "refusal"):
            raise RuntimeError(ctx.refusal)
        return *backward(_Alive(ctx), *unwrap_dead_wrappers(grads)), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_below)}
    function = type(overload._opname, (_SingleLevelFunction,), methods)

    def kernel(keyset, *arguments):
        if modes.transformed() and torch._C._is_fwd_grad_enabled():
            primals, tangents = _unpack(arguments)
            if any(tangent is not None for tangent in tangents):
                setup_context(_NOTHING, primals, None)  # raises for an epilogue, which has no derivative
                with forward_ad._set_fwd_grad_enabled(False):  # saved tensors keep their tangents
                    output = kernel(keyset, *arguments)
                return _make_dual(output, jvp(overload, primals, tangents))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            with enable_single_level_autograd_function():
                return function.apply(*arguments, keyset)
        return below(keyset, arguments)

    return kernel


_NOTHING = types.SimpleNamespace(save_for_backward=lambda *tensors: None)


class _Alive:
    """A context whose saved tensors are not those of a transform that has ended (``vjp`` returns a function)."""

    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple:
        return unwrap_dead_wrappers(self._ctx.saved_tensors)


def _unpack(arguments: tuple) -> tuple[tuple, tuple]:
    """(primals, tangents) of the current level; a tangent is None where there is none."""
    pairs = [
        torch._VF._unpack_dual(a, level=0) if isinstance(a, Tensor) and a.is_floating_point() else (a, None)
        for a in arguments
    ]
    return tuple(p for p, _ in pairs), tuple(None if t is None or t._is_zerotensor() else t for _, t in pairs)


def _make_dual(output, tangent):
    if isinstance(output, tuple):
        return tuple(_make_dual(*pair) for pair in zip(output, tangent, strict=True))
    return output if tangent is None else torch._VF._make_dual(output, tangent, level=0)


def _jvp_of(overload, terms: str) -> Callable:
    """The derivative of sums of products: the op itself, with tangents in the place of arguments.

    ``terms``: those of each result, with ";" between. Where the first factor of a product is None there is no such
    product; another factor that is None is one.
    """
    names = [argument.name for argument in overload._schema.arguments]
    optional = ["Optional" in str(argument.type) for argument in overload._schema.arguments]
    results = [
        [tuple(names.index(name) for name in term.split()) for term in result.split(",")]
        for result in terms.split(";")
    ]
    every = [product for result in results for product in result]

    def jvp(op, primals: tuple, tangents: tuple):
        totals = [None] * len(results)
        products = [product for product in every if primals[product[0]] is not None]
        pending = [i for i in dict.fromkeys(sum(products, ())) if tangents[i] is not None]
        while pending:
            varied, dropped = _vary(pending, products if len(results) == 1 else [])
            arguments = list(primals)
            for i in dropped:
                arguments[i] = None if optional[i] else torch.zeros_like(primals[i])
            for i in varied:
                arguments[i] = tangents[i]
            pending = [i for i in pending if i not in varied]
            changes = op(*arguments)
            for k, change in enumerate((changes,) if len(results) == 1 else changes):
                if any(not varied.isdisjoint(product) for product in results[k]):
                    totals[k] = change if totals[k] is None else totals[k] + change
        return totals[0] if len(results) == 1 else tuple(totals)

    return jvp


def _vary(pending: list[int], products: list[tuple[int, ...]]) -> tuple[set[int], list[int]]:
    """Factors of which one call of the op may take the tangents: one in each product; and those that it takes as zero,
    in the products that have none."""
    varied, dropped = {pending[0]}, []
    for product in products:
        if varied.isdisjoint(product):
            taken = {i for other in products if not varied.isdisjoint(other) for i in other}
            alone = [i for i in product if i not in taken]
            i = next((i for i in alone if i in pending), None)
            if i is None:
                dropped.append(alone[0])
            else:
                varied.add(i)
    return varied, dropped
