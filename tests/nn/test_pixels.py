"""SparseConv2d, SparseConvTranspose2d, the masked layers and SparseSequential against the dense modules."""

import copy

import pytest
import torch
from comparison import close, close_gradients, randomised
from layer_cases import CONV_ARGUMENTS
from torch import nn

import dynops
from dynops.nn import (
    MaskedAvgPool2d,
    MaskedBatchNorm2d,
    MaskedMaxPool2d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseSequential,
)

CONVS = [
    *CONV_ARGUMENTS,
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
]
TRANSPOSED = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": (3, 4), "stride": (1, 3), "dilation": (2, 1), "groups": 2, "bias": False},
]


def mask_of(shape, density=0.4, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def masked(dense, mask):
    return torch.where(mask[:, None], dense, 0)


@pytest.mark.parametrize(
    "cls, kind, arguments",
    [(SparseConv2d, nn.Conv2d, arguments) for arguments in CONVS]
    + [(SparseConvTranspose2d, nn.ConvTranspose2d, arguments) for arguments in TRANSPOSED],
    ids=str,
)
def test_conv_equals_masked_dense(cls, kind, arguments):
    dense = kind(4, 6, **arguments).double()
    layer = cls.from_dense(dense)
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    expected = dense(x)
    assert torch.equal(layer(x), expected)
    mask = mask_of((2, *expected.shape[2:]))
    close(layer(x, mask), masked(expected, mask))
    close(layer(x, dynops.PixelPlan.from_mask(mask)), masked(expected, mask))
    with dynops.active(mask):
        close(layer(x), masked(expected, mask))
    base = torch.randn_like(expected)
    gate = torch.rand(mask.shape, dtype=torch.float64)
    residual = torch.randn_like(expected)
    out = layer(x, mask, gate=gate, residual=residual, base=base)
    close(out, torch.where(mask[:, None], expected * gate[:, None] + residual, base))


def test_conv_transpose_output_size():
    dense = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1).double()
    layer = SparseConvTranspose2d.from_dense(dense)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    expected = dense(x, output_size=[8, 10])
    assert torch.equal(layer(x, [8, 10]), expected)
    mask = mask_of((1, 8, 10))
    close(layer(x, mask, output_size=[8, 10]), masked(expected, mask))
    with dynops.active(mask):
        close(layer(x, [8, 10]), masked(expected, mask))
    with pytest.raises(ValueError, match="output size"):
        layer(x, mask, output_size=[20, 20])


@pytest.mark.parametrize("cls", [SparseConv2d, SparseConvTranspose2d])
def test_unbatched(cls):
    layer = cls(3, 4, 3, padding=1).double()
    x = torch.randn(3, 6, 7, dtype=torch.float64)
    expected = layer(x)
    assert expected.shape == (4, 6, 7)
    mask = mask_of((6, 7))
    close(layer(x, mask), torch.where(mask, expected, 0))
    close(layer(x, dynops.PixelPlan.from_mask(mask[None])), torch.where(mask, expected, 0))
    gate, base = torch.rand(6, 7).double(), torch.randn_like(expected)
    close(layer(x, mask, gate=gate, base=base), torch.where(mask, expected * gate, base))
    with dynops.active(mask[None]):
        close(layer(x), torch.where(mask, expected, 0))


def test_from_dense_shares_everything():
    dense = nn.Conv2d(3, 4, 3, dtype=torch.float64).eval()
    layer = SparseConv2d.from_dense(dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias and not layer.training
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.register_parameter("extra", nn.Parameter(torch.ones(1)))
    assert not hasattr(dense, "extra")
    with pytest.raises(TypeError, match=r"layer: expected nn.Conv2d, got ConvTranspose2d"):
        SparseConv2d.from_dense(nn.ConvTranspose2d(3, 4, 3))


def test_bad_calls():
    layer, x = SparseConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match="plan: expected one for the output"):
        layer(x, torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match="gate: expected a mask with it"):
        layer(x, gate=torch.ones(2, 6, 6))
    with pytest.raises(TypeError, match="mask_or_plan"):
        layer(x, [1, 2])
    with pytest.raises(ValueError, match="input: expected"):
        layer(torch.randn(3, 6), torch.ones(1, 6, 6))
    with (
        pytest.raises(ValueError, match="mask for the layer's batch of 2, got one for 3"),
        dynops.active(torch.ones(3, 6, 6)),
    ):
        layer(x)


def test_masked_norm_in_eval():
    norm = randomised(MaskedBatchNorm2d(5)).double().eval()
    x, mask = torch.randn(2, 5, 4, 6, dtype=torch.float64), mask_of((2, 4, 6))
    expected = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.equal(norm(x), expected)
    close(norm(x, mask), masked(expected, mask))
    with torch.no_grad():
        close(norm(x, mask), masked(expected, mask))
        norm.weight.mul_(2)  # the folded vectors are made again
        norm.running_var.add_(1)
        close(norm(x, mask), masked(nn.BatchNorm2d.forward(norm, x), mask))


@pytest.mark.parametrize("form", ["compact", "capacity"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_masked_norm_in_training(momentum, form):
    norm = randomised(MaskedBatchNorm2d(5, momentum=momentum)).double()
    dense = copy.deepcopy(norm)
    x, mask = torch.randn(2, 5, 4, 6, dtype=torch.float64), mask_of((2, 4, 6))
    plan = dynops.PixelPlan.from_mask(mask, None if form == "compact" else mask.numel())
    for _ in range(2):
        out = norm(x, plan)
        rows = nn.BatchNorm2d.forward(dense, x.permute(0, 2, 3, 1)[mask].t()[None, :, :, None])
    close(out.permute(0, 2, 3, 1)[mask], rows[0, :, :, 0].t())
    assert not out.permute(0, 2, 3, 1)[~mask].any()
    for key, value in dense.state_dict().items():
        close(norm.state_dict()[key].double(), value.double())


@pytest.mark.parametrize("form", ["compact", "capacity"])
@pytest.mark.parametrize("active", [0, 1])
def test_masked_norm_of_too_few_pixels(active, form):
    norm = randomised(MaskedBatchNorm2d(3)).double()
    before = copy.deepcopy(norm.state_dict())
    x, mask = torch.randn(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 2, 2)
    mask[0, 0, :active] = 1
    plan = dynops.PixelPlan.from_mask(mask, None if form == "compact" else 4)
    out = norm(x, plan)
    close(out, masked(copy.deepcopy(norm).eval()(x), mask != 0))
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("cls", [MaskedMaxPool2d, MaskedAvgPool2d])
def test_masked_pool(cls):
    pool, x, mask = cls(3, 2, 1), torch.randn(2, 4, 8, 8), mask_of((2, 4, 4))
    assert torch.equal(pool(x, mask), masked(pool(x), mask))
    with dynops.active(mask):
        assert torch.equal(pool(x), masked(pool(x, torch.ones(2, 4, 4)), mask))


def chain(inplace=False):
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(8, 6, (3, 5), stride=2, padding=2, dilation=(2, 1)), nn.Identity()),
        nn.LeakyReLU(0.1, inplace),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 5, 3, stride=2, output_padding=1),
        nn.Sigmoid(),
    )


STARTS_WITH_NORM = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish())
NO_CONV = nn.Sequential(nn.PReLU(4), nn.BatchNorm2d(4, affine=False), nn.SiLU())


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(
    "dense", [chain(), chain(True), STARTS_WITH_NORM, NO_CONV, nn.Sequential()], ids=lambda m: str(len(m))
)
def test_chain_is_exact_at_the_mask(dense, density):
    dense = randomised(dense).double().eval()
    sparse = SparseSequential.from_dense(dense)
    assert sparse[0] is dense[0] if len(dense) else True
    assert list(sparse.state_dict()) == list(dense.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    kept = x.clone()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            expected = dense(x)
            assert torch.equal(sparse(x), expected)
            mask = mask_of((2, *expected.shape[2:]), density)
            base = torch.randn_like(expected)
            close(sparse(x, mask), masked(expected, mask))
            close(sparse(x, mask, base=base), torch.where(mask[:, None], expected, base))
            capacity = dynops.PixelPlan.from_mask(mask, mask.numel())
            close(sparse(x, capacity), masked(expected, mask))
    assert torch.equal(x, kept)


def test_chain_gradients():
    dense = randomised(chain()).double().eval()
    sparse = SparseSequential.from_dense(dense)
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    mask = mask_of(dense(x)[:, 0].shape)
    close_gradients(sparse(x, mask), masked(dense(x), mask), (x, *dense.parameters()), 1e-10)


def test_chain_trains_like_the_dense_one_under_a_full_mask():
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    dense = randomised(dense).double()
    sparse = SparseSequential.from_dense(copy.deepcopy(dense))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(sparse(x, torch.ones(2, 6, 6)), dense(x))
    for key, value in dense.state_dict().items():
        close(sparse.state_dict()[key].double(), value.double())


def test_chain_refuses_what_it_cannot_run():
    with pytest.raises(TypeError, match=r"1: expected a convolution.*MaxPool2d"):
        SparseSequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2))
    with pytest.raises(TypeError, match=r"1.0: expected padding_mode='zeros'"):
        SparseSequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 3, padding_mode="circular")))
    layer = SparseSequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="mask_or_plan: expected one for the output"):
        layer(torch.randn(1, 3, 4, 4), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="base: expected a mask"):
        layer(torch.randn(1, 3, 4, 4), base=torch.ones(1, 3, 4, 4))
