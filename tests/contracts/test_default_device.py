"""``with torch.device(...)`` around calls, plans and contexts: everything lands where its inputs are."""

import ast
import pathlib

import pytest
import torch
from layer_cases import LAYERS, layer_of
from torch import nn

import dynops
from dynops import nn as layers

ROOT = pathlib.Path(dynops.__file__).parent
FACTORIES = "empty zeros ones full arange tensor as_tensor rand randn randint randperm eye linspace logspace"


def test_every_tensor_is_made_on_a_device_that_is_said():
    """What has no device lands on the default one. ``testing`` makes inputs for tests, where that is right."""
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            of_torch = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
            if of_torch and function.attr in FACTORIES.split():
                names = [keyword.arg for keyword in node.keywords]
                if "device" not in names and None not in names:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent


X = torch.randn(2, 8, 40, 6)
MASK = torch.rand(2, 40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
CALLS = {
    "norm": (layers.MaskedBatchNorm2d(8), X, MASK),
    "one mask": (layers.SparseConv2d(8, 8, 1), X, MASK[0]),
    "widths": (layers.SlimmableConv2d(8, 8, 3), X, 0.5),
    "widths of samples": (layers.SlimmableConv2d(8, 8, 3), X, torch.tensor([0.5, 1.0])),
    "gather pixels": (lambda x, m: dynops.ops.gather_pixels(x, dynops.PixelPlan.from_mask(m)), X, MASK),
    "upsampled": (lambda x, m: dynops.ops.interpolate_pixels(x, dynops.PixelPlan.from_mask(m)), X, MASK),
    "coordinates": (lambda c: dynops.PixelPlan.from_coordinates(c, (1, 5, 7)).mask(), torch.tensor([[4, 1], [0, 0]])),
    "resized": (lambda m: dynops.PixelPlan.from_mask(m).resized((20, 3)).mask(), MASK),
    "capacity": (lambda m: dynops.PixelPlan.from_mask(m, 99).needed(3, padding=1).mask(), MASK),
    "samples": (lambda k: dynops.SamplePlan.from_mask(k).pixels((3, 2)).index, torch.tensor([0, 1, 1])),
    "prefix": (lambda w: dynops.ChannelPlan.prefix(w, 5).mask(), torch.tensor([2, 5])),
    "cat": (lambda m: dynops.PixelPlan.cat([dynops.PixelPlan.from_mask(m, 480)] * 2).mask(), MASK),
}  # fmt: skip


def leaves(out) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [*CALLS, *LAYERS])
def test_calls_under_another_default_device(name, grad):
    layer = layer_of(name) if name in LAYERS else None
    function, *arguments = CALLS[name] if layer is None else (layer.module, *layer.inputs)

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
