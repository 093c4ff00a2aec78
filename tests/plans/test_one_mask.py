"""One mask, or one plan, for every sample of a batch, whatever the batch is."""

import pytest
import torch
from torch import nn

import dynops
from dynops import nn as layers
from dynops.budget import MacCounter, Recorder

N, H, W = 3, 11, 9
X = torch.randn(N, 4, H, W)
MASK = torch.rand(H, W, generator=torch.Generator().manual_seed(0)) < 0.3
EACH = MASK.expand(N, H, W).clone()
FORMS = {
    "[H, W]": MASK,
    "[1, H, W]": MASK[None],
    "[1, 1, H, W]": MASK[None, None].float(),
    "plan": dynops.PixelPlan.from_mask(MASK),
    "capacity plan": dynops.PixelPlan.from_mask(MASK, 60),
}


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).eval()


LAYERS = {
    "conv": layers.SparseConv2d(4, 6, 3, padding=1),
    "transposed": layers.SparseConvTranspose2d(4, 6, 3, padding=1),
    "norm": layers.MaskedBatchNorm2d(4).eval(),
    "pool": layers.MaskedMaxPool2d(3, 1, 1),
    "chain": layers.SparseSequential.from_dense(chain()),
}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer, form):
    same(layer(X, form), layer(X, EACH))
    same(layer(X[:1], form), layer(X[:1], EACH[:1]))
    assert layer(X[:0], form).shape == layer(X[:0], EACH[:0]).shape


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_unbatched_layers(form):
    for name in ("conv", "transposed", "pool"):
        same(LAYERS[name](X[0], form), LAYERS[name](X[:1], EACH[:1])[0])


@pytest.mark.parametrize("path", ["rows", "tiles", None])
def test_blocks(path):
    blocks = layers.SparseBlocks(chain(), 4, path)
    plan = dynops.BlockPlan.from_mask(MASK, 4)
    for form in (*list(FORMS.values())[:3], plan, dynops.BlockPlan.from_mask(MASK, 4, capacity=9)):
        same(blocks(X, form), blocks(X, EACH))
    assert plan.expand(N).shape == (N, H, W) and torch.equal(
        plan.expand(N).mask(), plan.mask().expand(N, H, W)
    )


class Stacks(nn.Module):
    """Works on several batch sizes: its input, two of them stacked, one sample of it, an unbatched one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = chain(), chain()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, a, b):
        both = self.one(torch.cat([a, b]))
        first, second = both.chunk(2)
        return self.two(first + second), self.down(both), self.down(first[0])


@pytest.mark.parametrize(
    "form", [*FORMS.values(), dynops.BlockPlan.from_mask(MASK, 3)], ids=[*FORMS, "blocks"]
)
def test_models_that_work_on_several_batches(form):
    model, other = Stacks(), torch.randn(N, 4, H, W)
    dynops.convert_(model)
    each = form.mask() if isinstance(form, dynops.BlockPlan) else MASK[None]
    with torch.no_grad():
        with dynops.active(form):
            out, down, alone = model(X, other)
        with dynops.active(each.expand(2 * N, H, W)):
            both = model.one(torch.cat([X, other]))
            expected_down = model.down(both)
        with dynops.active(each.expand(N, H, W)):
            same(out, model.two(both[:N] + both[N:]))
        same(down, expected_down)
        same(alone, expected_down[0])


def test_blocks_of_a_context_and_a_nested_batch():
    model = chain()
    dynops.convert_(model)
    with torch.no_grad():
        with dynops.active(MASK, block_size=4):
            out = model(X)
            assert model(X[:0]).shape == (0, 4, H, W)
        with dynops.active(EACH, block_size=4):
            same(out, model(X))


def test_the_plan_of_a_resolution_is_built_once():
    context = dynops.active(MASK)
    a, b = context.plan((2, H, W), MASK.device), context.plan((5, H, W), MASK.device)
    one = context.plan((1, H, W), MASK.device)
    assert a is one.expand(2) and b is one.expand(5) and context.plan((2, H, W), MASK.device) is a
    assert torch.equal(b.mask(), MASK.expand(5, H, W)) and b.index.dtype == torch.int32


def test_other_batches_are_refused():
    plan = dynops.PixelPlan.from_mask(EACH)
    assert plan.expand(N) is plan
    with pytest.raises(ValueError, match="batch: expected 3, as the plan is of more than one sample, got 2"):
        plan.expand(2)
    with pytest.raises(ValueError, match="batch: expected an int >= 0, got -1"):
        dynops.PixelPlan.from_mask(MASK).expand(-1)
    with pytest.raises(ValueError, match="batch: expected at most 2147483647 pixels"):
        dynops.PixelPlan.from_mask(MASK).expand(2**31 // (H * W) + 1)
    with pytest.raises(ValueError, match="plan: expected one for the output's"):
        LAYERS["conv"](X, EACH[:2])
    with dynops.active(EACH[:2]), pytest.raises(ValueError, match="batch of 3, got one for 2"):
        LAYERS["conv"](X)
    with pytest.raises(
        ValueError, match=r"mask_or_plan: expected \[N, H, W\], \[N, 1, H, W\] or \[H, W\], got shape"
    ):
        LAYERS["conv"](X, torch.ones(1, 4, H, W))


def test_gradients_and_a_gate():
    conv, gate = layers.SparseConv2d(4, 6, 3, padding=1), torch.rand(N, H, W, requires_grad=True)
    x = X.clone().requires_grad_()
    conv(x, MASK, gate=gate).square().sum().backward()
    got, gate_grad = x.grad.clone(), gate.grad.clone()
    x.grad = gate.grad = None
    conv(x, EACH, gate=gate).square().sum().backward()
    same(got, x.grad)
    same(gate_grad, gate.grad)


@pytest.mark.parametrize("name", ["conv", "chain"])
def test_budgets(name):
    layer = LAYERS[name]
    expected = rates = None
    for form in (EACH, *FORMS.values()):
        with MacCounter(layer) as counter, Recorder(layer) as recorder:
            layer(X, form)
        found = counter.per_sample.tolist()
        expected = found if expected is None else expected
        assert len(found) == N and found == expected > [0] * N
        rates = recorder.summary()["rates"] if rates is None else rates
        assert recorder.summary()["rates"] == rates and (rates or name == "chain")
    mask = MASK[None].double().requires_grad_()
    with MacCounter(layer) as counter:
        layer(X, mask)
    counter.total.backward()
    assert mask.grad.shape == mask.shape and mask.grad[0][MASK].min() > 0


def test_a_mask_repeats_over_a_batch_that_a_model_makes():
    model = chain()
    dynops.convert_(model)
    each, x = torch.rand(2, H, W) < 0.3, X[:2]
    with torch.no_grad(), dynops.active(each):
        twice, once = model(torch.cat([x, x])), model(x)
    same(twice, torch.cat([once, once]))
    plan = dynops.PixelPlan.from_mask(each, each.numel())  # of the capacity form
    with torch.no_grad(), dynops.active(plan):
        same(model(torch.cat([x, x])), twice)
