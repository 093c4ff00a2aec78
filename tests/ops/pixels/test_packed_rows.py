"""Convolutions from rows to rows, and plans with a capacity."""

import pytest
import torch
from pixel_cases import ALL, BACKENDS, CONVS, DTYPES, FEW, MASKS, Conv, check, compare, each, run

from dynops import PixelPlan, ops
from dynops.testing import (
    dense_from_rows,
    random_mask,
    random_tensor,
    rows_at,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def check_packed(conv, backend, in_mask, mask, dtype=torch.float32, capacity=None, names=(), **rest):
    """Checks the row-to-row convolution; ``in_mask`` None means a dense input."""
    tensors, epilogue = conv.tensors(dtype), conv.epilogue(dtype)
    if in_mask is not None:
        tensors["x"] = rows_at(tensors["x"], in_mask)
    in_plan = None if in_mask is None else PixelPlan.from_mask(in_mask)
    plan = PixelPlan.from_mask(mask, capacity)
    if in_mask is mask:
        in_plan = plan
        tensors["x"] = torch.cat([tensors["x"], tensors["x"].new_zeros(len(plan) - int(mask.sum()), conv.c)])

    def ours(x, weight, bias, **t):
        out = conv.packed_op(x, weight, bias, in_plan, plan, backend=backend, **t, **rest)
        assert out.shape[0] == plan.num_rows and not out[int(mask.sum()) :].any()
        return out[: int(mask.sum())]

    def oracle(x, weight, bias, **t):
        x = x if in_mask is None else dense_from_rows(x[: int(in_mask.sum())], in_mask)
        return rows_at(conv.oracle(x, weight, bias, mask, **t, **rest), mask)

    tensors |= {k: epilogue[k] for k in names}
    compare(ours, oracle, tensors, tuple(tensors), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@each({k: v for k, v in ALL.items() if v.padding_mode == "zeros"})
def test_packed(conv, backend):
    in_mask = random_mask((conv.n, conv.h, conv.w), 0.6)
    check_packed(conv, backend, in_mask, random_mask(conv.out_shape(), 0.4))


@pytest.mark.parametrize("backend", BACKENDS)
@each(FEW)
def test_packed_from_dense(conv, backend):
    check_packed(conv, backend, None, random_mask(conv.out_shape(), 0.4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_packed_dtypes(conv, dtype, backend):
    in_mask = random_mask((conv.n, conv.h, conv.w), 0.6)
    check_packed(conv, backend, in_mask, random_mask(conv.out_shape(), 0.4), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_kind", MASKS)
@pytest.mark.parametrize("kind", MASKS)
def test_packed_masks(kind, in_kind, backend):
    for name in ("3x3", "depthwise", "7x7 stride 2, 3 channels", "T 2x2 stride 2"):
        conv = ALL[name]
        in_mask = random_mask((conv.n, conv.h, conv.w), MASKS[in_kind], in_kind)
        check_packed(conv, backend, in_mask, random_mask(conv.out_shape(), MASKS[kind], kind))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
@each({k: CONVS[k] for k in ("1x1", "3x3", "depthwise", "grouped 1x1")})
def test_packed_on_one_plan(conv, kind, backend):
    """The rows of one plan in and out: 1x1 reads row by row, 3x3 is a submanifold convolution."""
    mask = random_mask(conv.out_shape(), MASKS[kind], kind)
    check_packed(conv, backend, mask, mask, names=("residual", "gate", "scale"), activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", [-1, 0, 7])
@each({k: ALL[k] for k in ("3x3", "1x1", "depthwise", "group width 3", "T 3x3 stride 2")})
def test_capacity_form(conv, extra, backend):
    """Only the rows below the count matter, in values and in every gradient."""
    full = random_mask(conv.out_shape(), 0.4)
    index = PixelPlan.from_mask(full).index
    capacity = len(index) + extra
    mask = PixelPlan(index[:capacity], full.shape).mask()  # what a capacity that is too small drops
    plan = PixelPlan.from_mask(full, capacity)
    tensors = conv.tensors() | conv.epilogue()
    check(conv, backend, mask, tensors, tuple(tensors), plan=plan, activation="silu")
    check(conv, backend, mask, conv.tensors(), ("x", "weight", "bias"), plan=plan)
    check(conv, backend, mask, conv.tensors(), ("bias",), plan=plan)
    if extra >= 0:
        in_mask = random_mask((conv.n, conv.h, conv.w), 0.6)
        check_packed(conv, backend, in_mask, full, capacity=capacity, names=("scale", "residual"))
        check_packed(conv, backend, None, full, capacity=capacity)
        if conv.out_shape() == (conv.n, conv.h, conv.w):
            check_packed(conv, backend, full, full, capacity=capacity, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "all"])
@each({k: ALL[k] for k in ("3x3", "1x1")})
def test_rows_past_the_count_have_no_gradient(conv, wanted, backend):
    """A loss over all rows of a capacity plan, the unused ones too, gives what the compact plan gives."""
    mask = random_mask((conv.n, conv.h, conv.w), 0.5)
    tensors, results = conv.tensors(), []
    names = tuple(tensors) if wanted == "all" else (wanted,)
    for capacity in (None, int(mask.sum()) + 9):
        plan = PixelPlan.from_mask(mask, capacity)

        def op(x, weight, bias, plan=plan):
            rows = ops.gather_pixels(x, plan)
            return conv.packed_op(rows, weight, bias, plan, plan, backend=backend).sigmoid().sum()

        results.append(run(op, tensors, names, lambda out: None)[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_chain_is_the_dense_chain(backend):
    """Each inner layer computed wherever a later one reads it gives the dense chain's values."""
    first, second = Conv(c=6, o=10, padding=1), Conv(c=10, o=7, kernel=5, padding=2, stride=2)
    mask = random_mask(second.out_shape(), 0.1)
    plan = PixelPlan.from_mask(mask)
    middle = plan.needed(5, 2, 2, in_size=(11, 13))
    assert 0 < len(plan) < len(middle) < middle.num_pixels
    tensors = first.tensors() | {"weight2": random_tensor(7, 10, 5, 5)}

    def ours(x, weight, bias, weight2):
        rows = ops.packed_conv2d(x, weight, bias, None, middle, padding=1, activation="silu", backend=backend)
        return ops.packed_conv2d(rows, weight2, None, middle, plan, stride=2, padding=2, backend=backend)

    def oracle(x, weight, bias, weight2):
        hidden = torch.nn.functional.silu(torch.conv2d(x, weight, bias, padding=1))
        return rows_at(torch.conv2d(hidden, weight2, None, stride=2, padding=2), mask)

    compare(ours, oracle, tensors, tuple(tensors), backend)
