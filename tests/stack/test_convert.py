"""convert_ against models written out as dense layers and masks, and all that must survive the conversion."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from masked_models import (
    close,
    hold,
    layer_by_layer,
    masked_resnet,
    mean,
    norm,
    random_mask,
    randomised,
    small_resnet,
)
from torch import nn

import dynops
from benchmarks.resnet import BasicBlock, Bottleneck, resnet50


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 64, 48, dtype=torch.float64), random_mask((2, 64, 48))


@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 1.0])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_resnet_equals_the_masked_dense_one(kind, density, how, inputs):
    model = small_resnet(kind)
    x, mask = inputs[0], random_mask((2, 64, 48), density)
    expected = masked_resnet(copy.deepcopy(model), x, mask)
    dynops.convert_(model)
    model = layer_by_layer(model) if how == "layers" else model
    for grad in (True, False):
        with torch.set_grad_enabled(grad), dynops.active(mask):
            close(model(x), expected)
    with torch.no_grad(), dynops.active(dynops.PixelPlan.from_mask(mask)):
        close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.no_grad(), dynops.active(dynops.PixelPlan.from_mask(mask, mask.numel())):
        close(model(x), expected)


@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_resnet_trains_like_the_masked_dense_one(kind, how, inputs):
    x, mask = inputs[0].requires_grad_(), random_mask((2, 64, 48), 0.01)
    dense = small_resnet(kind).train()
    model = copy.deepcopy(dense)
    dynops.convert_(model)
    model = layer_by_layer(model) if how == "layers" else model
    expected = masked_resnet(dense, x, mask)
    with dynops.active(mask):
        out = model(x)
    close(out, expected, 1e-9)
    for key, value in dense.state_dict().items():
        close(model.state_dict()[key].double(), value.double(), 1e-9)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (x, *model.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, *dense.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-7)


def test_gradients_in_eval_mode(inputs):
    x, mask = inputs[0].requires_grad_(), inputs[1]
    dense = small_resnet()
    model = copy.deepcopy(dense)
    dynops.convert_(model)
    with dynops.active(mask):
        ours = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    theirs = torch.autograd.grad(masked_resnet(dense, x, mask).square().sum(), (x, *dense.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-10)


def test_float32_resnet50():
    torch.manual_seed(0)
    model = randomised(resnet50(10)).eval()
    x, mask = torch.randn(1, 3, 64, 64), random_mask((1, 64, 64), 0.01)
    with torch.no_grad():
        expected = masked_resnet(copy.deepcopy(model).double(), x.double(), mask)
        report = dynops.convert_(model)
        with dynops.active(mask):
            close(model(x).double(), expected, 1e-4)
    assert list(report.fused) == [""] and not report.unfused and not report.skipped
    kinds = [step.kind for step in model.__dict__["_dynops_trace"].steps]
    assert kinds == ["conv", "pool", *["conv"] * 52, "module", "function", "module"]


def test_mask_coarser_than_the_layers(inputs):
    model, mask = small_resnet(), random_mask((2, 4, 3), 0.3)
    expected = masked_resnet(copy.deepcopy(model), inputs[0], mask)
    dynops.convert_(model)
    with dynops.active(mask[:, None].float()):
        close(model(inputs[0]), expected)


def test_one_pixel_and_no_batch():
    model = small_resnet()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    mask = torch.zeros(1, 32, 32)
    mask[0, 9, 30] = 1
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with dynops.active(mask):
        close(model(x), masked_resnet(dense, x, mask))
        assert model.train()(x).isfinite().all()
    with dynops.active(mask[:0]), torch.no_grad():
        assert model.eval()(x[:0]).shape == (0, 5)


def test_output_keeps_the_memory_format(inputs):
    stage = small_resnet().layer2
    dynops.convert_(stage)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with dynops.active(inputs[1]):
        assert stage(x).is_contiguous()
        assert stage(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
            memory_format=torch.channels_last
        )


class Block(nn.Module):
    """Has what the models below need; each forward is one case."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.act, self.drop, self.channel_drop = nn.PReLU(4), nn.Dropout(0.5), nn.Dropout2d(0.5)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.pool, self.gate = nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)


class Preactivation(Block):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn(x)))
        return out + self.conv2(F.relu(self.bn2(out)))

    def oracle(self, x, mask):
        out = hold(self.conv1(F.relu(norm(self.bn, x, mask))), mask)
        return out + hold(self.conv2(F.relu(norm(self.bn2, out, mask))), mask)


class InPlace(Block):
    def forward(self, x):
        y = self.conv1(x)
        z = self.conv2(y)
        w = self.relu(y)  # y changes after conv2 read it
        z += w
        z.relu_()
        return torch.add(z, y)

    def oracle(self, x, mask):
        y = hold(self.conv1(x), mask)
        return F.relu(hold(self.conv2(y), mask) + F.relu(y)) + F.relu(y)


class SqueezeExcite(Block):
    def forward(self, x):
        x = F.gelu(self.bn(self.conv1(x)), approximate="tanh")
        return self.conv2(x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))) + x.mean(
            (2, 3), keepdim=True
        )

    def oracle(self, x, mask):
        x = F.gelu(norm(self.bn, hold(self.conv1(x), mask), mask), approximate="tanh")
        gate = hold(torch.sigmoid(self.gate(mean(x, mask))), mask)
        return hold(hold(self.conv2(x * gate), mask) + mean(x, mask), mask)


class UpAndDown(Block):
    def forward(self, x):
        y = self.drop(self.act(self.reflect(F.leaky_relu(self.pool(self.conv1(x)), 0.2))))
        return torch.cat([self.up(self.channel_drop(y)).tanh(), self.conv2(x).relu()], 1)

    def oracle(self, x, mask):
        y = hold(F.avg_pool2d(hold(self.conv1(x), mask), 2), mask)
        y = self.act(hold(self.reflect(F.leaky_relu(y, 0.2)), mask))
        return torch.cat([hold(self.up(y), mask).tanh(), F.relu(hold(self.conv2(x), mask))], 1)


class Untraceable(Block):
    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        return self.conv2(x) if x.sum() > -1 else x

    def oracle(self, x, mask):
        return hold(self.conv2(F.relu(norm(self.bn, hold(self.conv1(x), mask), mask))), mask)


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(self.conv1, self.bn, nn.SiLU(), nn.Identity(), nn.Sequential(self.conv2))

    def forward(self, x):
        return self.inner(x) * self.act.weight[0]

    def oracle(self, x, mask):
        y = F.silu(norm(self.bn, hold(self.conv1(x), mask), mask))
        return hold(self.conv2(y), mask) * self.act.weight[0]


CASES = [Preactivation, InPlace, SqueezeExcite, UpAndDown, Untraceable, Nested]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_its_oracle(case, how, training):
    torch.manual_seed(0)
    model = randomised(case()).double().train(training and case is not UpAndDown)  # dropout has its own test
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert list(report.unfused) == ([""] if case is Untraceable else [])
    model = layer_by_layer(model) if how == "layers" else model
    x, mask = torch.randn(2, 4, 8, 6, dtype=torch.float64), random_mask((2, 16, 12), 0.08)
    kept = x.clone()
    expected = dense.oracle(x, mask)
    with dynops.active(mask):
        close(model(x), expected)
        close(model(x=x) if not training else expected, expected)
    assert torch.equal(x, kept)


def test_dropout_draws_for_the_rows():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 64, 1, bias=False))
    nn.init.ones_(model[2].weight)
    dynops.convert_(model)
    x, mask = torch.randn(1, 4, 8, 8), random_mask((1, 8, 8), 0.5)
    with dynops.active(mask):
        a, b = model(x), model(x)
        assert not torch.equal(a, b) and not hold(a, ~mask).any()
        assert torch.equal(model.eval()(x), model(x))


class Hostile(nn.Module):
    """A forward that changes its module: it must be left as it was, and run layer by layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls, self.last = nn.Conv2d(3, 3, 1), 0, None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.conv(x)


class BufferChanger(Hostile):
    def forward(self, x):
        self.seen.add_(1)
        return self.conv(x)


@pytest.mark.parametrize("case", [Hostile, BufferChanger])
def test_side_effects_are_not_traced(case):
    model = case()
    assert "" in dynops.convert_(model).unfused
    assert model.calls == 0 and model.last is None and model.seen == 0
    pickle.dumps(model)


class TwoModes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if self.training else self.conv(x) * 2


def test_forward_that_depends_on_the_mode():
    model = TwoModes().eval()
    assert dynops.convert_(model).fused[""].endswith("in eval mode")
    assert not model.training
    x, mask = torch.randn(1, 3, 4, 4), torch.ones(1, 4, 4)
    with dynops.active(mask):
        close(model(x), model.train()(x) * 2, 1e-6)
        close(model.eval()(x), model.train()(x) * 2, 1e-6)


class TwoCallers(TwoModes):
    def forward(self, x):
        return self.conv(x) if torch.is_grad_enabled() else self.conv(x) * 2


def test_forward_that_depends_on_the_mode_of_its_caller():
    model = TwoCallers().eval()
    assert "mode of its caller" in dynops.convert_(model).unfused[""]
    x = torch.randn(1, 3, 4, 4)
    with dynops.active(torch.ones(1, 4, 4)):
        with torch.no_grad():
            doubled = model(x)
        close(doubled, model(x) * 2, 1e-6)
