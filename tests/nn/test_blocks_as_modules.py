"""SparseBlocks as a module: what it refuses by name, and changes inside of it."""

import pytest
import torch
import torch.nn.functional as F
from stack_cases import expected, stack
from torch import nn

from dynops.nn import SparseBlocks
from dynops.plans import BlockPlan
from dynops.testing import random_mask, random_tensor


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
