"""Property tests: any convolution, any mask, any layout is the dense one and the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_pixels import Conv, check, compare

from dynops import PixelPlan
from dynops.testing import available_backends, dense_from_rows, in_layout, random_mask, random_tensor, rows_at

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch's, about its own copy
]

BACKENDS = available_backends()
SETTINGS = settings(
    max_examples=50,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # not explain: it runs for minutes
    derandomize=True,  # the same examples in every run: a failure in CI is one on the desk
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convs(draw, transposed: bool) -> Conv:
    """A convolution whose output has at least one pixel."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 16]))
    widths = st.sampled_from([1, 2, 3, 5, 8, 16, 17] if groups < 16 else [1, 2])
    kernel, stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(1, 3))
    n, h, w = draw(st.integers(0, 3)), draw(st.integers(1, 10)), draw(st.integers(1, 10))
    sizes = {"c": groups * draw(widths), "o": groups * draw(widths), "n": n, "h": h, "w": w, "groups": groups}
    padding = draw(pairs(0, 3))
    if transposed:
        output_padding = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        extra = {"output_padding": output_padding}
    else:
        output_padding, extra = (0, 0), {}
        if stride == (1, 1) and draw(st.booleans()):
            padding = "same"
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    for i, size in enumerate((h, w)):
        pad = 0 if padding == "same" else padding[i]
        if transposed:
            assume((size - 1) * stride[i] - 2 * pad + reach[i] + output_padding[i] >= 1)
        else:
            assume(padding == "same" or size + 2 * pad >= reach[i])
    return Conv(kernel=kernel, stride=stride, padding=padding, dilation=dilation, **sizes, **extra)


masks = st.tuples(st.sampled_from([0, 0.03, 0.2, 0.5, 0.9, 1]), st.sampled_from(["random", "square", "one"]))
layouts = st.sampled_from(["nchw", "channels_last", "strided", "transposed"])
names = st.sets(st.sampled_from(["scale", "shift", "gate", "residual", "base"]))
activations = st.sampled_from([None, None, "silu", "gelu"])
flags = st.tuples(st.booleans(), st.booleans(), st.booleans())  # bias, capacity form, training
seeds = st.integers(0, 2**16)


def close_to_dense(run):
    """Runs a comparison with float32 inputs; a difference in the last bit is not a failure.

    The budget compares with the dense op's own error, which on an output of a few numbers may be
    zero by luck. Here, where shapes are arbitrary and small, a relative norm decides instead.
    """

    def near(actual, exact, dense, what="result"):
        dense = dense[0]
        assert actual.shape == dense.shape and actual.dtype == dense.dtype
        assert actual.isfinite().all(), what
        error, size = (actual.double() - exact).norm(), exact.norm() + dense.double().norm()
        assert error <= 1e-5 * size, f"{what}: error {error:.2e} of {size:.2e}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_pixels.assert_close", near)
        run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_dense_in_dense_out(transposed, backend):
    @SETTINGS
    @given(convs(transposed), masks, layouts, names, activations, flags, seeds)
    def property_holds(conv, mask_kind, layout, epilogue, activation, flags, seed):
        bias, capacity, training = flags
        torch.manual_seed(seed)
        mask = random_mask(conv.out_shape(), *mask_kind)
        plan = PixelPlan.from_mask(mask, int(mask.sum()) + seed % 5 if capacity else None)
        tensors = conv.tensors(bias=bias) | {k: v for k, v in conv.epilogue().items() if k in epilogue}
        tensors["x"] = in_layout(tensors["x"], layout)
        grads = tuple(k for k, v in tensors.items() if v is not None and training)
        close_to_dense(lambda: check(conv, backend, mask, tensors, grads, plan, activation=activation))

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_rows_to_rows(transposed, backend):
    @SETTINGS
    @given(convs(transposed), masks, masks, flags, seeds)
    def property_holds(conv, in_kind, kind, flags, seed):
        bias, capacity, training = flags
        torch.manual_seed(seed)
        in_mask, mask = random_mask((conv.n, conv.h, conv.w), *in_kind), random_mask(conv.out_shape(), *kind)
        in_plan = PixelPlan.from_mask(in_mask)
        plan = PixelPlan.from_mask(mask, int(mask.sum()) + seed % 5 if capacity else None)
        tensors = conv.tensors(bias=bias)
        tensors["x"] = rows_at(tensors["x"], in_mask)
        active = int(mask.sum())

        def ours(x, weight, bias):
            return conv.packed_op(x, weight, bias, in_plan, plan, backend=backend)[:active]

        def oracle(x, weight, bias):
            return rows_at(conv.oracle(dense_from_rows(x, in_mask), weight, bias, mask), mask)

        grads = tuple(k for k, v in tensors.items() if v is not None and training)
        close_to_dense(lambda: compare(ours, oracle, tensors, grads))

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plan_decides_which_pixels_and_nothing_else(backend):
    """An output pixel has the same bits whatever other pixels are computed beside it."""

    @settings(SETTINGS, max_examples=40)
    @given(convs(False), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
    def property_holds(conv, dtype, seed):
        torch.manual_seed(seed)
        tensors = conv.tensors(dtype)
        some, more = random_mask(conv.out_shape(), 0.3), random_mask(conv.out_shape(), 0.5)
        few = conv.op(**tensors, plan=PixelPlan.from_mask(some), backend=backend)
        many = conv.op(**tensors, plan=PixelPlan.from_mask(some | more), backend=backend)
        assert torch.equal(few, many * some[:, None])

    property_holds()


def test_needed_is_enough_and_no_more():
    """Outputs depend on every needed input and on no other."""

    @settings(SETTINGS, max_examples=60)
    @given(convs(False), st.sampled_from([0.05, 0.3]), seeds)
    def property_holds(conv, density, seed):
        assume(conv.padding != "same" and conv.n > 0)
        torch.manual_seed(seed)
        mask = random_mask(conv.out_shape(), density)
        plan = PixelPlan.from_mask(mask)
        needed = plan.needed(conv.kernel, conv.stride, conv.padding, conv.dilation, (conv.h, conv.w))
        x = random_tensor(conv.n, conv.c, conv.h, conv.w).requires_grad_()
        weight = random_tensor(*conv.layer().weight.shape).abs()
        (grad,) = torch.autograd.grad(conv.op(x, weight, None, plan).sum(), x)
        assert torch.equal((grad != 0).any(1), needed.mask())

    property_holds()
