"""Output masks against the dense convolution and a ``where``: values and gradients, every argument."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pixel_cases import BACKENDS, DTYPES, compare
from processes import assert_same_on_any_threads

from dynops import ops
from dynops.geometry import ConvGeometry
from dynops.kernels.cpu import channel_outputs
from dynops.testing import LAYOUTS, assert_within_budget, in_layout, random_tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch's, about its own copy
]

# (N, C, O, H, W), weight's kernel, arguments
CASES = {
    "3x3": ((2, 24, 20, 9, 11), (3, 3), {"padding": 1}),
    "3x3 valid, two runs of channels": ((1, 150, 9, 7, 8), (3, 3), {}),
    "1x1, several panels and blocks": ((2, 40, 130, 17, 19), (1, 1), {}),
    "1x3": ((1, 16, 8, 6, 20), (1, 3), {"padding": (0, 1)}),
    "7x7 stride 2": ((1, 3, 16, 21, 19), (7, 7), {"stride": 2, "padding": 3}),
    "uneven stride and padding": ((2, 17, 5, 8, 9), (3, 2), {"stride": (1, 2), "padding": (0, 2)}),
    "dilation 3": ((1, 33, 12, 12, 12), (3, 3), {"dilation": 3, "padding": 3}),
    "same, even kernel": ((1, 16, 6, 7, 7), (4, 2), {"padding": "same"}),
    "groups": ((2, 48, 36, 8, 8), (3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((2, 20, 20, 8, 8), (3, 3), {"groups": 20, "padding": 1}),
    "reflect": ((2, 16, 8, 8, 9), (3, 3), {"padding": 1, "padding_mode": "reflect"}),
    "a kernel larger than the tile": ((1, 96, 4, 40, 40), (19, 19), {"stride": 4}),
}


def oracle(x, weight, mask, partial, bias, padding_mode="zeros", **arguments):
    if padding_mode != "zeros":
        x = F.pad(x, (arguments["padding"],) * 4, mode=padding_mode)
        arguments = {**arguments, "padding": 0}
    out = F.conv2d(x, weight, bias, **arguments)
    return torch.where(mask, out, 0) if partial is None else torch.where(mask, out + partial, partial)


def make(case, dtype=torch.float32, density=0.3):
    (n, c, o, h, w), kernel, arguments = CASES[case]
    x = random_tensor(n, c, h, w, dtype=dtype)
    weight = random_tensor(o, c // arguments.get("groups", 1), *kernel, dtype=dtype)
    shape = oracle(x.float(), weight.float(), torch.tensor(True), None, None, **arguments).shape
    partial, bias = random_tensor(*shape, dtype=dtype), random_tensor(o, dtype=dtype)
    return x, weight, torch.rand(shape) < density, partial, bias, arguments


def check(x, weight, mask, partial, bias, arguments, backend, span=None):
    """Values and the gradients of all tensors; ``span``: the range of input channels that is read."""
    begin, end = span or (0, x.shape[1])
    tensors = {"x": x, "weight": weight, "partial": partial, "bias": bias}
    compare(
        lambda x, weight, **t: ops.masked_output_conv2d(
            x, weight, mask, **t, **arguments, in_channels=span, backend=backend
        ),
        lambda x, weight, **t: oracle(x[:, begin:end], weight, mask, **t, **arguments),
        tensors,
        tuple(tensors),
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, backend):
    x, weight, mask, *_, arguments = given = make(case, dtype)
    check(*given, backend)
    actual = ops.masked_output_conv2d(x, weight, mask, **arguments, backend=backend)
    expected = [
        oracle(*(t.to(d) for t in (x, weight)), mask, None, None, **arguments) for d in (torch.double, dtype)
    ]
    assert_within_budget(actual, *expected)
    assert (actual[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("span", [(0, 6), (5, 22), (20, 24)])
def test_only_a_range_of_channels_is_read(span, backend):
    begin, end = span
    x, weight, mask, partial, bias, arguments = make("3x3")
    weight = weight[:, : end - begin].contiguous()
    check(x, weight, mask, partial, bias, arguments, backend, span)
    unread = torch.ones(24, dtype=torch.bool)
    unread[begin:end] = False
    poisoned_x = in_layout(x.masked_fill(unread[:, None, None], float("nan")), "channels_last")
    out = ops.masked_output_conv2d(poisoned_x, weight, mask, **arguments, in_channels=span, backend=backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_and_the_same_out(layout, backend):
    x, weight, mask, partial, bias, arguments = make("3x3")
    mask, partial = in_layout(mask, layout), in_layout(partial, layout)
    x = in_layout(x, layout)
    expected = [
        oracle(*(t.to(d) for t in (x, weight)), mask, partial.to(d), bias.to(d), **arguments)
        for d in (torch.double, torch.float32)
    ]
    actual = ops.masked_output_conv2d(x, weight, mask, partial, bias, **arguments, backend=backend)
    assert_within_budget(actual, *expected)
    last = layout == "channels_last"
    assert actual.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "one", "all", "one channel", "one pixel"])
def test_extreme_masks(kind, backend):
    x, weight, mask, partial, bias, arguments = make("3x3")
    mask = torch.full_like(mask, kind == "all")
    if kind == "one":
        mask[1, 7, 4, 5] = True
    elif kind == "one channel":
        mask[:, 3] = True
    elif kind == "one pixel":
        mask[:, :, 8, 10] = True
    check(x, weight, mask, partial, bias, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_selected_is_the_partial_to_the_bit(backend):
    x, weight, mask, partial, bias, arguments = make("3x3")
    partial[0, 0, :, :6] = -0.0
    partial[0, 1, 0, :6] = float("inf")
    x = torch.full_like(x, float("nan"))
    out = ops.masked_output_conv2d(x, weight, mask, partial, bias, **arguments, backend=backend)
    assert torch.equal(out[~mask].view(torch.int32), partial[~mask].view(torch.int32))
    assert out[mask].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_every_dtype(dtype):
    x, weight, mask, partial, bias, arguments = make("3x3")
    expected = ops.masked_output_conv2d(x, weight, mask, partial, bias, **arguments)
    given_mask = mask.to(dtype) * 3
    assert torch.equal(ops.masked_output_conv2d(x, weight, given_mask, partial, bias, **arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sample(backend):
    x, weight, mask, partial, bias, arguments = make("3x3")
    leaves = [t.requires_grad_() for t in (x[:0].clone(), weight, partial[:0].clone())]
    out = ops.masked_output_conv2d(leaves[0], weight, mask[:0], leaves[2], bias, **arguments, backend=backend)
    assert out.shape == mask[:0].shape
    dx, dw, _ = torch.autograd.grad(out.sum(), leaves)
    assert dx.shape == x[:0].shape and (dw == 0).all()


def test_the_dense_convolution_runs_where_it_is_faster(monkeypatch):
    if "cpp" not in BACKENDS:
        pytest.skip("the binary is not built")
    x, weight, mask, *_, arguments = make("3x3")
    ran = []
    kernel = channel_outputs.conv
    monkeypatch.setattr(channel_outputs, "conv", lambda *a: ran.append(True) or kernel(*a))
    for density, kernel_runs in ((0.1, True), (0.9, False)):
        for layout in ("nchw", "channels_last", "strided", "transposed"):
            ran.clear()
            mask = in_layout(torch.rand(mask.shape) < density, layout)
            ops.masked_output_conv2d(x, weight, mask, **arguments)
            assert bool(ran) == kernel_runs
            ops.masked_output_conv2d(x, weight, mask, **arguments, backend="cpp")
            assert ran


def test_half_precision_leaves_the_kernel_earlier():
    if "cpp" not in BACKENDS:
        pytest.skip("the binary is not built")
    g = ConvGeometry(1, 10, 10, 10, 10, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0)
    weight, mask = random_tensor(8, 256, 1, 1), torch.arange(800).view(1, 8, 10, 10) % 4 == 0
    assert channel_outputs.wins(weight, mask, g)
    assert not channel_outputs.wins(weight.bfloat16(), mask, g)
    assert not channel_outputs.wins(weight[:, :8], mask, g)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the binary is not built")
def test_the_result_does_not_depend_on_the_threads():
    *tensors, arguments = make("1x1, several panels and blocks")
    assert_same_on_any_threads(lambda: ops.masked_output_conv2d(*tensors, **arguments, backend="cpp"))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the binary is not built")
def test_a_changed_weight_is_packed_again():
    x, weight, mask, *_, arguments = make("3x3")
    first = ops.masked_output_conv2d(x, weight, mask, **arguments, backend="cpp")
    weight.mul_(2)
    assert torch.equal(ops.masked_output_conv2d(x, weight, mask, **arguments, backend="cpp"), 2 * first)


WRONG = {
    "mask of another shape": ({"mask": torch.ones(2, 20, 9, 10)}, ValueError, r"mask.*\(2, 20, 9, 11\)"),
    "no mask": ({"mask": None}, TypeError, "mask"),
    "complex mask": ({"mask": torch.ones(2, 20, 9, 11, dtype=torch.complex64)}, TypeError, "mask"),
    "partial of another shape": ({"partial": torch.ones(2, 20, 9, 1)}, ValueError, "partial"),
    "partial of another dtype": ({"partial": torch.ones(2, 20, 9, 11).double()}, TypeError, "partial"),
    "bias": ({"bias": torch.ones(3)}, ValueError, "bias"),
    "empty range": ({"in_channels": (4, 4)}, ValueError, "in_channels"),
    "range too long": ({"in_channels": (4, 25)}, ValueError, "in_channels.*24"),
    "no range": ({"in_channels": 4}, ValueError, "in_channels"),
    "range of another width": ({"in_channels": (0, 20)}, ValueError, "24 channels"),
    "integers": ({"x": torch.ones(2, 24, 9, 11, dtype=torch.int32)}, TypeError, "x"),
    "Triton on a CPU": ({"backend": "triton"}, RuntimeError, "triton"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, error, message = WRONG[case]
    x, weight, mask, partial, bias, arguments = make("3x3")
    good = {"x": x, "weight": weight, "mask": mask, "partial": partial, "bias": bias, **arguments}
    with pytest.raises(error, match=message):
        ops.masked_output_conv2d(**{**good, **change})


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_any_convolution_and_any_mask(data):
    def pairs(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.sampled_from([1, 1, 2, 5]))
    c, o = (groups * data.draw(st.sampled_from([1, 3, 16, 31, 64])) for _ in range(2))
    kernel, stride, padding, dilation, size = pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3), pairs(1, 19)
    assume(
        all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    )
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dtype = data.draw(st.sampled_from(DTYPES))
    x = in_layout(random_tensor(data.draw(st.integers(1, 2)), c, *size, dtype=dtype), data.draw(st.sampled_from(LAYOUTS)))  # fmt: skip
    weight = random_tensor(o, c // groups, *kernel, dtype=dtype)
    exact, dense = (F.conv2d(x.to(d), weight.to(d), **arguments) for d in (torch.float64, dtype))
    mask = torch.rand(exact.shape) < data.draw(st.sampled_from([0, 0.02, 0.3, 1]))
    actual = ops.masked_output_conv2d(x, weight, mask, **arguments, backend=BACKENDS[-1])
    assert_within_budget(actual, torch.where(mask, exact, 0), torch.where(mask, dense, 0))
