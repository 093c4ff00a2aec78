"""TorchScript and the ONNX exporter built on it: a clear error where a decision would be frozen, the dense layer else."""

import contextlib
import importlib.util
import io
import warnings

import pytest
import torch
from torch import nn

import dynops
from dynops import nn as layers

CLEAR = r"torch\.jit\.trace would freeze .*torch\.export\.export"
X = torch.randn(2, 4, 8, 8)
MASK = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
ROWS = torch.randn(5, 4)
CHANNELS = MASK[0, 0, :4].expand(2, 4)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Inside(nn.Module):
    """A converted model whose context is entered in its forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(block(), block())
        dynops.convert_(self.net)

    def forward(self, x, mask):
        with dynops.active(mask):
            return self.net(x)


class Halts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.halt = block(), nn.Sequential(head(), nn.Linear(3, 1), nn.Sigmoid(), nn.Flatten(0))
        self.layer = layers.Halting(lambda x, *n: self.net(x), lambda x, *n: self.halt(x), 3)

    def forward(self, x):
        return self.layer(x)[0]


TOPK = torch.randint(0, 3, (5, 2))
MASKED = {
    "conv": (lambda: layers.SparseConv2d(4, 4, 3, padding=1), X, MASK),
    "transposed": (lambda: layers.SparseConvTranspose2d(4, 4, 3, padding=1), X, MASK),
    "norm": (lambda: layers.MaskedBatchNorm2d(4), X, MASK),
    "pool": (lambda: layers.MaskedMaxPool2d(1), X, MASK),
    "blocks": (lambda: layers.SparseBlocks(block(), 4), X, MASK),
    "chain": (lambda: layers.SparseSequential(*block()), X, MASK),
    "skip": (lambda: layers.Skip(block()), X, torch.tensor([1.0, 0.0])),
    "exits": (lambda: layers.EarlyExit([block(), block()], [head(), head()], layers.MaxSoftmax(0.4)), X),
    "halting": (Halts, X),
    "experts": (lambda: layers.Experts(3, 4, 8), ROWS, TOPK, torch.rand(5, 2)),
    "channels": (lambda: layers.ChannelConv2d(4, 4, 3), X, CHANNELS),
    "mixed kernels": (lambda: layers.CondConv2d(4, 4, 3, num_experts=3), X, torch.rand(2, 3)),
    "converted": (Inside, X, MASK),
}


def trace(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, arguments, check_trace=False)


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_a_frozen_choice_is_refused(case):
    make, *arguments = case
    module = make().eval().requires_grad_(False)
    module(*arguments)
    with pytest.raises(RuntimeError, match=CLEAR) as refused:
        trace(module, *arguments)
    assert "under a mask" not in str(refused.value)  # the module does nothing wrong
    if not isinstance(module, Halts):
        with pytest.raises(RuntimeError, match=CLEAR):
            torch.jit.trace_module(module, {"forward": tuple(arguments)}, check_trace=False)
    module(*arguments)  # nothing of the tracer is left behind


PLAN = dynops.PixelPlan.from_mask(MASK)
SAMPLES = dynops.SamplePlan.from_mask(torch.tensor([False, True]))
PLANS = {
    "pixels": (lambda m: dynops.PixelPlan.from_mask(m).index, MASK),
    "capacity": (lambda m: dynops.PixelPlan.from_mask(m, 60).index, MASK),
    "blocks": (lambda m: dynops.BlockPlan.from_mask(m, 4).index, MASK),
    "channels": (lambda m: dynops.ChannelPlan.from_mask(m).index, CHANNELS),
    "samples": (lambda m: dynops.SamplePlan.from_mask(m).index, torch.ones(2)),
    "experts": (lambda i: dynops.ExpertPlan.from_topk(i, 3).order, TOPK),
    "gather pixels": (lambda x: dynops.ops.gather_pixels(x, PLAN), X),
    "gather samples": (lambda x: dynops.ops.gather_samples(x, SAMPLES), X),
    "conv": (lambda x: dynops.ops.sparse_conv2d(x, torch.ones(2, 4, 1, 1), None, PLAN), X),
}


@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_plans_and_ops(case):
    with pytest.raises(RuntimeError, match=CLEAR):
        trace(*case)


def test_gradients_are_refused_too():
    with pytest.raises(RuntimeError, match=CLEAR):
        trace(layers.SparseConv2d(4, 4, 3, padding=1), X, MASK)


def test_without_a_mask_the_dense_layer_is_traced():
    conv = layers.SparseConv2d(4, 4, 3, padding=1).requires_grad_(False)
    assert torch.equal(trace(conv, X)(X + 1), conv(X + 1))
    blocks = layers.SparseBlocks(block(), 4).eval().requires_grad_(False)
    assert torch.equal(trace(blocks, X)(X + 1), blocks(X + 1))
    net = block().eval()
    dynops.convert_(net)
    assert torch.equal(trace(net, X)(X + 1), net(X + 1))


@pytest.mark.parametrize("masked", [False, True])
def test_onnx(masked):
    """The exporter passes the defaults of keyword-only arguments by place: an arity error before."""
    conv = layers.SparseConv2d(4, 4, 3, padding=1).requires_grad_(False)
    arguments = (X, MASK) if masked else (X,)
    expected = pytest.raises(RuntimeError, match=CLEAR) if masked else contextlib.nullcontext()
    if (
        not masked and importlib.util.find_spec("onnx") is None
    ):  # the graph is made; what writes it is missing
        expected = pytest.raises(torch.onnx.OnnxExporterError, match="onnx is not installed")
    with warnings.catch_warnings(), expected:
        warnings.simplefilter("ignore")
        torch.onnx.export(conv, arguments, io.BytesIO(), dynamo=False)


def script(x, weight):
    return dynops.ops.sparse_conv2d(x, weight, None, None)


@pytest.mark.parametrize(
    "what", [layers.SparseConv2d(4, 4, 3), nn.Sequential(layers.Skip(block())), Inside(), script]
)
def test_scripting_is_refused(what):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile .*torch\.export\.export"):
            torch.jit.script(what)


def test_reverted_models_are_scripted():
    net = block().eval()
    dynops.convert_(net)
    dynops.revert_(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(torch.jit.script(net)(X), net(X))


def test_export_keeps_the_decision():
    module = Inside().eval().requires_grad_(False)
    exported = torch.export.export(module, (X, MASK)).module()
    other = MASK.flip(1)
    torch.testing.assert_close(exported(X, other), module(X, other))


@pytest.mark.parametrize("convert", [False, True])
def test_an_export_with_a_dynamic_batch_takes_other_batches(convert):
    class Masked(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask):
            with dynops.use_mask(mask):
                return self.layer(x)

    layer = dynops.nn.SparseConv2d(3, 8, 3)
    if convert:
        layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        dynops.convert_(layer)
    model, batch = Masked(layer).eval(), torch.export.Dim("batch", min=1, max=8)
    example = torch.randn(2, 3, 10, 10), torch.ones(2, 4, 4)
    exported = torch.export.export(model, example, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    x, mask = torch.randn(5, 3, 10, 10), (torch.rand(5, 4, 4) < 0.4).float()
    torch.testing.assert_close(exported.module()(x, mask), model(x, mask))


def test_onnx_takes_the_dense_model():
    """Outside of the context the graph is that of the model that was not converted."""
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).eval()
    expected = model(X)
    dynops.convert_(model)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.onnx.export(model, (X,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    torch.testing.assert_close(program(X)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception) as error:
        torch.onnx.export(Inside().eval(), (X, MASK), dynamo=True, verbose=False)
    assert "ONNX has no op for the pixels of a mask" in str(error.value)


@pytest.mark.parametrize("how", ["in the context", "outside of it", "as an argument"])
def test_onnx_refuses_a_mask(how, monkeypatch):
    """The flag is that of torch.onnx.export(dynamo=True), which needs onnxscript."""
    monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
    layer = layers.SparseConv2d(4, 4, 3, padding=1)
    module, arguments = {
        "in the context": (Inside(), (X, MASK)),
        "outside of it": (layer, (X,)),
        "as an argument": (layer, (X, MASK)),
    }[how]
    with contextlib.ExitStack() as stack:
        if how == "outside of it":
            stack.enter_context(dynops.use_mask(MASK))
        with pytest.raises(RuntimeError, match=r"ONNX has no op for the pixels of a mask.*AOTInductor"):
            torch.export.export(module.eval().requires_grad_(False), arguments)
