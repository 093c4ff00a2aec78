"""Activation checkpointing inside a mask context: the gradient is that of the plain call, wherever backward runs."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dynops


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


class Blocks(nn.Module):
    """Two converted nets; ``call(f, x)`` is how each one is called."""

    def __init__(self, call=None):
        super().__init__()
        self.a, self.b = net(), net()
        self.call = call or (lambda f, x: f(x))

    def forward(self, x):
        return self.call(self.b, self.call(self.a, x))


def square(top, left, n=2) -> torch.Tensor:
    mask = torch.zeros(n, 14, 13)
    mask[:, top : top + 5, left : left + 4] = 1
    return mask


MASK, OTHER = square(2, 3), square(8, 7)
X = torch.randn(2, 4, 14, 13, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, run, around_backward=None) -> list[torch.Tensor]:
    """The gradients of ``run(model, x)``, called in a context that is left before the backward pass."""
    x = X.clone().requires_grad_()
    loss = (run(model, x) - 1).square().mean()
    if around_backward is None:
        loss.backward()
    else:
        with around_backward:
            loss.backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def equal(got: list, want: list) -> None:
    assert max(t.abs().max().item() for t in want[1:]) > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def masked(model, x):
    with dynops.active(MASK):
        return model(x)


def expected(run=masked) -> list[torch.Tensor]:
    return gradients(converted(), run)


def converted(call=None) -> nn.Module:
    model = Blocks(call)
    dynops.convert_(model.a)
    dynops.convert_(model.b)
    return model


CALLS = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "partial": lambda f, x: checkpoint(functools.partial(f, x), use_reentrant=False),
    "sequential": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=True),
    "in one another": lambda f, x: checkpoint(
        lambda y: f[2:](checkpoint(f[:2], y, use_reentrant=False)), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_backward_after_the_context(call):
    equal(gradients(converted(call), masked), expected())


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_inside_another_context(reentrant):
    model = converted(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    equal(gradients(model, masked, dynops.active(OTHER)), expected())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_dense_forward_and_a_backward_inside_a_context(reentrant):
    def dense(model, x):
        return model(x)

    model = converted(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    equal(gradients(model, dense, dynops.active(OTHER)), expected(dense))


@pytest.mark.parametrize("reentrant", [False, True])
def test_nested_contexts_and_blocks(reentrant):
    def run(model, x):
        with dynops.active(OTHER, block_size=3):
            y = model.call(model.a, x)
            with dynops.active(MASK):
                return model.call(model.b, y)

    model = converted(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    equal(gradients(model, run), expected(run))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_inside_what_is_checkpointed(reentrant):
    def run(model, x):
        return checkpoint(functools.partial(masked, model), x, use_reentrant=reentrant)

    equal(gradients(converted(), run), expected())


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread(reentrant):
    model, x = converted(lambda f, x: checkpoint(f, x, use_reentrant=reentrant)), X.clone().requires_grad_()
    loss = (masked(model, x) - 1).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    equal([x.grad, *(p.grad for p in model.parameters())], expected())


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_held_before_the_backward_pass_holds_after_it(reentrant):
    model = converted(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    with dynops.active(OTHER):
        before = model(X)
        gradients(model, masked)
        assert torch.equal(model(X), before)
    assert torch.equal(model(X), Blocks()(X))


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_wrapped_modules(implementation):
    model = converted()
    model.a = checkpoint_wrapper(model.a, checkpoint_impl=implementation)
    equal(gradients(model, masked), expected())


def test_composable():
    model = converted()
    composable_checkpoint(model.a)
    equal(gradients(model, masked), expected())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant):
    layers = pytest.importorskip("transformers.modeling_layers")

    class Layer(layers.GradientCheckpointingLayer):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)

        def forward(self, x):
            return self.body(x)

    model = converted()
    model.a, model.b = Layer(model.a), Layer(model.b)
    equal(gradients(model, masked), expected())


def test_compiled():
    model = converted(lambda f, x: checkpoint(f, x, use_reentrant=False))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    equal(gradients(compiled, masked), expected())


def test_without_a_context_nothing_changes():
    model = Blocks(CALLS["not reentrant"])
    equal(gradients(model, lambda m, x: m(x)), gradients(Blocks(), lambda m, x: m(x)))
