"""Layers under every mode of differentiation and vmap, with trainable and with frozen parameters, and on meta tensors."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import func, nn

import dynops
from dynops import nn as layers
from dynops.testing import assert_within_budget

MASK = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
PLAN = dynops.PixelPlan.from_mask(MASK)
CHANNELS = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])
INDEX = torch.tensor([[0, 2], [1, 0]])


def block() -> nn.Sequential:
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()


def converted() -> nn.Module:
    module = block()
    dynops.convert_(module)
    return module


def under_mask(layer, x):
    with dynops.active(MASK):
        return layer(x)


NORMS = {
    (dtype, meta): block()[1].to(dtype).to("meta" if meta else "cpu")
    for dtype in (torch.float32, torch.float64)
    for meta in (False, True)
}


def with_norm(layer, x):
    return layer(
        x, CHANNELS, CHANNELS, norm=NORMS[x.dtype, x.is_meta], activation="gelu", scale=x.mean((2, 3))
    )


# fmt: off
LAYERS = {
    "conv": (lambda: layers.SparseConv2d(4, 4, 3, padding=1), lambda m, x: m(x, PLAN)),
    "conv, no mask": (lambda: layers.SparseConv2d(4, 4, 3, padding=1), lambda m, x: m(x)),
    "conv, fused": (lambda: layers.SparseConv2d(4, 4, 3, padding=1), lambda m, x: m(x, MASK, gate=x[:, 0], residual=x, base=x)),
    "transposed": (lambda: layers.SparseConvTranspose2d(4, 4, 3, padding=1), lambda m, x: m(x, PLAN)),
    "sequential": (lambda: layers.SparseSequential(*block()).eval(), lambda m, x: m(x, PLAN)),
    "blocks on rows": (lambda: layers.SparseBlocks(block(), 4, path="rows"), lambda m, x: m(x, MASK)),
    "blocks on tiles": (lambda: layers.SparseBlocks(block(), 4, path="tiles"), lambda m, x: m(x, MASK)),
    "skip": (lambda: layers.Skip(block()), lambda m, x: m(x, torch.tensor([1.0, 0.0]))),
    "skip on rows": (lambda: layers.Skip(block(), path="rows"), lambda m, x: m(x, torch.tensor([1.0, 0.0]))),
    "skip, soft gate": (lambda: layers.Skip(block(), mode="replace"), lambda m, x: m(x, x.mean((1, 2, 3)).sigmoid())),
    "experts": (lambda: layers.Experts(3, 4, 6), lambda m, x: m(x.mean((2, 3)), INDEX, x[:, :2, 0, 0])),
    "channels": (lambda: layers.ChannelConv2d(4, 4, 3, padding=1), lambda m, x: m(x, CHANNELS, CHANNELS)),
    "channels, norm": (lambda: layers.ChannelConv2d(4, 4, 3), with_norm),
    "channel linear": (lambda: layers.ChannelLinear(4, 4), lambda m, x: m(x.mean((2, 3)), CHANNELS, CHANNELS)),
    "masked norm": (lambda: layers.MaskedBatchNorm2d(4).eval(), lambda m, x: m(x, MASK)),
    "converted": (converted, under_mask),
}
# fmt: on


def tensors(dtype):
    generator = torch.Generator().manual_seed(1)
    x, t = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, t


def made(name: str, dtype=torch.float64):
    torch.manual_seed(0)
    layer, call = LAYERS[name][0]().to(dtype), LAYERS[name][1]
    torch.manual_seed(0)  # what the call itself makes is the same each time
    return layer, lambda x: (torch.manual_seed(0), call(layer, x))[1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_and_second_derivatives(name, frozen):
    """Against differences of values and of first derivatives, which other tests compare with dense layers."""
    layer, run = made(name)
    layer.requires_grad_(not frozen)
    x, t = tensors(torch.float64)

    def loss(x):
        return run(x).square().sum()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    with torch.no_grad():
        slope = (run(x + 1e-6 * t) - run(x - 1e-6 * t)) / 2e-6
        close(func.jvp(run, (x,), (t,))[1], slope)
    bent = (gradient(x + 1e-6 * t) - gradient(x - 1e-6 * t)) / 2e-6
    close(func.jvp(run, (x,), (t,))[1], slope)
    close(func.linearize(run, x)[1](t), slope)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        close(forward_ad.unpack_dual(run(dual)).tangent, slope)
        leaf = forward_ad.make_dual(x.clone().requires_grad_(), t)
        close(forward_ad.unpack_dual(torch.autograd.grad(loss(leaf), leaf)[0]).tangent, bent)
    close(func.jvp(func.grad(loss), (x,), (t,))[1], bent)
    close(func.grad(lambda x: (func.grad(loss)(x) * t).sum())(x), bent)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    close(torch.autograd.grad(first, leaf, t)[0], bent)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vmap_over_inputs_and_weights(name, dtype):
    layer, run = made(name, dtype)
    x, t = tensors(dtype)
    batch = torch.stack([x, t, x + t])
    with torch.no_grad():
        torch.testing.assert_close(func.vmap(run)(batch), torch.stack([run(x) for x in batch]))
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    stacked = {k: torch.stack([p, 2 * p, p - 1]) for k, p in parameters.items()}

    def call(parameters, x):
        with torch.no_grad() if not torch._C._are_functorch_transforms_active() else torch.enable_grad():
            module = _Called(layer, run)
            return func.functional_call(module, {f"layer.{k}": p for k, p in parameters.items()}, (x,))

    each = [call({k: p[i] for k, p in stacked.items()}, x) for i in range(3)]
    torch.testing.assert_close(func.vmap(call, (0, None))(stacked, x), torch.stack(each))


class _Called(nn.Module):
    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(x)


def discriminator(dtype, dense: bool):
    generator = torch.Generator().manual_seed(2)
    shapes = ((8, 3, 3, 3), (1, 8, 3, 3))
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]

    def run(x, weights):
        if dense:
            h = F.conv2d(x, weights[0], padding=1) * MASK[:, None]
            return F.conv2d(F.leaky_relu(h, 0.2), weights[1], padding=1) * MASK[:, None]
        h = dynops.ops.sparse_conv2d(x, weights[0], None, PLAN, padding=1)
        return dynops.ops.sparse_conv2d(F.leaky_relu(h, 0.2), weights[1], None, PLAN, padding=1)

    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return run, x, weights


def gradient_penalty(dtype, dense):
    """WGAN-GP: the upstream gradient of the inner gradient is a constant."""
    run, x, weights = discriminator(dtype, dense)
    x.requires_grad_()
    (g,) = torch.autograd.grad(run(x, weights).mean(), x, create_graph=True)
    return torch.autograd.grad(((g.flatten(1).norm(dim=1) - 1) ** 2).mean(), weights)


def learned_start(dtype, dense):
    """MAML: the gradient through two steps of the inner optimiser."""
    run, x, weights = discriminator(dtype, dense)
    fast = list(weights)
    for _ in range(2):
        grads = torch.autograd.grad(run(x, fast).mean(), fast, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(fast, grads, strict=True)]
    return torch.autograd.grad(run(x, fast).square().mean(), weights)


def curvature(dtype, dense):
    """Third derivatives: the gradient of a Hessian-vector product's norm."""
    run, x, weights = discriminator(dtype, dense)
    w = [w.detach() for w in weights]

    def product(w1):
        loss = lambda w0: run(x, [w0, w1]).square().mean()  # noqa: E731
        return func.jvp(func.grad(loss), (w[0],), (w[0].cos(),))[1].square().sum()

    return (func.grad(product)(w[1]),)


@pytest.mark.parametrize("case", [gradient_penalty, learned_start, curvature])
def test_training_by_higher_derivatives(case):
    results = case(torch.float32, False), case(torch.float64, True), case(torch.float32, True)
    for actual, exact, dense in zip(*results, strict=True):
        assert actual.abs().max() > 0
        assert_within_budget(actual, exact, dense)


@pytest.mark.parametrize("name", LAYERS)
def test_meta_tensors(name):
    layer, call = copy.deepcopy(LAYERS[name][0]()), LAYERS[name][1]
    x = tensors(torch.float32)[0]
    expected = call(layer, x).shape
    with torch.device("meta"):
        mask, index = MASK.to("meta"), INDEX.to("meta")
        layer = layer.to("meta")
        replaced = {"MASK": mask, "INDEX": index, "CHANNELS": CHANNELS.to("meta")}
        replaced["PLAN"] = dynops.PixelPlan.from_mask(mask)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in replaced.items():
                patch.setitem(globals(), key, value)
            out = call(layer, x.to("meta"))
    assert out.is_meta and out.shape == expected


@pytest.mark.parametrize("path", ["rows", "tiles", None])
def test_hessian_through_rows_of_nchw_maps(path):
    """The map is plain, and its tangent batched."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()).eval()
    blocks, x, mask = (
        dynops.nn.SparseBlocks(module, 2, path=path),
        torch.randn(2, 4, 6, 6),
        torch.rand(2, 6, 6) < 0.5,
    )
    wide = dynops.BlockPlan.from_mask(mask, 2).mask()[:, None]
    ours = torch.func.hessian(lambda x: blocks(x, mask).square().sum())(x)
    exact = torch.func.hessian(lambda x: (module(x) * wide).square().sum())(x)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)
