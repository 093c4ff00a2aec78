"""SparseBlocks against the dense module and a mask of whole blocks: the same everywhere, on both paths."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from comparison import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynops
from dynops.nn import SparseBlocks, SparseConv2d, SparseSequential
from dynops.plans import BlockPlan
from dynops.testing import assert_within_budget, random_mask, random_tensor

# ------------------------------------------------------------------------------------ stacks


class Residual(nn.Module):
    """A ResNet basic block; with another stride or width it has a downsample branch."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.conv = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.downsample = nn.Conv2d(channels, 2 * width, 1, stride)

    def forward(self, x):
        return F.relu(self.expand(F.relu(self.norm(self.conv(self.reduce(x))))) + self.downsample(x))


class UNet(nn.Module):
    """Pools, enlarges, joins channels; functional calls and parameters of one value a channel."""

    def __init__(self, mode="bilinear"):
        super().__init__()
        self.mode = mode
        self.encoder = Residual(4, 6)
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.PReLU(6))
        self.join = nn.Conv2d(12, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(5, 1, 1))
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))

    def forward(self, x):
        a = self.encoder((x - self.mean) * 0.5)
        b = self.inner(F.max_pool2d(a, 3, stride=2, padding=1))
        b = F.interpolate(b, scale_factor=2, mode=self.mode)
        y = self.join(torch.cat([a, b], dim=1))
        return torch.sigmoid(y) * self.scale + y.clamp(-1, 1)


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


CONVS = {
    "3x3": conv(4, 6, 3, padding=1),
    "1x3": conv(4, 6, (1, 3), padding=(0, 1)),
    "5x5-stride": conv(4, 6, 5, stride=2, padding=2),
    "dilation": conv(4, 6, 3, dilation=2, padding=2),
    "groups": conv(4, 6, (5, 3), stride=(2, 1), padding=(2, 0), groups=2, bias=False),
    "depthwise": conv(4, 4, 3, padding=1, groups=4),
    "one-channel": conv(4, 1, 3, padding=1),
    "same": conv(4, 6, (3, 5), padding="same"),
    "valid": conv(4, 6, 3, padding="valid"),
    "padded-1x1": conv(4, 6, 1, padding=1),
    "sparse": lambda: SparseConv2d(4, 6, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed-gaps": lambda: nn.ConvTranspose2d(4, 6, 1, stride=2, output_padding=1),
    "transposed-uneven": lambda: nn.ConvTranspose2d(4, 6, (3, 4), stride=(1, 2), dilation=(2, 1), groups=2),
}
CHAINS = {
    "conv-bn-relu": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True)),
    "bn-first": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1, True), nn.Conv2d(4, 6, 3, 2, 1)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Sigmoid(), nn.Dropout2d()),
        nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.GELU()),
        nn.Conv2d(6, 3, 5, padding=2),
    ),
    "sparse-chain": lambda: SparseSequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)),
    "basic": lambda: Residual(4, 4),
    "basic-down": lambda: Residual(4, 6, 2),
    "stage": lambda: nn.Sequential(Residual(4, 4), Residual(4, 4), Residual(4, 6, 2)),
    "bottleneck": lambda: Bottleneck(4, 4),
    "bottleneck-down": lambda: Bottleneck(4, 4, 2),
}
TILES = {
    "max": lambda: nn.MaxPool2d(3, 2, 1),
    "max-ceil": lambda: nn.MaxPool2d((3, 2), 2, ceil_mode=True),
    "max-dilated": lambda: nn.MaxPool2d(3, 1, 1, dilation=2),
    "max-conv": lambda: nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
    ),
    "avg": lambda: nn.AvgPool2d(3, 2, 1),
    "avg-without-padding": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg-ceil": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg-divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "nearest": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(4, 5, 3, padding=1)
    ),
    "bilinear": lambda: nn.Sequential(
        nn.Upsample(scale_factor=3, mode="bilinear"), nn.Conv2d(4, 5, 3, padding=1, stride=3)
    ),
    "unet": UNet,
    "unet-nearest": lambda: UNet("nearest"),
}
STACKS = {**CONVS, **CHAINS, **TILES}


def stack(name, dtype=torch.float32):
    torch.manual_seed(1)
    return randomised(STACKS[name]()).to(dtype).eval()


def paths(name):
    return ("tiles",) if name in TILES else ("rows", "tiles")


WITH_PATHS = [(name, path) for name in STACKS for path in paths(name)]


def expected(module, x, plan, base=None):
    """The dense module, then the mask."""
    dense = module(x)
    return torch.where(plan.mask()[:, None], dense, torch.zeros_like(dense) if base is None else base)


def check(module, block_size, path, x, mask, with_base=False):
    """The layer in float32 against the dense module in float64 and its own error in float32."""
    layer = SparseBlocks(module, block_size, path)
    shape = module(x).shape
    assert layer.output_shape((x.shape[0], *x.shape[2:])) == (shape[0], *shape[2:])
    plan = BlockPlan.from_mask(mask, block_size)
    base = random_tensor(*shape, dtype=x.dtype) if with_base else None
    exact = expected(
        copy.deepcopy(module).double(), x.double(), plan, None if base is None else base.double()
    )
    dense = expected(module, x, plan, base)
    for grad in (False, True):  # without gradients the tile path works in place
        with torch.set_grad_enabled(grad):
            actual = layer(x, mask, base)
            assert_within_budget(actual, exact, dense, f"grad={grad}")
    return actual


# --------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("name", "path"), WITH_PATHS)
@pytest.mark.parametrize("block_size", [(6, 6), (2, 12), (100, 102)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_masked_dense(name, path, block_size):
    module = stack(name)
    if name == "bilinear":
        block_size = (block_size[0] + 1, block_size[1])
    with torch.no_grad():
        for size in ((14, 10), (8, 12)):
            x = random_tensor(2, 4, *size)
            mask = random_mask((2, *module(x).shape[2:]), 0.04)
            check(module, block_size, path, x, mask, with_base=True)
            check(module, block_size, path, x.to(memory_format=torch.channels_last), mask)


@pytest.mark.parametrize(("name", "path"), [c for c in WITH_PATHS if c[0] in ("nested", "stage", "max-conv")])
@pytest.mark.parametrize("block_size", [(1, 1), (1, 40), (5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["empty", "full", "one", "random"])
def test_masks_and_small_blocks(name, path, block_size, kind):
    module, x = stack(name), random_tensor(7, 4, 11, 9)
    mask = random_mask((7, *module(x).shape[2:]), 0.2, kind)
    out = check(module, block_size, path, x, mask)
    if kind == "empty":
        assert out.count_nonzero() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "path"), [("3x3", "rows"), ("basic", "rows"), ("basic", "tiles"), ("unet", None)]
)
def test_memory_format_is_the_inputs(name, path, layout):
    x = random_tensor(2, 4, 12, 12).to(memory_format=layout)
    out = SparseBlocks(stack(name), 4, path)(x, random_mask((2, 12, 12), 0.1))
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_base_is_the_input(path):
    module, x = stack("basic"), random_tensor(2, 4, 12, 12)
    mask = random_mask((2, 12, 12), 0.05)
    plan = BlockPlan.from_mask(mask, 4)
    out = SparseBlocks(module, 4, path)(x, plan, "input")
    outside = ~plan.mask()[:, None].expand_as(x)
    assert torch.equal(out[outside], x[outside]) and 0 < outside.count_nonzero() < x.numel()
    assert_within_budget(
        out,
        expected(copy.deepcopy(module).double(), x.double(), plan, x.double()),
        expected(module, x, plan, x),
    )


def test_without_a_mask_it_is_the_module():
    module, x = stack("stage"), random_tensor(2, 4, 12, 12)
    layer = SparseBlocks(module, 4)
    assert torch.equal(layer(x), module(x))
    assert torch.equal(layer(x, random_mask((2, 6, 6), kind="full")), module(x))
    assert torch.equal(layer.train()(x), copy.deepcopy(module).train()(x))


def test_inside_active():
    module, x = stack("basic-down"), random_tensor(2, 4, 16, 16)
    layer, mask = SparseBlocks(module, 2), random_mask((2, 16, 16), 0.05)
    at_output = dynops.PixelPlan.from_mask(mask).resized((8, 8)).mask()
    with dynops.active(mask):
        inside = layer(x)
        assert torch.equal(layer(x, torch.ones(2, 8, 8)), layer(x, torch.ones(2, 8, 8)))
    assert torch.equal(inside, layer(x, at_output))


def test_full_plan_inside_active_is_not_masked_again():
    layer = SparseBlocks(nn.Sequential(SparseConv2d(4, 4, 3, padding=1)), 4)
    x = random_tensor(1, 4, 8, 8)
    with dynops.active(random_mask((1, 8, 8), 0.1)):
        out = layer(x, torch.ones(1, 8, 8))
    assert_within_budget(out, F.conv2d(x.double(), layer.module[0].weight.double(), layer.module[0].bias.double(), padding=1), layer.module(x))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path"), [("3x3", "rows"), ("stage", "rows"), ("stage", "tiles"), ("unet", "tiles")]
)
def test_capacity_form(name, path):
    module, x = stack(name, torch.float64), random_tensor(2, 4, 12, 12, dtype=torch.float64)
    mask = random_mask((2, *module(x).shape[2:]), 0.1)
    layer = SparseBlocks(module, 4, path)
    plans = [BlockPlan.from_mask(mask, 4, capacity=capacity) for capacity in (None, 18)]
    compact, roomy = (layer(x, plan) for plan in plans)
    assert (compact - roomy).norm() <= 1e-13 * compact.norm() and compact.count_nonzero() > 0


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_plan_with_its_own_blocks(path):
    """The plan's grid holds: other sizes, gaps between blocks, an offset."""
    module, x = stack("stage", torch.float64), random_tensor(2, 4, 24, 24, dtype=torch.float64)
    layer = SparseBlocks(module, 4, path)
    for arguments in (
        {"block_size": 3},
        {"block_size": 2, "stride": 5, "offset": 1},
        {"block_size": (3, 5), "offset": -2},
    ):
        plan = BlockPlan.from_mask(random_mask((2, 12, 12), 0.3), **arguments)
        out, reference = layer(x, plan), expected(module, x, plan)
        assert (out - reference).norm() <= 1e-13 * reference.norm()


def test_all_blocks_of_a_grid_with_gaps_are_not_the_whole_map():
    module, x = stack("3x3"), random_tensor(1, 4, 12, 12)
    for arguments in ({"block_size": 2, "stride": 5}, {"block_size": 4, "offset": 2}):
        plan = BlockPlan.from_mask(torch.ones(1, 12, 12), **arguments)
        assert plan.is_full and not plan.mask().all()
        out = SparseBlocks(module, 4)(x, plan)
        assert torch.equal(out != 0, plan.mask()[:, None].expand_as(out))


# --------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("name", "path"), WITH_PATHS)
def test_gradients(name, path):
    """Of the input, every parameter and the base, equal to those of the dense module and a mask."""
    module = stack(name, torch.float64)
    x = random_tensor(2, 4, 12, 10, dtype=torch.float64).requires_grad_()
    shape = module(x).shape
    base = random_tensor(*shape, dtype=torch.float64).requires_grad_()
    mask, weight = random_mask((2, *shape[2:]), 0.05), random_tensor(*shape, dtype=torch.float64)
    block_size = 6
    out = SparseBlocks(module, block_size, path)(x, mask, base)
    reference = expected(module, x, BlockPlan.from_mask(mask, block_size), base)
    inputs = {"x": x, "base": base, **dict(module.named_parameters())}
    actual, right = (
        torch.autograd.grad((y * weight).sum(), list(inputs.values()), allow_unused=True)
        for y in (out, reference)
    )
    for name, a, b in zip(inputs, actual, right, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_gradient_of_an_empty_plan(path):
    module, x = stack("stage"), random_tensor(2, 4, 12, 12).requires_grad_()
    SparseBlocks(module, 4, path)(x, torch.zeros(2, 6, 6)).sum().backward()
    assert x.grad.count_nonzero() == 0


def test_two_readers_that_need_different_outsides():
    """The same value padded with zeros, with -inf and with zeros again; nothing may be changed under a reader."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1)
            self.pool, self.drop = nn.MaxPool2d(3, 1, 1), nn.Dropout()

        def forward(self, x):
            return self.a(x) + self.pool(self.drop(x)) + self.b(x) + self.pool(self.a(x).relu())

    module = Both().double().eval()
    x = random_tensor(2, 4, 8, 8, dtype=torch.float64)
    mask = random_mask((2, 8, 8), 0.1)
    reference = expected(module, x, BlockPlan.from_mask(mask, 2))
    layer = SparseBlocks(module, 2)
    with torch.no_grad():
        assert (layer(x, mask) - reference).norm() <= 1e-13 * reference.norm()
    out = layer(x, mask)
    assert (out - reference).norm() <= 1e-13 * reference.norm()
    actual, right = (torch.autograd.grad(y.sum(), list(module.parameters())) for y in (out, reference))
    for a, b in zip(actual, right, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


# --------------------------------------------------------------------------- affected blocks


@pytest.mark.parametrize(
    "name", ["3x3", "5x5-stride", "dilation", "transposed", "stage", "avg-ceil", "nearest", "unet"]
)
def test_affected_against_changed_outputs(name):
    """Each block whose output changes with one pixel is found; where the taps are dense, no other."""
    module = stack(name, torch.float64)
    for block in [m for m in module.modules() if isinstance(m, Residual)]:
        block.relu = nn.LeakyReLU(0.5)  # hides no change behind a zero
    layer = SparseBlocks(module, 6 if name == "nearest" else 2)
    x = random_tensor(1, 4, 10, 10, dtype=torch.float64)
    dense = module(x)
    for y, z in [(0, 0), (9, 9), (4, 5), (3, 0), (0, 8)]:
        other = x.clone()
        other[:, :, y, z] += torch.tensor([1.0, -0.7, 0.9, 1.3], dtype=x.dtype)
        differs = (module(other) != dense).any(1)
        found = layer.affected((other != x).any(1))
        changed = BlockPlan.from_mask(differs, layer.block_size).blocks()
        assert (found.blocks() | ~changed).all(), "a changed block was not found"
        assert found.shape == (1, *dense.shape[2:]) and found.block_size == layer.block_size
        if name in ("3x3", "stage"):
            assert torch.equal(found.blocks(), changed)
        mended = layer(other, found, dense)
        assert (mended - module(other)).norm() <= 1e-13 * dense.norm()


# ------------------------------------------------------------------------------------ errors


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.function(self.conv(x), x)


def inside(layer):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(layer))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (inside(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), r"1\.0: expected padding_mode='zeros', got 'reflect'"),
        (inside(nn.GroupNorm(2, 4)), r"1\.0: expected a layer .* got GroupNorm"),
        (inside(nn.InstanceNorm2d(4)), r"1\.0: .* got InstanceNorm2d"),
        (inside(nn.BatchNorm2d(4, track_running_stats=False)), r"1\.0: expected a norm with running statistics"),
        (inside(nn.AdaptiveAvgPool2d(1)), r"1\.0: .* got AdaptiveAvgPool2d"),
        (inside(nn.Linear(4, 4)), r"1\.0: .* got Linear"),
        (inside(nn.Flatten()), r"1\.0: .* got Flatten"),
        (inside(nn.MaxPool2d(2, return_indices=True)), r"1\.0: expected return_indices=False"),
        (inside(nn.Upsample(scale_factor=1.5)), r"1\.0: expected integer scale factors"),
        (inside(nn.Upsample(size=(8, 8))), r"1\.0: expected integer scale factors"),
        (inside(nn.Upsample(scale_factor=2, mode="bicubic")), r"1\.0: expected mode nearest or bilinear"),
        (inside(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), r"1\.0: expected mode"),
        (inside(nn.Softmax2d()), r"1\.0: .* got Softmax2d"),
        (nn.Linear(4, 4), r"module: expected a layer .* got Linear"),
        (nn.Sequential(Functional(lambda y, x: y.view(-1))), r"0\.view: expected a call"),
        (nn.Sequential(Functional(lambda y, x: y / x)), r"0\.truediv: expected a call"),
        (nn.Sequential(Functional(lambda y, x: torch.cat([y, x], 2))), r"0\.cat: expected a call"),
        (nn.Sequential(Functional(lambda y, x: y.mean((2, 3)))), r"0\.mean: expected a call"),
        (nn.Sequential(Functional(lambda y, x: y + F.avg_pool2d(x, 2))), r"expected maps of one resolution"),
        (Untraceable(), r"module: expected one that can be traced; torch\.fx"),
        ("conv", r"module: expected an nn\.Module, got str"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_run_raises_by_name(module, message):
    with pytest.raises(TypeError, match=message):
        SparseBlocks(module, 4)


def test_training_mode_raises_by_name():
    module, x = stack("nested"), random_tensor(1, 4, 8, 8)
    layer, mask = SparseBlocks(module, 2), random_mask((1, 4, 4), 0.2)
    module[1][1].train()
    with pytest.raises(TypeError, match=r"1\.1: expected a norm in eval mode, got BatchNorm2d"):
        layer(x, mask)
    module.eval()[0][2].train()
    with pytest.raises(TypeError, match=r"0\.2: expected a dropout in eval mode, got Dropout2d"):
        layer(x, mask)


def test_hooks_raise_by_name():
    layer, x, mask = SparseBlocks(stack("basic"), 4), random_tensor(1, 4, 8, 8), torch.eye(8)[None]
    handle = layer.module.conv1.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(TypeError, match="conv1: expected no hooks"):
        layer(x, mask)
    assert torch.equal(layer(x), layer.module(x))
    handle.remove()
    layer(x, mask)


def test_bad_arguments():
    x, mask = random_tensor(2, 4, 8, 8), torch.ones(2, 8, 8)
    layer = SparseBlocks(nn.Conv2d(4, 4, 3, padding=1), 4)
    for arguments, error, message in [
        ((x, torch.ones(2, 4, 4)), ValueError, r"mask_or_plan: expected one for the output's .* \(2, 8, 8\), got \(2, 4, 4\)"),
        ((x, torch.ones(3, 8, 8)), ValueError, r"mask_or_plan: .*got \(3, 8, 8\)"),
        ((x, "mask"), TypeError, r"mask_or_plan: expected a BlockPlan or a mask tensor, got str"),
        ((x[0], mask), ValueError, r"x: expected \[N, C, H, W\]"),
        ((x, BlockPlan.from_mask(mask, 4, stride=2)), ValueError, r"mask_or_plan: expected blocks that do not overlap"),
        ((x, torch.eye(8).expand(2, 8, 8), x[:, :3]), ValueError, r"base: expected shape \(2, 4, 8, 8\)"),
        ((x, torch.eye(8).expand(2, 8, 8), x.double()), TypeError, r"base: expected dtype torch.float32"),
        ((x, mask, "output"), TypeError, r"base: expected a tensor, None or 'input', got 'output'"),
        ((x, None, x), ValueError, r"base: expected a mask with it"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            layer(*arguments)
    for path in ("rows", "tiles"):
        with pytest.raises(ValueError, match="x: expected 4 channels, got 3"):
            SparseBlocks(layer.module, 4, path)(x[:, :3], torch.eye(8).expand(2, 8, 8))
    with pytest.raises(ValueError, match=r"block_size: expected a multiple of \(2, 2\), got \(3, 4\)"):
        SparseBlocks(nn.Upsample(scale_factor=2), (3, 4))
    with pytest.raises(ValueError, match=r"block_size: expected a multiple of \(2, 2\), got \(5, 5\)"):
        SparseBlocks(nn.Upsample(scale_factor=2), 4)(
            x, BlockPlan.from_mask(torch.eye(16).expand(2, 16, 16), 5)
        )
    with pytest.raises(ValueError, match=r"block_size: expected an int or a pair"):
        SparseBlocks(nn.Conv2d(4, 4, 3), 0)
    with pytest.raises(ValueError, match=r"path: expected one of .* got 'fast'"):
        SparseBlocks(nn.Conv2d(4, 4, 3), 4, "fast")
    with pytest.raises(ValueError, match=r"path: expected 'tiles' or None, as 0 cannot run on rows"):
        SparseBlocks(nn.Sequential(nn.MaxPool2d(2)), 4, "rows")
    with pytest.raises(ValueError, match=r"x: expected an input"):
        SparseBlocks(nn.Conv2d(4, 4, 9), 4).output_shape((1, 8, 8))


# ------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1), torch.ones(1, 1, 1)], ids=["empty", "full"])
def test_a_transposed_tile_whose_cut_is_longer_than_what_it_reaches(mask):
    module = nn.Sequential(nn.ConvTranspose2d(3, 3, 1, stride=3, padding=1), nn.MaxPool2d(1, 3)).eval()
    blocks, x = SparseBlocks(module, 1).eval(), random_tensor(1, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(blocks(x, mask), module(x) * mask[:, None])


def test_a_setting_inside_that_changes():
    conv = nn.Conv2d(8, 8, 3, padding=1, stride=1)
    blocks, x = SparseBlocks(nn.Sequential(conv, nn.ReLU()), 4).eval(), random_tensor(1, 8, 16, 16)
    for padding, dilation in ((1, 1), (2, 2), (3, 3)):
        conv.padding, conv.dilation = (padding, padding), (dilation, dilation)
        with torch.no_grad():
            out = blocks(x, torch.ones(1, 16, 16))
            torch.testing.assert_close(out, conv(x).relu(), rtol=1e-4, atol=1e-5)


def test_a_module_inside_that_is_replaced():
    layer = SparseBlocks(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), 4)
    x, mask = random_tensor(1, 4, 8, 8), torch.eye(8)[None]
    layer(x, mask)
    layer.module[0] = nn.MaxPool2d(3, 1, 1)
    assert torch.equal(layer(x, mask), expected(layer.module, x, BlockPlan.from_mask(mask, 4)))
    layer.module[1] = nn.Flatten()
    with pytest.raises(TypeError, match="1: expected a layer"):
        layer(x, mask)


# -------------------------------------------------------------------------------- properties


@st.composite
def layers(draw):
    """A random stack of three layers of 3 channels, with a skip around the middle where sizes allow."""
    to = lambda low, high: draw(st.integers(low, high))  # noqa: E731

    def pool(kind, **options):
        kernel = to(1, 4)
        return kind(kernel, to(1, 3), to(0, kernel // 2), ceil_mode=draw(st.booleans()), **options)

    kinds = {
        "conv": lambda: nn.Conv2d(
            3, 3, to(1, 4), to(1, 2), to(0, 2), to(1, 2), groups=draw(st.sampled_from([1, 3]))
        ),
        "transposed": lambda: nn.ConvTranspose2d(3, 3, to(1, 4), to(1, 3), to(0, 1), dilation=to(1, 2)),
        "max": lambda: pool(nn.MaxPool2d),
        "avg": lambda: pool(nn.AvgPool2d, count_include_pad=draw(st.booleans())),
        "near": lambda: nn.Upsample(scale_factor=to(1, 3)),
        "linear": lambda: nn.Upsample(scale_factor=to(1, 3), mode="bilinear"),
        "norm": lambda: nn.BatchNorm2d(3),
        "activation": nn.Sigmoid,
        "residual": lambda: Residual(3, 3),
    }
    stack = [kinds[draw(st.sampled_from(sorted(kinds)))]() for _ in range(to(1, 3))]
    return randomised(nn.Sequential(*stack)).double().eval()


@settings(max_examples=60, deadline=None)
@given(
    layers(),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_random_stacks(module, height, width, block_h, block_w, seed):
    torch.manual_seed(seed)
    x = random_tensor(2, 3, height, width, dtype=torch.float64).requires_grad_()
    try:
        dense = module(x)
    except RuntimeError:  # too small an input for the stack
        return
    layer = SparseBlocks(module, 216)  # a multiple of whatever its factors are
    block_size = tuple(b * m for b, m in zip((block_h, block_w), layer._stack().stack.multiple, strict=True))
    plan = BlockPlan.from_mask(random_mask((2, *dense.shape[2:]), 0.2), block_size)
    reference = expected(module, x, plan)
    inputs = [x, *module.parameters()]
    for path in ("tiles", "rows")[: 1 + layer._stack().rows]:
        layer.path = path
        with torch.no_grad():
            silent = layer(x, plan)
        out = layer(x, plan)
        for value in (silent, out):
            assert (value - reference).norm() <= 1e-12 * reference.norm(), (path, module)
        grads = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, retain_graph=True) for y in (out, reference)]  # fmt: skip
        for a, b in itertools.zip_longest(*grads):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-8)
