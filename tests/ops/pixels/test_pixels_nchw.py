"""Maps that do not lie channels_last: NCHW and strided views, on the CPU's own paths for them."""

import dataclasses
from dataclasses import dataclass

import pixel_cases
import pytest
import torch
import torch.nn.functional as F
from pixel_cases import DTYPES, check
from processes import assert_same_on_any_threads
from torch import Tensor

from dynops import PixelPlan, backends, ops
from dynops.geometry import ConvGeometry
from dynops.nn import SparseConv2d
from dynops.ops import dense_fallback
from dynops.testing import (
    assert_within_budget,
    dense_masked_conv2d,
    in_layout,
    random_mask,
    random_tensor,
    rows_at,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built"),
]


@dataclass(frozen=True)
class Conv(pixel_cases.Conv):
    h: int = 9
    w: int = 21

    @property
    def out_size(self) -> tuple[int, int]:
        return self.out_shape()[1:]


# On planes: one side is thin, or depthwise. Widths that are less than a vector, a vector, and ragged.
PLANES = [
    Conv(1, 19, 3, padding=1),
    Conv(3, 20, 7, 2, 3, n=1, h=23, w=37),
    Conv(2, 3, 3, 3, 1, 2, h=14, w=50),
    Conv(40, 1, 1, w=16),
    Conv(300, 2, 1, n=1, h=3, w=11),
    Conv(17, 4, 3, padding=1, w=5),
    Conv(9, 9, 3, padding=1, groups=9),
    Conv(9, 18, 5, 2, 2, groups=9, w=35),
    Conv(6, 12, 3, padding=4, groups=3, h=4, w=3),
    Conv(4, 7, 2, h=2, w=2),
]
# On rows: few pixels are gathered, or all of them are brought into channels_last.
ROWS = [
    Conv(17, 35, 1),
    Conv(17, 35, 1, 2),
    Conv(33, 32, 3, padding=1, h=19),
    Conv(12, 24, 3, padding=1, groups=2),
    Conv(20, 8, 3, 2, 1, 2, h=30),
    Conv(8, 16, 3, padding=2, w=3, n=3),
]
CASES = PLANES + ROWS


def _inputs(conv: Conv, dtype: torch.dtype, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, tensors = random_tensor(conv.n, conv.c, conv.h, conv.w, dtype=dtype), conv.tensors(dtype)
    return x, tensors["weight"], tensors["bias"], random_mask((conv.n, *conv.out_size), density)


def _check(conv: Conv, x, weight, bias, mask, capacity=None, activation=None, **epilogue) -> None:
    tensors, plan = {"x": x, "weight": weight, "bias": bias, **epilogue}, PixelPlan.from_mask(mask, capacity)
    out = check(conv, "cpp", mask, tensors, plan=plan, activation=activation)
    assert out.is_contiguous(), f"expected NCHW, got strides {out.stride()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", CASES, ids=str)
def test_values(conv, dtype):
    for density in (0.0, 0.03, 0.4, 1.0):
        x, weight, bias, mask = _inputs(conv, dtype, density)
        for capacity in (None, mask.numel() + 3):
            _check(conv, x, weight, bias, mask, capacity)


@pytest.mark.parametrize("conv", [PLANES[1], PLANES[4], PLANES[6], ROWS[0], ROWS[2]], ids=str)
@pytest.mark.parametrize("density", (0.0, 0.2, 0.9))
def test_epilogues(conv, density):
    shape = (conv.n, conv.o, *conv.out_size)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, mask = _inputs(conv, dtype, density)
        base, residual = random_tensor(*shape, dtype=dtype), random_tensor(*shape, dtype=dtype)
        norm = {"scale": random_tensor(conv.o, dtype=dtype), "shift": random_tensor(conv.o, dtype=dtype)}
        gate = random_tensor(conv.n, 1, *conv.out_size, dtype=dtype)
        last = base.contiguous(memory_format=torch.channels_last)
        for epilogue in (
            {"base": base, "activation": "relu"},
            {"base": last, **norm, "activation": "silu"},
            {**norm, "gate": gate, "residual": residual, "base": base},
            {"residual": residual.contiguous(memory_format=torch.channels_last), "activation": "relu6"},
        ):
            _check(conv, x, weight, bias, mask, **epilogue)


def test_a_slice_of_channels_last_gives_nchw():
    x = random_tensor(2, 12, 6, 20).contiguous(memory_format=torch.channels_last)[..., ::2]
    weight, mask = random_tensor(8, 12, 3, 3), random_mask((2, 6, 10), 0.3)
    out = ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask), padding=1)
    assert out.is_contiguous()
    exact = dense_masked_conv2d(x.double(), weight.double(), None, mask, padding=1)
    assert_within_budget(out, exact, dense_masked_conv2d(x, weight, None, mask, padding=1))


@pytest.mark.parametrize("conv", [PLANES[0], PLANES[6], ROWS[0], ROWS[2]], ids=str)
def test_batch_0_and_one_pixel(conv):
    x, weight, bias, mask = _inputs(dataclasses.replace(conv, n=0), torch.float32, 0.5)
    out = ops.sparse_conv2d(x, weight, bias, PixelPlan.from_mask(mask), **conv.arguments)
    assert out.shape == (0, conv.o, *conv.out_size)
    x, weight, bias, _ = _inputs(conv, torch.float32, 0)
    for y, z in ((0, 0), (-1, -1), (0, -1)):
        mask = torch.zeros(conv.n, *conv.out_size, dtype=torch.bool)
        mask[-1, y, z] = True
        _check(conv, x, weight, bias, mask)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("conv", [PLANES[0], PLANES[3], PLANES[7], *ROWS[:4]], ids=str)
def test_gradients(conv, dtype):
    """Of both formats on either side: the gradient that comes in is not always of the output's format."""
    shape = (conv.n, conv.o, *conv.out_size)
    for density, capacity, layout in ((0.1, None, "nchw"), (0.7, 999, "nchw"), (0.1, None, "channels_last")):
        x, weight, bias, mask = _inputs(conv, dtype, density)
        grad, plan = (
            in_layout(random_tensor(*shape, dtype=dtype), layout),
            PixelPlan.from_mask(mask, capacity),
        )

        def grads(run, to, grad=grad, tensors=(x, weight, bias)):
            leaves = [t.to(to).requires_grad_() for t in tensors]
            return torch.autograd.grad(run(*leaves), leaves, grad.to(to))

        def dense(*leaves, mask=mask):
            return dense_masked_conv2d(*leaves, mask, **conv.arguments)

        def ours(*leaves, plan=plan):
            return ops.sparse_conv2d(*leaves, plan, **conv.arguments, backend="cpp")

        for what, *found in zip(
            ("dx", "dw", "db"),
            grads(ours, dtype),
            grads(dense, torch.float64),
            grads(dense, dtype),
            strict=True,
        ):
            assert_within_budget(*found, f"{what} at {density}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex128))
def test_rows_of_planes(dtype):
    """gather_pixels and its gradient, and rows to NCHW, for elements of 1 to 16 bytes: bit for bit."""
    for n, c, h, w in ((2, 35, 7, 23), (1, 16, 4, 16), (1, 1, 9, 9), (3, 5, 1, 40), (2, 70, 30, 20)):
        x = (random_tensor(n, c, h, w) * 99).to(dtype)
        for density in (0.0, 0.1, 0.5, 1.0):
            mask = random_mask((n, h, w), density)
            for plan in (PixelPlan.from_mask(mask), PixelPlan.from_mask(mask, mask.numel() + 2)):
                rows = ops.gather_pixels(x, plan)
                active = int(mask.sum())
                assert torch.equal(rows[:active], rows_at(x, mask)) and not rows[active:].any()
                for base in (None, x.flip(0)):
                    out = torch.ops.dynops.scatter_planes(rows, plan.index, plan.count, [n, h, w], base)
                    elsewhere = torch.zeros_like(x) if base is None else base
                    assert out.is_contiguous() and torch.equal(out, torch.where(mask[:, None], x, elsewhere))


def test_gradient_of_gathered_planes():
    x = random_tensor(2, 20, 7, 9).requires_grad_()
    mask = random_mask((2, 7, 9), 0.3)
    grad = random_tensor(int(mask.sum()), 20)
    (dx,) = torch.autograd.grad(ops.gather_pixels(x, PixelPlan.from_mask(mask)), x, grad)
    assert dx.is_contiguous()
    assert torch.equal(rows_at(dx, mask), grad) and not dx.masked_fill(mask[:, None], 0).any()


@pytest.fixture
def calls(monkeypatch):
    """The names of the C++ ops that were called, and the elements of the largest tensor that was allocated."""
    seen = []
    from dynops.kernels.cpu import engine, pixels, planes, rows

    for module in (engine, pixels, planes, rows):
        monkeypatch.setattr(module, "CPP", _Noting(seen))
    return seen


class _Noting:
    def __init__(self, seen):
        self.seen = seen

    def __getattr__(self, name):
        self.seen.append(f"cpu_{name}")
        return getattr(torch.ops.dynops, f"cpu_{name}").default


@pytest.mark.parametrize("conv", [PLANES[1], PLANES[6], ROWS[0], ROWS[2]], ids=str)
@pytest.mark.parametrize("capacity", (None, 40))
def test_an_empty_plan_copies_nothing(conv, capacity, calls):
    x, weight, bias, mask = _inputs(conv, torch.float32, 0)
    plan = PixelPlan.from_mask(mask, capacity)
    base = random_tensor(conv.n, conv.o, *conv.out_size)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = ops.sparse_conv2d(x, weight, bias, plan, **conv.arguments)
    allocated = sum(e.self_device_memory_usage + e.self_cpu_memory_usage for e in profile.key_averages())
    assert calls == [] and not out.any() and out.is_contiguous()
    assert allocated <= out.numel() * 4 + 4096, f"{allocated} bytes for an output of {out.numel() * 4}"
    out = ops.sparse_conv2d(x, weight, bias, plan, **conv.arguments, base=base)
    assert calls == [] and torch.equal(out, base) and out.data_ptr() != base.data_ptr()
    assert not conv.packed_op(x, weight, bias, None, plan).any()
    grad = in_layout(base, "nchw")
    dx = torch.ops.dynops.pixel_conv_input_grad(
        grad, weight, plan.index, plan.count, None, 0, _geometry(conv), False, ""
    )
    assert dx.shape == x.shape and not dx.any() and not {"cpu_gather_planes", "cpu_conv"} & set(calls)


def _geometry(conv: Conv) -> list[int]:
    both = [conv.kernel, conv.stride, conv.padding, conv.dilation]
    steps = [v for v in both for _ in (0, 1)]
    return list(ConvGeometry(conv.n, conv.h, conv.w, *conv.out_size, *steps, conv.groups, 0))


def test_few_pixels_gather_few_rows(calls):
    """What a wide layer allocates beside its output grows with the mask, not with the map."""
    x, weight = random_tensor(1, 32, 80, 80), random_tensor(16, 32, 3, 3)
    mask = torch.zeros(1, 80, 80, dtype=torch.bool)
    mask[0, 10, 10:14] = True
    plan = PixelPlan.from_mask(mask)
    ops.sparse_conv2d(x, weight, None, plan, padding=1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = ops.sparse_conv2d(x, weight, None, plan, padding=1)
    largest = sorted(e.self_cpu_memory_usage for e in profile.events())
    assert "cpu_gather_planes" in calls and largest[-1] == out.numel() * 4
    assert largest[-2] <= 80 * 80 * 4 + 64, "the table of rows is the next"  # int32 [N, H, W]


def test_the_dense_layer_wins_where_a_pixel_costs_more_than_its_products():
    """By measured numbers: channels_last 2 to 16 channels 3x3 at 224 x 224 (dense from 0.9 on, rows at 0.1), and never
    on a map so small that its last pass and calls take longer."""
    thin = ConvGeometry(1, 224, 224, 224, 224, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    weight, pixels = torch.empty(16, 2, 3, 3), 224 * 224
    assert dense_fallback.cpu_dense_is_faster(int(0.9 * pixels), weight, thin)
    assert not dense_fallback.cpu_dense_is_faster(int(0.1 * pixels), weight, thin)
    small = thin._replace(in_h=14, in_w=14, out_h=14, out_w=14)
    assert not dense_fallback.cpu_dense_is_faster(196, torch.empty(256, 64, 1, 1), small)


@pytest.mark.parametrize("conv", [Conv(2, 16, 3, padding=1, n=1, h=224, w=224), Conv(32, 32, 3, padding=1, groups=32, n=1, h=224, w=224)], ids=str)  # fmt: skip
def test_dense_and_a_mask_is_the_same(conv, monkeypatch):
    x, weight, bias, mask = _inputs(conv, torch.float32, 0.95)
    x, plan = x.contiguous(memory_format=torch.channels_last), PixelPlan.from_mask(mask)
    base = random_tensor(conv.n, conv.o, *conv.out_size)
    dense = []
    monkeypatch.setattr(F, "conv2d", lambda *a, conv2d=F.conv2d: dense.append(0) or conv2d(*a))
    for extra in ({}, {"activation": "relu"}, {"base": base}):
        out = ops.sparse_conv2d(x, weight, bias, plan, **conv.arguments, **extra)
        assert len(dense) == 1 and out.is_contiguous(memory_format=torch.channels_last)
        dense.clear()
        exact = dense_masked_conv2d(*(t.double() for t in (x, weight, bias)), mask, **conv.arguments, **{k: v.double() if k == "base" else v for k, v in extra.items()})  # fmt: skip
        assert_within_budget(
            out, exact, dense_masked_conv2d(x, weight, bias, mask, **conv.arguments, **extra)
        )
        dense.clear()
    ops.sparse_conv2d(x, weight, bias.requires_grad_(), plan, **conv.arguments)
    with_grad = weight.clone().requires_grad_()
    dense.clear()
    ops.sparse_conv2d(x, with_grad, None, plan, **conv.arguments)
    assert not dense, "with a gradient the plan's own pixels are computed"


@pytest.mark.parametrize("conv", CASES, ids=str)
def test_threads_do_not_matter(conv):
    conv = dataclasses.replace(conv, h=3 * conv.h)
    x, weight, bias, mask = _inputs(conv, torch.float32, 0.3)
    plan = PixelPlan.from_mask(mask)
    assert_same_on_any_threads(lambda: conv.op(x, weight, bias, plan, backend="cpp"), (1, 2, 5))


def test_gradient_of_packed_rows_to_a_map():
    """The gradient of a map comes in NCHW where its rows went on to an NCHW layer."""
    source, mask = random_mask((2, 9, 7), 0.5), random_mask((2, 9, 7), 0.3)
    in_plan, plan = PixelPlan.from_mask(source), PixelPlan.from_mask(mask)
    x, weight = random_tensor(len(in_plan), 12), random_tensor(8, 12, 3, 3)
    g, grad = _geometry(Conv(12, 8, 3, padding=1, h=9, w=7)), random_tensor(2, 8, 9, 7)
    found = []
    for layout in ("nchw", "channels_last"):
        dy, rest = in_layout(grad, layout), (plan.index, plan.count, in_plan.inverse())
        dx = torch.ops.dynops.pixel_conv_input_grad(dy, weight, *rest, len(x), g, False, "")
        dw, _ = torch.ops.dynops.pixel_conv_weight_grad(dy, x, *rest, list(weight.shape), g, False, True, "")
        found.append((dx, dw))
    for nchw, last in zip(*found, strict=True):
        assert nchw.shape == last.shape and torch.equal(nchw, last)


@pytest.mark.parametrize("layout", ["expanded", "overlapping"])
def test_images_that_share_memory(layout):
    """As a gradient of a sum over the batch does: later pixels may lie before earlier ones."""
    for seed in range(20):
        torch.manual_seed(seed)
        shape, base = (2, 16, 1, 40), torch.randn(1, 16, 1, 60)
        if layout == "expanded":
            x = base[..., :40].expand(shape)
        else:
            x = base.as_strided(shape, (10, 60, 40, 1))
        mask = torch.rand(2, 1, 40) < 0.4
        plan = PixelPlan.from_mask(mask)
        assert torch.equal(ops.gather_pixels(x, plan), ops.gather_pixels(x.contiguous(), plan))


def test_a_gradient_that_is_summed_over_the_batch():
    for seed in range(10):
        torch.manual_seed(seed)
        layer, x, mask = SparseConv2d(64, 64, 1), torch.randn(8, 64, 7, 7), torch.rand(8, 7, 7) < 0.3
        grads = []
        for run in (lambda: layer(x, mask), lambda: layer(x) * mask[:, None]):  # noqa: B023
            grads.append(torch.autograd.grad(run().sum(0).square().sum(), layer.weight)[0])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
