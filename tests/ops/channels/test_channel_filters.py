"""Local convolution against ``F.unfold`` and a sum: values and gradients, every argument."""

import pixel_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pixel_cases import BACKENDS, DTYPES, assert_format
from processes import assert_same_on_any_threads

from dynops import ops
from dynops.testing import LAYOUTS, assert_within_budget, in_layout, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")
# (N, C, H, W), kernel_size, arguments
CASES = {
    "involution": ((2, 64, 9, 10), (7, 7), {"padding": 3, "groups": 4}),
    "involution, groups of 32": ((1, 160, 8, 8), (3, 3), {"padding": 1, "groups": 5}),
    "dynamic filter": ((2, 40, 9, 11), (3, 3), {"padding": 1}),
    "a filter for each channel": ((2, 20, 9, 11), (3, 3), {"padding": 1, "groups": 20}),
    "one channel": ((2, 1, 9, 11), (3, 3), {"padding": 1}),
    "a filter for each of 48 channels": ((2, 48, 9, 11), (3, 3), {"padding": 1, "stride": 2, "groups": 48}),
    "the same, upsampled": ((1, 32, 5, 6), (3, 2), {"padding": 1, "upsample": 2, "groups": 32}),
    "groups of 3": ((1, 30, 6, 7), (2, 3), {"groups": 10}),
    "CARAFE": ((1, 132, 5, 6), (5, 5), {"padding": 2, "upsample": 2}),
    "upsample 3, two groups": ((2, 24, 4, 5), (3, 3), {"padding": 1, "upsample": 3, "groups": 2}),
    "stride 2": ((2, 16, 9, 10), (3, 3), {"stride": 2, "padding": 1}),
    "uneven": ((2, 17, 9, 10), (1, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "stride and upsample": ((1, 16, 9, 10), (3, 3), {"stride": 2, "upsample": 2, "groups": 2}),
    "padding over kernel": ((1, 8, 3, 3), (2, 2), {"padding": 4}),
    "one pixel": ((2, 33, 1, 1), (3, 3), {"padding": 1}),
}


def oracle(x, kernels, kernel_size, stride=1, padding=0, dilation=1, groups=1, upsample=1, padding_mode=None):
    if padding_mode is not None:
        x, padding = F.pad(x, (padding,) * 4, mode=padding_mode), 0
    patches = F.unfold(x, kernel_size, dilation, padding, stride)
    height, width = (size // upsample for size in kernels.shape[2:])
    taps = kernel_size[0] * kernel_size[1]
    patches = patches.view(x.shape[0], groups, -1, taps, height, width)
    patches = patches.repeat_interleave(upsample, 4).repeat_interleave(upsample, 5)
    return (kernels.unflatten(1, (groups, 1, taps)) * patches).sum(3).flatten(1, 2)


def out_size(size, kernel_size, stride=1, padding=0, dilation=1, groups=1, upsample=1):
    conv = torch.nn.Conv2d(1, 1, kernel_size, stride, padding, dilation, device="meta")
    out = conv(torch.empty(1, 1, *size, device="meta"))
    return [upsample * n for n in out.shape[2:]]


def make(case, dtype=torch.float32):
    (n, c, h, w), kernel_size, arguments = CASES[case]
    channels = arguments.get("groups", 1) * kernel_size[0] * kernel_size[1]
    kernels = random_tensor(n, channels, *out_size((h, w), kernel_size, **arguments), dtype=dtype)
    return random_tensor(n, c, h, w, dtype=dtype), kernels, kernel_size, arguments


def compare(run, dense, x, kernels):
    """The yardstick is that of the reference, in one memory format: ``F.unfold`` sums in one order."""
    by_name = [lambda x, kernels, f=f: f(x, kernels) for f in (run, dense)]
    return pixel_cases.compare(*by_name, {"x": x, "kernels": kernels}, ("x", "kernels"), "reference")


def check(x, kernels, kernel_size, arguments, backend):
    return compare(
        lambda x, k: ops.local_conv2d(x, k, kernel_size, **arguments, backend=backend),
        lambda x, k: oracle(x, k, kernel_size, **arguments),
        *(x, kernels),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, backend):
    check(*make(case, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_and_the_same_out(layout, backend):
    x, kernels, kernel_size, arguments = make("dynamic filter")
    x, kernels = in_layout(x, layout), in_layout(kernels, layout)
    assert_format(check(x, kernels, kernel_size, arguments, backend), layout)
    leaves = [t.detach().requires_grad_() for t in (x, kernels)]
    out = ops.local_conv2d(*leaves, kernel_size, **arguments, backend=backend)
    for grad in torch.autograd.grad(out, leaves, in_layout(random_tensor(2, 40, 9, 11), layout)):
        assert_format(grad, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode, backend):
    x, kernels, kernel_size, arguments = make("involution")
    check(x, kernels, kernel_size, {**arguments, "padding_mode": mode}, backend)


def test_padding_same():
    x, kernels, kernel_size, arguments = make("dynamic filter")
    expected = ops.local_conv2d(x, kernels, kernel_size, **arguments)
    assert torch.equal(ops.local_conv2d(x, kernels, 3, padding="same"), expected)
    even = random_tensor(2, 8, 9, 11)
    exact = oracle(F.pad(x.double(), (0, 1, 1, 2)), even.double(), (4, 2))
    dense = oracle(F.pad(x, (0, 1, 1, 2)), even, (4, 2))
    assert_within_budget(ops.local_conv2d(x, even, (4, 2), padding="same"), exact, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sample(backend):
    x, kernels, kernel_size, arguments = make("CARAFE")
    leaves = [t[:0].clone().requires_grad_() for t in (x, kernels)]
    out = ops.local_conv2d(*leaves, kernel_size, **arguments, backend=backend)
    assert out.shape == (0, 132, 10, 12)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape


@pytest.mark.parametrize("case", ["involution", "a filter for each channel"])
def test_the_result_does_not_depend_on_the_threads(case):
    x, kernels, kernel_size, arguments = make(case)
    leaves = [t.requires_grad_() for t in (x, kernels)]

    def run():
        out = ops.local_conv2d(*leaves, kernel_size, **arguments)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert_same_on_any_threads(run)


def test_a_tap_outside_the_input_is_not_read():
    x, kernels, kernel_size, arguments = make("dynamic filter")
    kernels[:, 0, 0] = kernels[:, 0, :, 0] = float("inf")  # what 0 * inf would turn into NaN
    assert ops.local_conv2d(x, kernels, kernel_size, **arguments, backend=BACKENDS[-1]).isfinite().all()


WRONG = {
    "kernels of another size": (
        {"kernels": torch.ones(2, 9, 9, 10)},
        ValueError,
        r"kernels.*\(2, 9, 9, 11\)",
    ),
    "kernels of other taps": ({"kernel_size": 5}, ValueError, "kernels"),
    "kernels of another dtype": ({"kernels": torch.ones(2, 9, 9, 11).double()}, TypeError, "kernels"),
    "no kernels": ({"kernels": None}, TypeError, "kernels"),
    "kernel_size": ({"kernel_size": 0}, ValueError, "kernel_size"),
    "no groups": ({"groups": 0}, ValueError, "groups"),
    "half an upsample": ({"upsample": 0.5}, ValueError, "upsample"),
    "integers": ({"x": torch.ones(2, 40, 9, 11, dtype=torch.int32)}, TypeError, "x"),
    "Triton on a CPU": ({"backend": "triton"}, RuntimeError, "triton"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, error, message = WRONG[case]
    x, kernels, kernel_size, arguments = make("dynamic filter")
    good = {"x": x, "kernels": kernels, "kernel_size": kernel_size, **arguments}
    with pytest.raises(error, match=message):
        ops.local_conv2d(**{**good, **change})


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_any_local_convolution(data):
    def pairs(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.sampled_from([1, 1, 2, 5, 16]))
    c = groups * data.draw(st.sampled_from([1, 3, 8, 16, 32, 70]))
    kernel, stride, padding, dilation, size = pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3), pairs(1, 9)
    assume(
        all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    )
    upsample, dtype = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(st.sampled_from(DTYPES))
    arguments = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, upsample=upsample)  # noqa: C408
    layout = data.draw(st.sampled_from(LAYOUTS))
    x = in_layout(random_tensor(data.draw(st.integers(1, 2)), c, *size, dtype=dtype), layout)
    channels = groups * kernel[0] * kernel[1]
    kernels = random_tensor(x.shape[0], channels, *out_size(size, kernel, **arguments), dtype=dtype)
    compare(
        lambda x, k: ops.local_conv2d(x, k, kernel, **arguments, backend=BACKENDS[-1]),
        lambda x, k: oracle(x, k, kernel, **arguments),
        *(x, kernels),
    )
