"""The layers of a stack: on rows under a mask against the run layer by layer, on parts of a map against the dense module."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

import dynops
from dynops.nn import MaskedGroupNorm, MaskedInstanceNorm2d, Skip, SparseBlocks
from dynops.stack import maps
from dynops.stack.graph import stack_of
from dynops.stack.layers import conv
from dynops.stack.layers.base import Rows
from dynops.stack.layers.resample import Padded
from dynops.stack.policy import Masked
from dynops.stack.run_rows import Run
from dynops.testing import random_mask


class Graph(nn.Module):
    """Modules for the forwards below."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv1 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale, self.map = nn.Parameter(torch.randn(8, 1, 1)), nn.Conv2d(4, 1, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.last = nn.Conv2d(16, 4, 3, padding=1)


class Cat(Graph):
    def forward(self, x):
        y = self.conv(x)
        return self.last(torch.cat([y, self.conv1(y).relu()], dim=1))


class TimesMap(Graph):
    def forward(self, x):
        y = self.conv(x)
        return self.conv1(y * self.map(x)) * self.scale


class SqueezeExcite(Graph):
    def forward(self, x):
        y = self.conv(x)
        return self.conv1(y * self.gate(y))


class Arithmetic(Graph):
    def forward(self, x):
        y = self.conv(x)
        z = self.conv1(y).contiguous(memory_format=torch.channels_last) - y.clone() * 2
        return torch.maximum(z, -y).square() / 3


class Weighted(Graph):
    """Maps weighted as EfficientDet does: what is made of parameters is no map."""

    def forward(self, x):
        y, weight = self.conv(x), torch.relu(self.scale).contiguous()
        weight = weight / (weight.sum() + 1e-4) + self.scale.relu()
        return self.conv1(y * weight) * self.gate[2](self.scale)


def chain(*layers):
    return lambda: copy.deepcopy(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), *layers))


MASKED = {
    "cat": Cat,
    "times a map": TimesMap,
    "squeeze-excite": SqueezeExcite,
    "arithmetic": Arithmetic,
    "weights of parameters": Weighted,
    "group norm": chain(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "instance norm": chain(nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 3)),
    "nearest": chain(nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3, padding=1)),
    "bilinear": chain(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 3, padding=1)),
    "shuffle": chain(nn.PixelShuffle(2), nn.Conv2d(2, 4, 3, padding=1)),
    "pad": chain(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(8, 4, 3)),
}


def layer_by_layer(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("form", ["compact", "capacity"])
@pytest.mark.parametrize("name", MASKED)
def test_a_masked_model_is_its_layers(name, form):
    torch.manual_seed(0)
    model, x = MASKED[name]().double(), torch.randn(2, 4, 12, 8, dtype=torch.float64, requires_grad=True)
    mask = random_mask((2, 12, 8), 0.3)
    mask = mask if form == "compact" else dynops.PixelPlan.from_mask(mask, mask.numel())
    report = dynops.convert_(model)
    assert "" in report.fused and not report.skipped
    separate = layer_by_layer(model)
    with dynops.active(mask):
        out, expected = model(x), separate(x)
    assert (out - expected).norm() <= 1e-13 * expected.norm() > 0
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [x, *m.parameters()], allow_unused=True)
        for y, m in ((out, model), (expected, separate))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a is b is None or (a - b).norm() <= 1e-12 * b.norm().clamp(min=1)


@pytest.mark.parametrize("name", MASKED)
def test_nothing_reads_rows_past_the_count(name, monkeypatch):
    """Without gradients a kernel leaves them as they were."""
    left = []

    def poisoned(*given):
        out, plan, rows, zero_tail = conv_layer(*given), given[3], given[8], given[10]
        if rows and not zero_tail:
            left.append(plan)
            out[plan.index < 0] = float("nan")
        return out

    torch.manual_seed(0)
    model, x = MASKED[name]().eval(), torch.randn(2, 4, 12, 8)
    mask = random_mask((2, 12, 8), 0.3)
    dynops.convert_(model)
    with torch.no_grad(), dynops.active(dynops.PixelPlan.from_mask(mask, mask.numel())):
        expected = model(x)
        conv_layer = conv._pixel_conv
        for room in (conv, maps.convolution):
            monkeypatch.setattr(room, "_pixel_conv", poisoned)
        out = model(x)
    assert left and torch.equal(out, expected)


@pytest.mark.parametrize(
    "name", sorted(set(MASKED) - {"bilinear", "squeeze-excite", "weights of parameters"})
)
def test_no_dense_map_is_made_between(name, monkeypatch):
    """Every value but the input and the output of a traced model stays rows."""
    model = MASKED[name]().eval()
    dynops.convert_(model)
    stack = stack_of(model.__dict__["_dynops_trace"], model)
    with torch.no_grad(), dynops.active(random_mask((2, 12, 8), 0.3)) as active:
        run = Run(stack, (torch.randn(2, 4, 12, 8),), Masked(active))
        for layer in stack.layers[:-1]:
            run.env[layer.out] = layer.rows(run)
            assert type(run.env[layer.out]) in (Rows, Padded), layer.name


@pytest.mark.parametrize(
    "make", [lambda: MaskedGroupNorm(2, 6), lambda: MaskedInstanceNorm2d(6, affine=True)]
)
def test_sample_norms_take_statistics_of_active_pixels(make):
    norm, mask = make().double(), random_mask((3, 5, 7), 0.4)
    mask[2] = False
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    out = norm(x, mask)
    assert not out[(~mask)[:, None].expand_as(out)].any()
    for n in (0, 1):  # as the dense norm of a map that holds the active pixels only
        pixels = x[n][:, mask[n]]
        assert torch.allclose(
            out[n][:, mask[n]], type(norm).pixels_of.forward(norm, pixels[None, :, None])[0, :, 0]
        )
    assert torch.equal(norm(x), type(norm).pixels_of.forward(norm, x))


def test_running_statistics_of_instances_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True))
    assert dynops.convert_(model).skipped == {"1": "it has running statistics"}
    with pytest.raises(ValueError, match="track_running_stats"):
        MaskedInstanceNorm2d(4, track_running_stats=True)


class Permuted(nn.Module):
    """ConvNeXt's block: between two permutes the channels are last."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.gamma = nn.LayerNorm(channels), nn.Parameter(torch.randn(channels))
        self.mlp = nn.Sequential(
            nn.Linear(channels, 3 * channels), nn.GELU(), nn.Linear(3 * channels, channels)
        )

    def forward(self, x):
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


LOCAL = {
    "channels last": (Permuted(4), nn.Conv2d(4, 4, 2, 2), Permuted(4)),
    "nearest": (nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(4, 4, 3, padding=1)),
    "shuffle": (nn.Conv2d(4, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3, padding=1)),
    "pad": (
        nn.ZeroPad2d((1, 2, 0, 3)),
        nn.Conv2d(4, 4, 3),
        nn.ZeroPad2d(1),
        nn.MaxPool2d(1),
        nn.Conv2d(4, 4, 3),
    ),
    "pad and rows": (nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(4, 4, 3), nn.ReLU()),
}


@pytest.mark.parametrize("name", ["cat", "times a map", "arithmetic", *LOCAL])
def test_parts_of_a_map_are_the_dense_module(name):
    torch.manual_seed(0)
    module = (nn.Sequential(*LOCAL[name]) if name in LOCAL else MASKED[name]()).double().eval()
    x = torch.randn(2, 4, 12, 10, dtype=torch.float64)
    expected = module(x)
    layer = SparseBlocks(module, 12)
    mask = torch.zeros(2, *expected.shape[2:])
    mask[0, -1, -1] = mask[1, 0, 0] = 1
    at = dynops.BlockPlan.from_mask(mask, 12).pixels().mask()[:, None]
    for layer.path in ["tiles"] if name == "pad" else ["tiles", "rows"]:
        assert torch.allclose(layer(x, mask), torch.where(at, expected, 0), atol=1e-12), layer.path


def test_layer_norm_by_function():
    """LayerNorm2d of torchvision: the function between two permutes."""

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            x = torch.permute(x, (0, -2, -1, -3))
            x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return torch.permute(x, [0, 3, 1, 2])

    module, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3), LayerNorm2d(6)).double().eval(),
        torch.randn(1, 4, 8, 8).double(),
    )
    nn.init.normal_(module[1].weight), nn.init.normal_(module[1].bias)
    mask = torch.zeros(1, 6, 6)
    mask[0, 2, 3] = 1
    for path in ("rows", "tiles"):
        out = SparseBlocks(module, 1, path=path)(x, mask)
        assert torch.allclose(out, torch.where(mask[:, None] > 0, module(x), 0), atol=1e-14)


class Turned(nn.Module):
    """Reads a map of 4 channels and 4 rows between two permutes in another way than pixel by pixel."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read, self.scale = nn.Conv2d(4, 4, 1), read, nn.Parameter(torch.ones(4, 1, 4))
        self.norm, self.slopes = nn.LayerNorm((8, 4)), nn.PReLU(4)

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)
        calls = {"norm": self.norm, "slopes": self.slopes, "scale": lambda x: x * self.scale}
        calls["product"] = lambda x: x * x.permute(0, 3, 1, 2)[..., :4]
        calls["computed"] = lambda x: x.permute(0, x.dim() - 1, 1, 2).permute(0, 2, 3, 1)
        return calls[self.read](x).permute(0, 3, 1, 2)


@pytest.mark.parametrize("read", ["norm", "product", "slopes", "scale", "computed"])
def test_other_readers_of_a_permuted_map_are_refused(read):
    message = (
        "scale of shape [C] or one value"
        if read == "scale"
        else "permute: expected a call that blocks can make"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        SparseBlocks(Turned(read).eval(), 2)


def test_a_parameter_of_channels_that_is_replaced():
    layer = SparseBlocks(nn.Sequential(Permuted(4)).eval(), 2)
    layer.module[0].gamma = nn.Parameter(torch.ones(4, 1, 4))
    for layer.path in ("rows", "tiles"):
        with pytest.raises(TypeError, match=r"gamma of shape \[C\] or one value, got \(4, 1, 4\)"):
            layer(torch.randn(1, 4, 4, 4), torch.ones(1, 4, 4))


def test_a_norm_of_channels_that_is_changed():
    """What runs pixel by pixel is watched as any layer is."""
    changes = {
        "forward": (lambda x: x - x.mean((1, 2), keepdim=True), "forward of its own"),
        "normalized_shape": ((4, 4), "permute: expected a call that blocks can make"),
    }
    for (name, (value, message)), path in itertools.product(changes.items(), ("rows", "tiles")):
        layer = SparseBlocks(nn.Sequential(Permuted(4)).eval(), 4, path=path)
        layer(torch.randn(1, 4, 4, 4), torch.ones(1, 4, 4))
        setattr(layer.module[0].norm, name, value)
        with pytest.raises(TypeError, match=message):
            layer(torch.randn(1, 4, 4, 4), torch.ones(1, 4, 4))


def test_a_norm_by_function_is_not_in_place():
    """torch.norm is recorded with out=None. ConvNeXt V2 has one: dense here, as it is over the whole map."""

    class Scaled(Graph):
        def forward(self, x):
            y = self.conv(x)
            return self.conv1(y / (1 + torch.norm(y, p=2, dim=(2, 3), keepdim=True)))

    model, x = Scaled(), torch.randn(1, 4, 6, 6)
    assert "" in dynops.convert_(model).fused
    mask = torch.ones(1, 6, 6)
    with dynops.use_mask(mask):
        assert torch.allclose(model(x), layer_by_layer(model)(x), atol=1e-6)


@pytest.mark.parametrize("path", [None, "rows"])
def test_skipped_samples_of_a_module_that_enlarges(path):
    module = nn.Sequential(
        nn.Conv2d(4, 16, 3, 2, 1), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=1)
    )
    layer, x = Skip(module, path=path).double().eval(), torch.randn(3, 4, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([x[0], x[1] + module(x[1:2])[0], x[2]])
        assert torch.allclose(layer(x, torch.tensor([0, 1, 0])), expected, atol=1e-13)


def test_macs_are_those_of_the_pixels_that_layers_read():
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1))
    layer, x = SparseBlocks(module.eval(), 2, "rows"), torch.randn(2, 4, 6, 6)
    mask = torch.zeros(2, 12, 12)
    mask[1, 5, 5] = 1  # a block of 4 pixels, which are one pixel before the shuffle
    macs = layer.macs(x, mask)
    assert macs.live.tolist() == [0, 4 * 8 + 4 * 8 * 9] and macs.dense == 144 * 8 + 36 * 4 * 8 * 9
