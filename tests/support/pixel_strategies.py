"""Any convolution, mask and layout, for property tests."""

import pytest
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from pixel_cases import Conv

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
        patch.setattr("pixel_cases.assert_close", near)
        run()
