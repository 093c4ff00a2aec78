"""Chains, blocks and converted models where something is not as it usually is."""

import pytest
import torch
from torch import nn

import dynops
from dynops.nn import MaskedBatchNorm2d, MaskedGroupNorm, SparseBlocks, SparseSequential

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("layers", [[nn.Dropout()], [nn.Identity(), nn.Dropout()], []], ids=len)
def test_a_chain_that_computes_nothing_keeps_the_pixels_of_the_mask(layers):
    out = SparseSequential(*layers).eval()(X, MASK)
    assert torch.equal(out, X * MASK[:, None])


def test_from_dense_takes_chains_alone():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    for module in (nn.Conv2d(3, 3, 1), Residual(nn.Conv2d(3, 3, 1))):
        with pytest.raises(TypeError, match=r"^chain: expected an nn\.Sequential with its own forward"):
            SparseSequential.from_dense(module)


@pytest.mark.parametrize("convert", [False, True])
def test_a_norm_of_other_features_is_refused(convert):
    with pytest.raises(ValueError, match="expected 1 channels, as the norm has features, got 3"):
        if not convert:
            MaskedBatchNorm2d(1).eval()(X, MASK)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(1)).eval()
        dynops.convert_(model)
        with dynops.use_mask(MASK):
            model(X)


def test_gradients_of_shuffled_pixels_without_a_block():
    layer, x = SparseBlocks(nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2)), 2, "tiles"), X.clone()
    layer(x.requires_grad_(), torch.zeros(2, 16, 16)).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("make", [SparseSequential, lambda conv: SparseBlocks(nn.Sequential(conv), 2)])
def test_exports_with_a_dynamic_batch(make):
    layer, batch = make(nn.Conv2d(3, 8, 3, padding=1)).eval(), torch.export.Dim("batch", max=64)
    exported = torch.export.export(layer, (X, MASK), dynamic_shapes=({0: batch}, {0: batch}))
    x, mask = torch.randn(5, 3, 8, 8), torch.rand(5, 8, 8) < 0.5
    torch.testing.assert_close(exported.module()(x, mask), layer(x, mask))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (1, 1, 1, 8), (8, 1), (8,), (1, 8, 8, 8)])
def test_a_parameter_that_took_another_shape(shape):
    model = Scaled().eval()
    dynops.convert_(model)
    blocks = SparseBlocks(Scaled().eval(), 2, "rows")
    with dynops.use_mask(MASK):
        model(X)
        model.scale = nn.Parameter(torch.randn(shape))
        fused = model(X)
        model.first.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(fused, model(X))
    blocks.module.scale = nn.Parameter(torch.randn(shape))
    with pytest.raises(TypeError, match=r"expected scale of shape \[C, 1, 1\] or one value"):
        blocks(X, MASK)


@pytest.mark.parametrize("name", ["padding", "stride", "dilation"])
def test_a_convolution_whose_attribute_was_set_to_an_int(name):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()).eval()
    setattr(model[0], name, 2)
    expected = model(X)
    dynops.convert_(model)
    with dynops.use_mask(torch.ones(2, 8, 8)):
        torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(SparseBlocks(model, 2)(X, torch.ones(2, *expected.shape[2:])), expected)


def test_no_block_active_keeps_the_gradients_way():
    """Two products of rows with none of them: the result of an empty plan depends on the input, by zero."""
    x = torch.ones(2, 3, 1, 1, requires_grad=True)
    layer = SparseBlocks(
        nn.Sequential(nn.Upsample(scale_factor=1.0), nn.Upsample(scale_factor=1.0)), 1, path="rows"
    )
    out = layer.eval()(x, torch.zeros(2, 1, 1, dtype=torch.bool))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))


SPARSE = SparseBlocks(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval(), 2)
BAD = {
    "block_size: expected an int": lambda: dynops.use_mask(MASK, block_size=True),
    "ragged: expected a bool": lambda: dynops.use_mask(MASK, ragged="x"),
    "x: expected a tensor": lambda: SPARSE.macs(None, MASK),
    r"x: expected \[N, C, H, W\]": lambda: SPARSE.macs(X[0], MASK),
    r"in_shape: expected \(N, H, W\)": lambda: SPARSE.output_shape("abc"),
    "input: expected 6 channels": lambda: MaskedGroupNorm(3, 6)(X, MASK),
    "module: expected one with slimmable layers": lambda: dynops.nn.set_width(nn.Linear(2, 2), 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match="^" + message):
        BAD[message]()
