"""Tracing never changes the answer: forwards that a graph cannot hold, and modules that change after the trace."""

import copy
import functools
import math
import random
import threading
import types
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune  # not imported by torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dynops
from dynops.stack.converted import _PROGRAM, _TRACE

FLAG, COUNTS, STATE, RNG = True, [], types.SimpleNamespace(calls=0), random.Random(0)


class Net(nn.Module):
    """Modules and attributes for the forwards below."""

    tally = 0
    shared: typing.ClassVar[list] = []

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.on, self.calls = nn.BatchNorm2d(4), nn.ReLU(True), True, 0
        self.feats, self.cache, self.rng, self.extra = [], {}, random.Random(1), torch.full((1,), 2.0)
        self.config = types.SimpleNamespace(k=2, names=["a"])
        self.function, self.part = F.relu, functools.partial(F.leaky_relu, negative_slope=0.3)
        self.register_buffer("seen", torch.ones(1))
        self.more = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU()])
        nn.init.normal_(self.norm.bias)
        self.__class__ = type("Net", (Net,), {"forward": forward})

    def helper(self, x):
        return self.a(x)

    def all(self, x):
        for layer in self.more[:]:
            x = layer(x)
        return x


def layer_by_layer(model):
    """A copy of a converted model whose modules have no trace."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if _TRACE in module.__dict__:
            module.__dict__.update({_TRACE: None, _PROGRAM: None})
    return model


def no_grad(s, x):
    with torch.no_grad():
        y = s.a(x)
    return s.b(y)


def enable_grad(s, x):
    with torch.enable_grad():
        y = s.a(x)
    return s.b(y)


def autocast_off(s, x):
    with torch.autocast("cpu", enabled=False):
        return s.b(s.a(x.float()))


def autocast_on(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.a(x)
    return s.b(y.float())


def checkpointed(s, x):
    return s.b(checkpoint(s.a, x, use_reentrant=False))


def checkpointed_reentrant(s, x):
    return s.b(checkpoint(lambda v: s.norm(s.a(v)), x, use_reentrant=True))


def python_random(s, x):
    return s.b(s.a(x)) if random.random() < 0.5 else s.a(x)


def numpy_random(s, x):
    return s.b(s.a(x)) if np.random.rand() < 0.5 else s.a(x)


def torch_random(s, x):
    return s.b(s.a(x)) if torch.rand(()).item() < 0.5 else s.a(x)


def noise(s, x):
    return s.b(s.a(x) + torch.randn(1))


def own_generator(s, x):
    return s.b(s.a(x)) if s.rng.random() < 0.5 else s.a(x)


def global_generator(s, x):
    return s.b(s.a(x)) if RNG.random() < 0.5 else s.a(x)


def appends(s, x):
    s.feats.append(s.a(x))
    return s.b(s.feats[-1])


def writes_dict(s, x):
    s.cache["y"] = s.a(x)
    return s.b(s.cache["y"])


def counts(s, x):
    s.calls += 1
    return s.b(s.a(x)) if s.calls % 2 else s.a(x)


def counts_in_class(s, x):
    Net.tally += 1
    return s.b(s.a(x)) if Net.tally % 2 else s.a(x)


def appends_to_class(s, x):
    s.shared.append(1)
    return s.b(s.a(x)) if len(s.shared) % 2 else s.a(x)


def appends_to_global(s, x):
    COUNTS.append(s.a(x))
    return s.b(COUNTS[-1])


def counts_in_global(s, x):
    STATE.calls += 1
    return s.b(s.a(x)) if STATE.calls % 2 else s.a(x)


def counts_in_default(s, x, calls=[]):  # noqa: B006
    calls.append(1)
    return s.b(s.a(x)) if len(calls) % 2 else s.a(x)


def counts_in_config(s, x):
    s.config.k += 1
    return s.b(s.a(x)) if s.config.k % 2 else s.a(x)


def writes_buffer(s, x):
    s.seen.mul_(2)
    return s.b(s.a(x)) * s.seen


def writes_input(s, x):
    return s.b(s.a(s.relu(x))) + x


def writes_slice(s, x):
    y = s.a(x)
    F.relu(y[:, :2], inplace=True)
    return s.b(y)


def writes_what_is_read_later(s, x):
    y = s.a(x)
    z = y[:, :2]
    y += s.b(x)
    return s.b(torch.cat([z, z], 1))


def asks_for_a_size(s, x):
    return s.b(s.a(x)) if x.shape[2] > 4 else s.a(x)


def asks_for_a_class(s, x):
    return s.b(s.a(x)) if type(s.b) is not nn.Identity else x


def catches(s, x):
    try:
        return s.b(s.a(x)) if s.a(x).sum() > 0 else s.a(x)
    except TypeError:
        return s.a(x)


def dtype_of_its_parameters(s, x):
    return s.b(s.a(x.to(next(s.parameters()).dtype)))


def appends_and_raises(s, x):
    COUNTS.append(s.a(x))
    return s.b(COUNTS[-1]) if x.sum() > 0 else s.a(x)


def math_of_sizes(s, x):
    return s.b(s.a(x)) * math.sqrt(x.shape[1])


UNHOLDABLE = [no_grad, torch.no_grad()(lambda s, x: s.b(s.a(x))), enable_grad, autocast_off, autocast_on, checkpointed,
              checkpointed_reentrant, python_random, numpy_random, torch_random, noise, own_generator, global_generator,
              appends, writes_dict, counts, counts_in_class, appends_to_class, appends_to_global, counts_in_global,
              counts_in_default, counts_in_config, writes_buffer, writes_input, writes_slice, writes_what_is_read_later, asks_for_a_size,
              asks_for_a_class, catches, dtype_of_its_parameters, appends_and_raises, math_of_sizes]  # fmt: skip


def residual(s, x):
    return x + s.b(s.relu(s.a(x)))


def normed_residual(s, x):
    return F.relu(s.norm(s.a(x)) + x)


def concatenated(s, x):
    return torch.cat([x, s.b(s.a(x))], 1)


def shifted(s, x):
    return s.b(torch.sigmoid(s.a(x)) + 1)


def viewed(s, x):
    return s.a(x).view(x.shape[0], -1)


def lists_its_input(s, x):
    if isinstance(x, torch.Tensor):
        x = [x]
    return s.b(s.a(torch.cat(x, 1)))


def writes_in_place(s, x):
    y = s.a(x)
    y += s.b(x)
    z = y
    y *= 2
    return z + y


def has_options(s, x, y=None, *, z=3):
    return s.b(s.a(x)) if y is None else y


HOLDABLE = [
    residual,
    normed_residual,
    concatenated,
    shifted,
    viewed,
    lists_its_input,
    has_options,
    writes_in_place,
]


def chain(s, x):
    return s.b(s.relu(s.norm(s.a(x))))


CHANGES = {
    "attribute": (lambda s, x: s.b(s.a(x)) if s.on else s.a(x), lambda m: setattr(m, "on", False)),
    "config": (lambda s, x: s.b(s.a(x)) if s.config.k else s.a(x), lambda m: setattr(m.config, "k", 0)),
    "list": (lambda s, x: s.b(s.a(x)) * len(s.config.names), lambda m: m.config.names.append("b")),
    "global": (lambda s, x: s.b(s.a(x)) if FLAG else s.a(x), lambda m: globals().__setitem__("FLAG", False)),
    "class": (lambda s, x: s.b(s.a(x)) if s.tally == 0 else s.a(x), lambda m: setattr(m, "tally", 5)),
    "function": (lambda s, x: s.b(s.function(s.a(x))), lambda m: setattr(m, "function", torch.tanh)),
    "partial": (lambda s, x: s.b(s.part(s.a(x))), lambda m: setattr(m, "part", functools.partial(F.elu, alpha=2.0))),
    "tensor": (lambda s, x: s.b(s.a(x) * s.extra), lambda m: setattr(m, "extra", torch.full((1,), 3.0))),
    "padding": (lambda s, x: s.a(x), lambda m: setattr(m.a, "padding", (0, 0))),
    "dilation": (chain, lambda m: (setattr(m.a, "dilation", (2, 2)), setattr(m.a, "padding", (2, 2)))),
    "eps": (chain, lambda m: setattr(m.norm, "eps", 0.5)),
    "list of children": (lambda s, x: s.all(s.a(x)), lambda m: m.more.append(nn.Conv2d(4, 4, 1))),
    "child": (chain, lambda m: setattr(m, "b", nn.Identity())),
    "activation": (chain, lambda m: setattr(m, "relu", nn.Tanh())),
    "forward": (chain, lambda m: setattr(m.b, "forward", lambda x: x * 2)),
    "forward of the class": (chain, lambda m: setattr(type(m).__mro__[1], "forward", lambda s, x: s.a(x))),
    "method": (lambda s, x: s.b(s.helper(x)), lambda m: setattr(m, "helper", lambda x: m.a(x) * 2)),
    "hook": (chain, lambda m: m.a.register_forward_hook(lambda layer, args, out: out * 2)),
    "pre-hook": (chain, lambda m: m.a.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))),
    "pruning": (chain, lambda m: nn.utils.prune.l1_unstructured(m.a, "weight", 0.5)),
    "spectral norm": (chain, lambda m: nn.utils.spectral_norm(m.a)),
    "parametrised": (chain, lambda m: nn.utils.parametrizations.weight_norm(m.a)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    """All that the forwards write, as it was."""

    def reset():
        globals()["FLAG"], Net.tally, STATE.calls = True, 0, 0
        for written in (COUNTS, Net.shared, counts_in_default.__defaults__[0]):
            written.clear()
        RNG.seed(0)

    reset()
    yield reset
    reset()


def calls(model, x, mask, grad, autocast, reset):
    """Two calls: outputs, whether they need gradients, and the gradients."""
    reset()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    results = []
    for _ in range(2):
        model.zero_grad()
        own = x.clone().requires_grad_(grad)
        with (
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", torch.bfloat16, autocast),
            dynops.use_mask(mask),
        ):
            out = model(own * 1)
        results += [out.detach(), out.requires_grad]
        if out.requires_grad:
            out.float().square().sum().backward()
            results += [own.grad, *[p.grad for p in model.parameters()]]
    return results


def assert_same(model, twin, reset):
    x, mask = torch.randn(2, 4, 9, 8), torch.rand(2, 9, 8) < 0.4
    for grad, autocast in ((False, False), (True, False), (False, True)):
        ours, theirs = (calls(m, x, mask, grad, autocast, reset) for m in (model, twin))
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(a, torch.Tensor):
                assert a == b
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a.float() - b.float()).norm() <= (3e-2 if autocast else 1e-4) * b.float().norm()


@pytest.mark.parametrize("forward", [*UNHOLDABLE, *HOLDABLE])
def test_equals_its_layers_each_alone(forward, fresh):
    model = Net(forward).eval()
    random_before, state = random.getstate(), torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    report = dynops.convert_(model)
    assert bool(report.fused) == (forward in HOLDABLE) and ("" in report.unfused) == (forward in UNHOLDABLE)
    # nothing is left behind, and nothing was drawn
    assert not (model.feats or model.cache or model.calls or COUNTS or Net.shared or Net.tally or STATE.calls)
    assert not counts_in_default.__defaults__[0] and model.config.k == 2 and model.seen == 1
    assert random.getstate() == random_before and torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert_same(model, layer_by_layer(model), fresh)


@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_it_stale(case, fresh):
    forward, change = case
    model = Net(forward).eval()
    assert dynops.convert_(model).fused
    twin = layer_by_layer(model)
    assert model.__dict__[_PROGRAM].holds()
    assert_same(model, twin, fresh)
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(twin)
    assert (
        not model.__dict__[_PROGRAM].holds() or forward is CHANGES["tensor"][0]
    )  # a tensor is read in each call
    assert_same(model, twin, lambda: None)


def test_inner_modules_that_cannot_be_traced_are_called():
    torch.manual_seed(0)
    model = nn.Sequential(Net(residual), Net(python_random), Net(residual)).eval()
    report = dynops.convert_(model)
    assert list(report.fused) == [""] and report.unfused["1"] == "its forward draws random numbers"
    assert_same(model, layer_by_layer(model), lambda: None)
    model.register_forward_hook(lambda *_: None)  # of the module itself: it is called
    assert model.__dict__[_PROGRAM].holds()


def graph_module():
    return torch.fx.symbolic_trace(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    )


def test_graph_modules_are_copied_recompiled_and_pickled():
    import pickle

    model = graph_module()
    dynops.convert_(model)
    x, mask = torch.randn(2, 4, 8, 8), torch.rand(2, 8, 8) < 0.4
    with torch.no_grad(), dynops.use_mask(mask):
        expected = model(x)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(copy.deepcopy(model)),
        ):
            assert torch.equal(other(x), expected) and other.__dict__[_PROGRAM].holds()
            dynops.revert_(other)
            assert torch.equal(other(x), layer_by_layer(other)(x)) and not torch.equal(other(x), expected)
        model.recompile()
        assert torch.equal(model(x), expected)
        last = next(node for node in model.graph.nodes if node.op == "output")
        last.args = (last.args[0].args[0],)
        model.recompile()
        assert torch.equal(model(x), layer_by_layer(model)(x)) and not torch.equal(model(x), expected)


@pytest.mark.parametrize("first", [False, True])
def test_parametrised_layers_are_sparse(first):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    for parametrise in (
        [lambda m: dynops.convert_(m), lambda m: nn.utils.parametrizations.spectral_norm(m[0])]
    )[:: -1 if first else 1]:
        parametrise(model)
    x, mask = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 8, 8) < 0.4
    with torch.no_grad():
        expected = model[2](F.relu(model[0](x) * mask)) * mask
        with dynops.use_mask(mask):
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    dynops.revert_(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_a_norm_that_takes_the_place_of_a_converted_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    nn.init.ones_(model[1].bias)
    dynops.convert_(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    with torch.no_grad(), dynops.use_mask(mask):
        assert not model(torch.randn(1, 3, 8, 8))[:, :, 4:].any()
    dynops.revert_(model)
    assert type(model[1]) is nn.SyncBatchNorm


def test_other_threads_are_not_disturbed():
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]).eval()
    x, errors, stop = torch.randn(1, 4, 8, 8), [], threading.Event()

    def serve():
        while not stop.is_set():
            try:
                model(x)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(10):
        dynops.nn.SparseBlocks(model, 8)
    stop.set()
    thread.join()
    assert not errors


def test_pruned_chains_keep_their_pixels():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    chain = nn.Sequential(conv, nn.ReLU()).eval()
    x, mask = torch.randn(1, 4, 8, 8), torch.rand(1, 8, 8) < 0.4
    sparse = dynops.nn.SparseSequential.from_dense(chain)
    with torch.no_grad():
        conv.weight_orig.mul_(2)
        torch.testing.assert_close(sparse(x, mask), chain(x) * mask[:, None])


def test_precision_may_be_set_in_the_newer_way():
    """torch.get_float32_matmul_precision raises from then on."""
    stack, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), torch.randn(1, 4, 8, 8)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        out = dynops.nn.SparseBlocks(stack, 4)(x, torch.ones(1, 8, 8))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.testing.assert_close(out, stack(x), rtol=1e-4, atol=1e-5)
