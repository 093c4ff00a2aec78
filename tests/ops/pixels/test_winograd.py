"""Convolutions of 3x3 by Winograd's products: tiles of rows, values, threads."""

import pytest
import torch
from pixel_cases import BACKENDS, Conv, check
from processes import assert_same_on_any_threads
from torch import Tensor

from dynops import PixelPlan, ops
from dynops.geometry import ConvGeometry
from dynops.testing import (
    assert_within_budget,
    random_mask,
    random_tensor,
)

pytestmark = pytest.mark.usefixtures("poisoned")

cpu_kernels = pytest.mark.skipif("cpp" not in BACKENDS, reason="the binary is not built")


def blocky_mask(n: int, h: int, w: int, kind: str) -> Tensor:
    """Rectangles, with ragged borders that cut tiles of 2 x 2 in half."""
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    if kind == "full":
        mask[:] = True
    elif kind == "odd corner":
        mask[:, 1 : h - 2, 3:] = True
    elif kind == "two":
        mask[0, : h // 2 + 1, : w // 2] = True
        mask[-1, h // 3 :, w // 3 :] = True
    elif kind == "holes":
        mask[:, :-1, :-1] = True
        mask[:, ::5, ::4] = False
    return mask


def quads_of(plan: PixelPlan, g) -> Tensor:
    return torch.ops.dynops.cpu_winograd_quads(plan.index, plan.count, list(g))


@cpu_kernels
@pytest.mark.parametrize("kind", ["full", "odd corner", "two", "holes"])
@pytest.mark.parametrize("size", [(2, 20, 22), (1, 31, 17), (5, 12, 13)])
def test_quads_cover_each_row_once(size, kind):
    mask = blocky_mask(*size, kind)
    plan, (n, h, w) = PixelPlan.from_mask(mask), size
    g = ConvGeometry(n, h, w, h, w, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    quads = quads_of(plan, g)
    assert len(quads) >= 24
    first, rows = quads[:, 0], quads[:, 1:]
    y, x = first // w % h, first % w
    assert torch.equal(rows[rows >= 0].sort().values, torch.arange(len(plan), dtype=torch.int32))
    assert bool((y % 2 == 0).all()) and bool((x % 2 == 0).all())
    for i, step in enumerate((0, 1, w, w + 1)):
        active = rows[:, i] >= 0
        assert torch.equal(plan.index[rows[active, i].long()], first[active] + step)


@cpu_kernels
@pytest.mark.parametrize("density", [0, 0.3, 0.6])
def test_scattered_pixels_make_no_quads(density):
    plan = PixelPlan.from_mask(random_mask((2, 90, 90), density))  # many: the look at them ends early
    g = ConvGeometry(2, 90, 90, 90, 90, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    assert quads_of(plan, g).shape == (0, 5)


@cpu_kernels
@pytest.mark.parametrize("channels", [(64, 64), (33, 95), (160, 300), (512, 128)])
@pytest.mark.parametrize("kind", ["full", "odd corner", "two", "holes"])
def test_winograd_with_everything(channels, kind):
    """Small and large weights (shared by tiles, by panels), the whole epilogue, and its gradients."""
    c, o = channels
    conv = Conv(c=c, o=o, padding=1, n=2, h=19, w=18)
    mask = blocky_mask(2, 19, 18, kind)
    tensors = conv.tensors() | conv.epilogue()
    out = check(conv, "cpp", mask, tensors, ("x", "weight"), activation="relu")
    assert out.isfinite().all()
    with torch.no_grad():
        check(conv, "cpp", mask, tensors, activation="hardswish")
        check(conv, "cpp", mask, conv.tensors())


@cpu_kernels
@pytest.mark.parametrize("kind", ["odd corner", "two", "holes"])
def test_winograd_reads_no_pixel_that_the_kernel_does_not_reach(kind):
    conv = Conv(c=40, o=36, padding=1, n=2, h=22, w=19)
    t, plan = conv.tensors(), PixelPlan.from_mask(blocky_mask(2, 22, 19, kind))
    assert len(quads_of(plan, ConvGeometry(2, 22, 19, 22, 19, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0))) > 0
    needed = plan.needed(3, padding=1).mask()[:, None]
    poisoned = torch.where(needed, t["x"], float("nan"))
    clean = torch.where(needed, t["x"], 0.0)
    out = conv.op(poisoned, t["weight"], t["bias"], plan)
    assert torch.equal(out, conv.op(clean, t["weight"], t["bias"], plan)) and out.isfinite().all()


@cpu_kernels
def test_winograd_does_not_depend_on_threads():
    x, weight = random_tensor(1, 300, 24, 25), random_tensor(200, 300, 3, 3)
    plan = PixelPlan.from_mask(blocky_mask(1, 24, 25, "odd corner"))
    assert_same_on_any_threads(lambda: ops.sparse_conv2d(x, weight, None, plan, padding=1))


@cpu_kernels
def test_winograd_on_rows_and_with_a_count():
    conv = Conv(c=48, o=32, padding=1, n=2, h=20, w=21)
    t, mask = conv.tensors(), blocky_mask(2, 20, 21, "odd corner")
    plan, capacity = PixelPlan.from_mask(mask), PixelPlan.from_mask(mask, 700)
    inner = plan.needed(3, padding=1)
    x = t["x"] * inner.mask()[:, None]
    dense = conv.op(x, t["weight"], t["bias"], plan)
    rows = ops.packed_conv2d(ops.gather_pixels(x, inner), t["weight"], t["bias"], inner, plan, padding=1)
    assert torch.equal(ops.scatter_pixels(rows, plan), dense.contiguous(memory_format=torch.channels_last))
    assert torch.equal(conv.op(x, t["weight"], t["bias"], capacity), dense)
    packed = conv.packed_op(x, t["weight"], t["bias"], None, capacity)
    assert torch.equal(packed[: len(plan)], rows) and not packed[len(plan) :].any()


def test_a_plan_serves_convolutions_of_other_paddings():
    """What Winograd's keeps with a plan is of the outputs, not of the convolution that asked first."""
    plan = PixelPlan.full((2, 12, 14))
    weight, bias = random_tensor(32, 32, 3, 3), random_tensor(32)
    for padding, size in ((1, (12, 14)), (0, (14, 16)), (1, (12, 14))):
        x = random_tensor(2, 32, *size)
        with torch.no_grad():
            out = ops.sparse_conv2d(x, weight, bias, plan, padding=padding)
        exact = torch.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
        assert_within_budget(out, exact, torch.conv2d(x, weight, bias, padding=padding), f"padding {padding}")
