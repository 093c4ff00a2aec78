"""SparseBlocks against the dense module and a mask of whole blocks: the same everywhere, on both paths."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from comparison import close_gradients, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import products
from stack_cases import WITH_PATHS, Residual, check, expected, stack
from torch import nn

import dynops
from dynops.nn import SparseBlocks, SparseConv2d
from dynops.plans import BlockPlan
from dynops.testing import assert_within_budget, random_mask, random_tensor


@pytest.mark.parametrize(("name", "path"), WITH_PATHS)
@pytest.mark.parametrize("block_size", [(6, 6), (2, 12), (100, 102)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_masked_dense(name, path, block_size):
    module = stack(name)
    if name == "bilinear":
        block_size = (block_size[0] + 1, block_size[1])
    with torch.no_grad():
        for size in ((14, 10), (8, 12)):
            x = random_tensor(2, 4, *size)
            mask = random_mask((2, *module(x).shape[2:]), 0.04)
            check(module, block_size, path, x, mask, with_base=True)
            check(module, block_size, path, x.to(memory_format=torch.channels_last), mask)


@pytest.mark.parametrize(("name", "path"), [c for c in WITH_PATHS if c[0] in ("nested", "stage", "max-conv")])
@pytest.mark.parametrize("block_size", [(1, 1), (1, 40), (5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["empty", "full", "one", "random"])
def test_masks_and_small_blocks(name, path, block_size, kind):
    module, x = stack(name), random_tensor(7, 4, 11, 9)
    mask = random_mask((7, *module(x).shape[2:]), 0.2, kind)
    out = check(module, block_size, path, x, mask)
    if kind == "empty":
        assert out.count_nonzero() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "path"), [("3x3", "rows"), ("basic", "rows"), ("basic", "tiles"), ("unet", None)]
)
def test_memory_format_is_the_inputs(name, path, layout):
    x = random_tensor(2, 4, 12, 12).to(memory_format=layout)
    out = SparseBlocks(stack(name), 4, path)(x, random_mask((2, 12, 12), 0.1))
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_base_is_the_input(path):
    module, x = stack("basic"), random_tensor(2, 4, 12, 12)
    mask = random_mask((2, 12, 12), 0.05)
    plan = BlockPlan.from_mask(mask, 4)
    out = SparseBlocks(module, 4, path)(x, plan, "input")
    outside = ~plan.mask()[:, None].expand_as(x)
    assert torch.equal(out[outside], x[outside]) and 0 < outside.count_nonzero() < x.numel()
    assert_within_budget(
        out,
        expected(copy.deepcopy(module).double(), x.double(), plan, x.double()),
        expected(module, x, plan, x),
    )


def test_without_a_mask_it_is_the_module():
    module, x = stack("stage"), random_tensor(2, 4, 12, 12)
    layer = SparseBlocks(module, 4)
    assert torch.equal(layer(x), module(x))
    assert torch.equal(layer(x, random_mask((2, 6, 6), kind="full")), module(x))
    assert torch.equal(layer.train()(x), copy.deepcopy(module).train()(x))


def test_inside_active():
    module, x = stack("basic-down"), random_tensor(2, 4, 16, 16)
    layer, mask = SparseBlocks(module, 2), random_mask((2, 16, 16), 0.05)
    at_output = dynops.PixelPlan.from_mask(mask).resized((8, 8)).mask()
    with dynops.active(mask):
        inside = layer(x)
        assert torch.equal(layer(x, torch.ones(2, 8, 8)), layer(x, torch.ones(2, 8, 8)))
    assert torch.equal(inside, layer(x, at_output))


def test_full_plan_inside_active_is_not_masked_again():
    layer = SparseBlocks(nn.Sequential(SparseConv2d(4, 4, 3, padding=1)), 4)
    x = random_tensor(1, 4, 8, 8)
    with dynops.active(random_mask((1, 8, 8), 0.1)):
        out = layer(x, torch.ones(1, 8, 8))
    assert_within_budget(out, F.conv2d(x.double(), layer.module[0].weight.double(), layer.module[0].bias.double(), padding=1), layer.module(x))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path"), [("3x3", "rows"), ("stage", "rows"), ("stage", "tiles"), ("unet", "tiles")]
)
def test_capacity_form(name, path):
    module, x = stack(name, torch.float64), random_tensor(2, 4, 12, 12, dtype=torch.float64)
    mask = random_mask((2, *module(x).shape[2:]), 0.1)
    layer = SparseBlocks(module, 4, path)
    plans = [BlockPlan.from_mask(mask, 4, capacity=capacity) for capacity in (None, 18)]
    compact, roomy = (layer(x, plan) for plan in plans)
    assert (compact - roomy).norm() <= 1e-13 * compact.norm() and compact.count_nonzero() > 0


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_plan_with_its_own_blocks(path):
    """The plan's grid holds: other sizes, gaps between blocks, an offset."""
    module, x = stack("stage", torch.float64), random_tensor(2, 4, 24, 24, dtype=torch.float64)
    layer = SparseBlocks(module, 4, path)
    for arguments in (
        {"block_size": 3},
        {"block_size": 2, "stride": 5, "offset": 1},
        {"block_size": (3, 5), "offset": -2},
    ):
        plan = BlockPlan.from_mask(random_mask((2, 12, 12), 0.3), **arguments)
        out, reference = layer(x, plan), expected(module, x, plan)
        assert (out - reference).norm() <= 1e-13 * reference.norm()


def test_all_blocks_of_a_grid_with_gaps_are_not_the_whole_map():
    module, x = stack("3x3"), random_tensor(1, 4, 12, 12)
    for arguments in ({"block_size": 2, "stride": 5}, {"block_size": 4, "offset": 2}):
        plan = BlockPlan.from_mask(torch.ones(1, 12, 12), **arguments)
        assert plan.is_full and not plan.mask().all()
        out = SparseBlocks(module, 4)(x, plan)
        assert torch.equal(out != 0, plan.mask()[:, None].expand_as(out))


@pytest.mark.parametrize(("name", "path"), WITH_PATHS)
def test_gradients(name, path):
    """Of the input, every parameter and the base, equal to those of the dense module and a mask."""
    module = stack(name, torch.float64)
    x = random_tensor(2, 4, 12, 10, dtype=torch.float64).requires_grad_()
    shape = module(x).shape
    base = random_tensor(*shape, dtype=torch.float64).requires_grad_()
    mask, weight = random_mask((2, *shape[2:]), 0.05), random_tensor(*shape, dtype=torch.float64)
    block_size = 6
    out = SparseBlocks(module, block_size, path)(x, mask, base)
    reference = expected(module, x, BlockPlan.from_mask(mask, block_size), base)
    inputs = {"x": x, "base": base, **dict(module.named_parameters())}
    actual, right = (
        torch.autograd.grad((y * weight).sum(), list(inputs.values()), allow_unused=True)
        for y in (out, reference)
    )
    for name, a, b in zip(inputs, actual, right, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_gradient_of_an_empty_plan(path):
    module, x = stack("stage"), random_tensor(2, 4, 12, 12).requires_grad_()
    SparseBlocks(module, 4, path)(x, torch.zeros(2, 6, 6)).sum().backward()
    assert x.grad.count_nonzero() == 0


def test_two_readers_that_need_different_outsides():
    """The same value padded with zeros, with -inf and with zeros again; nothing may be changed under a reader."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1)
            self.pool, self.drop = nn.MaxPool2d(3, 1, 1), nn.Dropout()

        def forward(self, x):
            return self.a(x) + self.pool(self.drop(x)) + self.b(x) + self.pool(self.a(x).relu())

    module = Both().double().eval()
    x = random_tensor(2, 4, 8, 8, dtype=torch.float64)
    mask = random_mask((2, 8, 8), 0.1)
    reference = expected(module, x, BlockPlan.from_mask(mask, 2))
    layer = SparseBlocks(module, 2)
    with torch.no_grad():
        assert (layer(x, mask) - reference).norm() <= 1e-13 * reference.norm()
    out = layer(x, mask)
    assert (out - reference).norm() <= 1e-13 * reference.norm()
    close_gradients(out, reference, list(module.parameters()))


@pytest.mark.parametrize(
    "name", ["3x3", "5x5-stride", "dilation", "transposed", "stage", "avg-ceil", "nearest", "unet"]
)
def test_affected_against_changed_outputs(name):
    """Each block whose output changes with one pixel is found; where the taps are dense, no other."""
    module = stack(name, torch.float64)
    for block in [m for m in module.modules() if isinstance(m, Residual)]:
        block.relu = nn.LeakyReLU(0.5)  # hides no change behind a zero
    layer = SparseBlocks(module, 6 if name == "nearest" else 2)
    x = random_tensor(1, 4, 10, 10, dtype=torch.float64)
    dense = module(x)
    for y, z in [(0, 0), (9, 9), (4, 5), (3, 0), (0, 8)]:
        other = x.clone()
        other[:, :, y, z] += torch.tensor([1.0, -0.7, 0.9, 1.3], dtype=x.dtype)
        differs = (module(other) != dense).any(1)
        found = layer.affected((other != x).any(1))
        changed = BlockPlan.from_mask(differs, layer.block_size).blocks()
        assert (found.blocks() | ~changed).all(), "a changed block was not found"
        assert found.shape == (1, *dense.shape[2:]) and found.block_size == layer.block_size
        if name in ("3x3", "stage"):
            assert torch.equal(found.blocks(), changed)
        mended = layer(other, found, dense)
        assert (mended - module(other)).norm() <= 1e-13 * dense.norm()


@st.composite
def layers(draw):
    """A random stack of three layers of 3 channels, with a skip around the middle where sizes allow."""
    to = lambda low, high: draw(st.integers(low, high))  # noqa: E731

    def pool(kind, **options):
        kernel = to(1, 4)
        return kind(kernel, to(1, 3), to(0, kernel // 2), ceil_mode=draw(st.booleans()), **options)

    kinds = {
        "conv": lambda: nn.Conv2d(
            3, 3, to(1, 4), to(1, 2), to(0, 2), to(1, 2), groups=draw(st.sampled_from([1, 3]))
        ),
        "transposed": lambda: nn.ConvTranspose2d(3, 3, to(1, 4), to(1, 3), to(0, 1), dilation=to(1, 2)),
        "max": lambda: pool(nn.MaxPool2d),
        "avg": lambda: pool(nn.AvgPool2d, count_include_pad=draw(st.booleans())),
        "near": lambda: nn.Upsample(scale_factor=to(1, 3)),
        "linear": lambda: nn.Upsample(scale_factor=to(1, 3), mode="bilinear"),
        "norm": lambda: nn.BatchNorm2d(3),
        "activation": nn.Sigmoid,
        "residual": lambda: Residual(3, 3),
    }
    stack = [kinds[draw(st.sampled_from(sorted(kinds)))]() for _ in range(to(1, 3))]
    return randomised(nn.Sequential(*stack)).double().eval()


@settings(max_examples=60, deadline=None)
@given(
    layers(),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_random_stacks(module, height, width, block_h, block_w, seed):
    torch.manual_seed(seed)
    x = random_tensor(2, 3, height, width, dtype=torch.float64).requires_grad_()
    try:
        dense = module(x)
    except RuntimeError:  # too small an input for the stack
        return
    layer = SparseBlocks(module, 216)  # a multiple of whatever its factors are
    block_size = tuple(b * m for b, m in zip((block_h, block_w), layer._stack().stack.multiple, strict=True))
    plan = BlockPlan.from_mask(random_mask((2, *dense.shape[2:]), 0.2), block_size)
    reference = expected(module, x, plan)
    inputs = [x, *module.parameters()]
    for path in ("tiles", "rows")[: 1 + layer._stack().rows]:
        layer.path = path
        with torch.no_grad():
            silent = layer(x, plan)
        out = layer(x, plan)
        for value in (silent, out):
            assert (value - reference).norm() <= 1e-12 * reference.norm(), (path, module)
        grads = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, retain_graph=True) for y in (out, reference)]  # fmt: skip
        for a, b in itertools.zip_longest(*grads):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-8)


def test_after_a_precision_was_set_the_newer_way():
    module, x = stack("3x3"), random_tensor(1, 4, 8, 8)
    with products("tf32"):
        SparseBlocks(module, 4)(x, torch.eye(8)[None])
