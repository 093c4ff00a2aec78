"""Packed rows as the input of a converted model: what the dense map gives, without one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from masked_models import close, randomised
from torch import nn

import dynops
from benchmarks.exact.pillars import Backbone, pillars
from dynops.ops import scatter_pixels
from dynops.stack import run_rows
from dynops.stack.layers import resample
from dynops.stack.maps import value
from dynops.testing import MaskedPolicy

SIZE, C = 32, 64
WHERE = pillars(SIZE, 0.06)
PLAN = dynops.PixelPlan.from_coordinates(WHERE, (1, SIZE, SIZE))


def backbone():
    torch.manual_seed(0)
    return randomised(Backbone((1, 1, 1), (4, 6, 8), 4, (3, 2))).double().eval()


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PLAN.num_rows, C, dtype=torch.float64, generator=generator)


def wide(mask):
    return F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0


@pytest.mark.parametrize("mask", [PLAN.mask(), wide(PLAN.mask())], ids=["its own", "wider"])
@pytest.mark.parametrize("how", ["fused", "hooked"])
def test_a_backbone_of_pillars(how, mask):
    model, given = backbone(), rows().requires_grad_()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    if how == "hooked":
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    with dynops.use_mask(mask):
        out = model(dynops.packed(given, PLAN))
    with MaskedPolicy(mask):
        expected = dense(scatter_pixels(given, PLAN))
    parameters = [given, *dense.parameters()], [given, *model.parameters()]
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in maps), p)
        for maps, p in zip((expected, out), parameters, strict=True)
    ]
    for a, b in zip((*out, *grads[1]), (*expected, *grads[0]), strict=True):
        close(a, b, 1e-10)


def test_no_dense_map_is_made_of_it(monkeypatch):
    shapes, model = [], backbone()
    dynops.convert_(model)
    for room, name in ((value, "scattered"), (run_rows, "scatter_pixels")):
        real = getattr(room, name)
        monkeypatch.setattr(
            room,
            name,
            lambda rows, plan, *rest, real=real: shapes.append(plan.shape) or real(rows, plan, *rest),
        )
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, dynops.use_mask(PLAN):
            outputs = model(dynops.packed(rows(), PLAN))
    assert shapes == [(1, SIZE // 2, SIZE // 2)] * 2 * len(outputs)  # the outputs alone


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("last", [[], [nn.ReLU()]], ids=["to the map", "to rows"])
def test_zero_padding_between_convolutions_copies_no_rows(last, grad, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ZeroPad2d(1)
    model, x = nn.Sequential(*layers, nn.Conv2d(4, 5, 3, 2), *last), torch.randn(2, 3, 16, 24)
    dense, mask = copy.deepcopy(model), torch.rand(2, 16, 24) < 0.2
    dynops.convert_(model)
    monkeypatch.setattr(resample, "rows_at", None)
    with torch.set_grad_enabled(grad), dynops.use_mask(mask) as active:
        out = model(x)
    for layer in dense:
        x = layer(x)
        x = torch.where(active.plan((2, *x.shape[2:]), x.device).mask()[:, None], x, 0)
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


class PadsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, 2, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 2, 1, 1)))


def test_rows_outside_of_the_mask_are_read_through_a_padding():
    model = PadsFirst().double()
    dynops.convert_(model)
    with torch.no_grad(), dynops.use_mask(torch.rand(1, SIZE, SIZE) < 0.5):
        close(model(dynops.packed(rows(), PLAN)), model(scatter_pixels(rows(), PLAN)))


def test_elsewhere_it_is_the_dense_map():
    x, dense, model = dynops.packed(rows(), PLAN), scatter_pixels(rows(), PLAN), backbone()
    assert x.shape == dense.shape and x.dtype == dense.dtype and x.dim() == 4
    dynops.convert_(model)
    for y in (x, x * 2 - x, torch.cat([x], 1)):
        for a, b in zip(model(y), model(dense), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(x + 1, dense + 1) and torch.equal(nn.Identity()(x).relu(), dense.relu())
    layer = dynops.nn.SparseConv2d(C, 2, 3, padding=1).double()
    with dynops.use_mask(PLAN):
        assert torch.equal(layer(x), layer(dense))
        close(torch.sin(x).mean((2, 3)), torch.sin(dense).mean((2, 3)) * SIZE * SIZE / PLAN.num_rows)


def test_inside_a_compiled_function(fresh_dynamo):
    model, mask = (
        nn.Sequential(nn.Conv2d(C, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)).double(),
        PLAN.mask(),
    )
    dynops.convert_(model)

    def run(values, mask):
        plan = dynops.PixelPlan.from_mask(mask)
        with dynops.use_mask(plan):
            return model(dynops.packed(values, plan))

    room = torch.zeros(SIZE * SIZE, C, dtype=torch.float64)  # of the capacity form, which compilers use
    room[: PLAN.num_rows] = rows()
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        close(compiled(room, mask), run(rows(), mask))


def test_it_needs_rows_of_its_plan():
    with pytest.raises(ValueError, match="rows: expected"):
        dynops.packed(rows()[1:], PLAN)
    with pytest.raises(TypeError, match="plan: expected"):
        dynops.packed(rows(), PLAN.mask())
    with pytest.raises(TypeError, match=r"rows: expected a floating dtype, got torch\.int64"):
        dynops.packed(rows().long(), PLAN)
    with pytest.raises(
        ValueError, match="use_mask: expected a mask for the layer's batch of 1, got one for 2"
    ):
        model = backbone()
        dynops.convert_(model)
        with dynops.use_mask(PLAN.expand(2)):
            model(dynops.packed(rows(), PLAN))
