"""Tracing never changes the answer: forwards that a graph cannot hold, and modules that change after the trace."""

import copy
import pickle
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune  # not imported by torch
from forwards import CHANGES, HOLDABLE, UNHOLDABLE, Net, is_as_it_was, python_random, reset, residual
from torch import nn

import dynops
from dynops.stack.converted import _PROGRAM, _TRACE


def layer_by_layer(model):
    """A copy of a converted model whose modules have no trace."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if _TRACE in module.__dict__:
            module.__dict__.update({_TRACE: None, _PROGRAM: None})
    return model


@pytest.fixture(autouse=True)
def fresh():
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
    assert is_as_it_was(model)
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
