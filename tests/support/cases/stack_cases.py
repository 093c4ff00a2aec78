"""Stacks of layers, and SparseBlocks beside the dense module and a mask of whole blocks."""

import copy

import torch
import torch.nn.functional as F
from comparison import randomised
from torch import nn

from dynops.nn import SparseBlocks, SparseConv2d, SparseSequential
from dynops.plans import BlockPlan
from dynops.testing import assert_within_budget, random_tensor


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
