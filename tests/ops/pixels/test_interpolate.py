"""interpolate_pixels against loops over every pair of pixels."""

import math

import pytest
import torch
from comparison import close

from dynops import PixelPlan
from dynops.ops import gather_pixels, interpolate_pixels


def oracle(x, mask, mode, kernel_size=7, sigma=1.5):
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        selected = mask[n].nonzero().tolist()
        for y in range(x.shape[2]):
            for column in range(x.shape[3]):
                out[n, :, y, column] = fill(x[n], selected, y, column, mode, kernel_size // 2, sigma)
    return out


def fill(x, selected, y, column, mode, reach, sigma):
    if not selected:
        return torch.zeros_like(x[:, 0, 0])
    if [y, column] in selected:
        return x[:, y, column]
    near = [(i, j) for i, j in selected if max(abs(i - y), abs(j - column)) <= reach]
    if mode == "nearest" or not near:
        i, j = min(selected, key=lambda p: ((p[0] - y) ** 2 + (p[1] - column) ** 2, p))
        return x[:, i, j]
    weights = [math.exp(-((i - y) ** 2 + (j - column) ** 2) / (2 * sigma**2)) for i, j in near]
    return sum(w * x[:, i, j] for w, (i, j) in zip(weights, near, strict=True)) / sum(weights)


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("mode", ["gaussian", "nearest"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (3, 1, 13, 1), (1, 2, 1, 17), (1, 2, 1, 1)])
def test_equals_the_loops(shape, density, mode):
    x = torch.randn(shape, dtype=torch.float64)
    mask = random_mask((shape[0], *shape[2:]), density)
    mask[0, -1, -1] = density > 0  # at least one
    expected = oracle(x, mask, mode)
    poisoned = torch.where(mask[:, None], x, torch.nan)
    for plan in (PixelPlan.from_mask(mask), PixelPlan.from_mask(mask, mask.numel())):
        out = interpolate_pixels(poisoned, plan, mode)
        close(out, expected)
        assert torch.equal(torch.where(mask[:, None], out, 0), torch.where(mask[:, None], x, 0))
        close(interpolate_pixels(gather_pixels(x, plan), plan, mode), expected)


@pytest.mark.parametrize(("kernel_size", "sigma"), [(1, 1.0), (3, 0.5), (9, 4.0), (7, 0.01)])
def test_gaussian_arguments(kernel_size, sigma):
    x, mask = torch.randn(1, 2, 12, 12, dtype=torch.float64), random_mask((1, 12, 12), 0.05, seed=3)
    plan = PixelPlan.from_mask(mask)
    out = interpolate_pixels(x, plan, kernel_size=kernel_size, sigma=sigma)
    mode = "nearest" if sigma == 0.01 else "gaussian"  # weights that underflow
    close(out, oracle(x, mask, mode, kernel_size, sigma))


def test_ties_go_to_the_first_pixel():
    mask = torch.zeros(1, 5, 5)
    for y, x in ((0, 2), (2, 0), (2, 4), (4, 2)):
        mask[0, y, x] = 1
    out = interpolate_pixels(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), PixelPlan.from_mask(mask), "nearest")
    assert out[0, 0].tolist()[2] == [2, 2, 1, 3, 3]
    assert [row[2] for row in out[0, 0].tolist()] == [1, 1, 1, 4, 4]


def test_nearest_of_a_large_map():
    mask = random_mask((2, 90, 120), 0.002, seed=5)
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    where = torch.stack([y, x]).expand(2, 2, 90, 120).double()
    found = interpolate_pixels(where, PixelPlan.from_mask(mask), "nearest")
    distance = (found - where).square().sum(1)
    for n in range(2):
        pixels = mask[n].nonzero().double()
        every = torch.cdist(where[n].flatten(1).t(), pixels).square().min(1).values
        close(distance[n].flatten(), every, 1e-9)


@pytest.mark.parametrize("mode", ["gaussian", "nearest"])
def test_gradients(mode):
    mask = random_mask((2, 5, 6), 0.15, seed=1)
    plan = PixelPlan.from_mask(mask)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, s: interpolate_pixels(x, plan, mode, kernel_size=5, sigma=s), (x, sigma)
    )
    (grad,) = torch.autograd.grad(interpolate_pixels(x, plan, mode, kernel_size=5).sum(), x)
    assert not grad[(~mask)[:, None].expand_as(grad)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_formats(dtype):
    x, mask = torch.randn(2, 8, 16, 16), random_mask((2, 16, 16), 0.2)
    plan = PixelPlan.from_mask(mask)
    exact = interpolate_pixels(x.to(dtype).double(), plan)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.to(dtype).contiguous(memory_format=memory_format)
        out = interpolate_pixels(given, plan)
        assert out.dtype == dtype and out.stride() == given.stride()
        close(out.double(), exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["gaussian", "nearest"])
def test_nothing_to_fill(mode):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)):
        x = torch.randn(shape)
        mask = torch.ones(shape[0], *shape[2:])
        assert interpolate_pixels(x, PixelPlan.from_mask(mask), mode).shape == shape


def test_bad_arguments():
    plan, x = PixelPlan.from_mask(torch.ones(1, 4, 4)), torch.randn(1, 2, 4, 4)
    for match, error, arguments in (
        ("mode: expected one of", ValueError, (x, plan, "cubic")),
        ("x: expected shape", ValueError, (x[..., :3], plan)),
        ("x: expected packed rows", ValueError, (torch.randn(3, 2), plan)),
        ("x: expected a floating dtype", TypeError, (x.int(), plan)),
        ("x: expected a tensor", TypeError, (None, plan)),
        ("plan: expected a PixelPlan", TypeError, (x, torch.ones(1, 4, 4))),
    ):
        with pytest.raises(error, match=match):
            interpolate_pixels(*arguments)
    for match, arguments in (
        ("kernel_size: expected a positive odd int", {"kernel_size": 4}),
        ("sigma: expected a number > 0", {"sigma": 0.0}),
        ("sigma: expected one number", {"sigma": torch.ones(2)}),
    ):
        with pytest.raises(ValueError, match=match):
            interpolate_pixels(x, plan, **arguments)
