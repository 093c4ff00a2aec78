"""``with torch.device(...)`` around calls, plans and contexts: everything lands where its inputs are."""

from __future__ import annotations

import ast
import pathlib

import pytest
import torch
from torch import nn

import dynops
from dynops import nn as layers

ROOT = pathlib.Path(dynops.__file__).parent
FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "as_tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "linspace",
    "logspace",
]


def test_every_tensor_is_made_on_a_device_that_is_said():
    """What has no device lands on the default one. ``testing`` makes inputs for tests, where that is right."""
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            of_torch = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
            if of_torch and function.attr in FACTORIES:
                names = [keyword.arg for keyword in node.keywords]
                if "device" not in names and None not in names:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent


X = torch.randn(2, 8, 40, 6)
MASK = torch.rand(2, 40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
CHANNELS = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
TOPK = torch.randint(0, 3, (20, 2), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(20, 8)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()


def head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def in_context(model, x, mask):
    with dynops.active(mask, block_size=2):
        return model(x)


def converted() -> nn.Module:
    model = nn.Sequential(block(), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 8, 2, stride=2))
    dynops.convert_(model)
    return model


CALLS = {
    "conv": (layers.SparseConv2d(8, 8, 3, padding=1), X, MASK),
    "wide conv": (layers.SparseConv2d(8, 40, 3, padding=1), X, MASK),
    "depthwise": (layers.SparseConv2d(8, 8, 3, padding=1, groups=8), X, MASK),
    "transposed": (layers.SparseConvTranspose2d(8, 8, 3, padding=1), X, MASK),
    "norm": (layers.MaskedBatchNorm2d(8), X, MASK),
    "one mask": (layers.SparseConv2d(8, 8, 1), X, MASK[0]),
    "rows": (layers.SparseBlocks(block(), 4, "rows"), X, MASK),
    "tiles": (layers.SparseBlocks(block(), 4, "tiles"), X, MASK),
    "chain": (layers.SparseSequential(*block()), X, MASK),
    "skip": (layers.Skip(block()), X, torch.tensor([0.0, 1.0])),
    "exits": (layers.EarlyExit([block(), block()], [head(), head()], layers.MaxSoftmax(0.4)).eval(), X),
    "experts": (layers.Experts(3, 8, 8), ROWS, TOPK, torch.rand(20, 2)),
    "moe": (layers.MoE(layers.TopKRouter(8, 3, 2), layers.Experts(3, 8, 8)), ROWS),
    "channels": (layers.ChannelConv2d(8, 8, 3), X, CHANNELS, CHANNELS),
    "channel linear": (layers.ChannelLinear(8, 5), ROWS[:2], CHANNELS),
    "kernels": (layers.CondConv2d(8, 6, 3, num_experts=3), X, torch.rand(2, 3)),
    "widths": (layers.SlimmableConv2d(8, 8, 3), X, 0.5),
    "widths of samples": (layers.SlimmableConv2d(8, 8, 3), X, torch.tensor([0.5, 1.0])),
    "skipped steps": (layers.SkipRNN(8, 4, batch_first=True), ROWS.view(2, 10, 8)),
    "gather pixels": (lambda x, m: dynops.ops.gather_pixels(x, dynops.PixelPlan.from_mask(m)), X, MASK),
    "upsampled": (lambda x, m: dynops.ops.interpolate_pixels(x, dynops.PixelPlan.from_mask(m)), X, MASK),
    "coordinates": (lambda c: dynops.PixelPlan.from_coordinates(c, (1, 5, 7)).mask(), torch.tensor([[4, 1], [0, 0]])),
    "resized": (lambda m: dynops.PixelPlan.from_mask(m).resized((20, 3)).mask(), MASK),
    "capacity": (lambda m: dynops.PixelPlan.from_mask(m, 99).needed(3, padding=1).mask(), MASK),
    "samples": (lambda k: dynops.SamplePlan.from_mask(k).pixels((3, 2)).index, torch.tensor([0, 1, 1])),
    "prefix": (lambda w: dynops.ChannelPlan.prefix(w, 5).mask(), torch.tensor([2, 5])),
    "cat": (lambda m: dynops.PixelPlan.cat([dynops.PixelPlan.from_mask(m, 480)] * 2).mask(), MASK),
    "context": (in_context, converted(), X, MASK),
}  # fmt: skip


def leaves(out) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_under_another_default_device(call, grad):
    function, *arguments = call

    def run():
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            out = leaves(function(*arguments))
            made = [leaf for leaf in out if leaf.requires_grad]
            if made:
                made[0].float().square().sum().backward()
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        return out + grads

    expected = run()
    with torch.device("meta"):
        found = run()
    assert len(expected) == len(found) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device
        torch.testing.assert_close(a, b)


def test_plans_made_of_numbers_lie_where_their_plan_says():
    with torch.device("meta"):
        assert dynops.ChannelPlan.prefix(3, 5).device.type == "cpu"
        assert dynops.ChannelPlan.from_index([[0, 2], [1]], 4).mask().sum() == 3
        assert dynops.PixelPlan.full((1, 2, 2)).device.type == "cpu"


def test_counters_under_another_default_device():
    conv = layers.SparseConv2d(8, 8, 3, padding=1)
    with dynops.budget.MacCounter(conv) as counter:
        conv(X, MASK)
    with (
        torch.device("meta"),
        dynops.budget.MacCounter(conv) as other,
        dynops.budget.Recorder(conv) as recorder,
    ):
        conv(X, MASK)
        assert float(other.total) == float(counter.total) > 0 and recorder.summary()["rates"]
