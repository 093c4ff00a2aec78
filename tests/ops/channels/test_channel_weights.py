"""Weights of each sample, of each region, and mixed ones, against the dense layer in a loop."""

from dataclasses import dataclass

import pixel_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pixel_cases import BACKENDS, DTYPES, assert_format, each, run
from processes import torch_threads
from torch import Tensor

from dynops import ops
from dynops.testing import LAYOUTS, in_layout, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Conv(pixel_cases.Conv):
    n: int = 3
    h: int = 9
    w: int = 10

    def x(self, dtype=torch.float32) -> Tensor:
        return in_layout(random_tensor(self.n, self.c, self.h, self.w, dtype=dtype), "channels_last")

    def weight(self, *lead: int, dtype=torch.float32) -> Tensor:
        return random_tensor(*lead, *self.layer().weight.shape, dtype=dtype)

    def region(self, regions: int, kind: str = "random") -> Tensor:
        n, h, w = self.out_shape()
        if kind == "lines":  # a region is some lines of the map
            return (torch.arange(h) * regions // h)[:, None].expand(n, h, w)
        if kind == "one":  # nobody takes the others
            return torch.full((n, h, w), regions - 1)
        return torch.randint(0, regions, (n, h, w))

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense layer."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self.layer()._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def sample_oracle(self, x, weight, bias=None, act=lambda y: y) -> Tensor:
        outs = []
        for i in range(x.shape[0]):
            b = bias if bias is None or bias.dim() == 1 else bias[i]
            outs.append(self.dense(x[i : i + 1], weight[i], b))
        return act(torch.cat(outs) if outs else self.dense(x, weight.new_zeros(weight.shape[1:]), None))

    def region_oracle(self, x, weights, region, bias=None) -> Tensor:
        if weights.dim() == 5 and (bias is None or bias.dim() == 2):  # the same dense layers for all samples
            every = [self.dense(x, w, None if bias is None else bias[r]) for r, w in enumerate(weights)]
            return sum(torch.where((region == r)[:, None], y, 0) for r, y in enumerate(every))
        samples = []
        for i in range(x.shape[0]):
            w = weights if weights.dim() == 5 else weights[i]
            b = bias if bias is None or bias.dim() == 2 else bias[i]
            every = [self.dense(x[i : i + 1], w[r], None if b is None else b[r]) for r in range(len(w))]
            samples.append(sum(torch.where(region[i] == r, y, 0) for r, y in enumerate(every)))
        return torch.cat(samples)

    def mixed_oracle(self, x, weights, mix, bias=None) -> Tensor:
        if bias is not None and bias.dim() == 2:
            bias = mix @ bias
        return self.sample_oracle(x, torch.einsum("ne,eoikl->noikl", mix, weights), bias)


CONVS = {
    "3x3": Conv(padding=1),
    "3x3 valid": Conv(),
    "1x1": Conv(kernel=1, c=24, o=20),
    "1x1 stride 2": Conv(kernel=1, stride=2),
    "1x1 padded": Conv(kernel=1, padding=1),
    "1x3": Conv(kernel=(1, 3), padding=(0, 1)),
    "5x5": Conv(kernel=5, padding=2),
    "7x7 stride 2, 3 channels": Conv(c=3, o=16, kernel=7, stride=2, padding=3),
    "4x4 stride 2": Conv(kernel=4, stride=2, padding=1, c=17),
    "stride over kernel": Conv(kernel=2, stride=3),
    "uneven stride and padding": Conv(kernel=3, stride=(1, 2), padding=(0, 2)),
    "padding over kernel": Conv(kernel=2, padding=4),
    "uneven dilation, stride 2": Conv(padding=(2, 3), dilation=(2, 3), stride=2, c=19),
    "same, dilated": Conv(kernel=(3, 4), padding="same", dilation=(1, 3), c=20),
    "reflect": Conv(padding=2, padding_mode="reflect", kernel=5),
    "circular, same": Conv(padding="same", padding_mode="circular", kernel=(4, 3)),
    "one channel": Conv(c=1, o=1, padding=1),
    "one to many": Conv(c=1, o=19, padding=1),
    "many to one": Conv(c=37, o=1, padding=1),
    "odd wide": Conv(c=70, o=101, padding=1, h=6, w=5),
    "winograd": Conv(c=40, o=72, padding=1, h=21, w=23),
    "winograd, padded by 2": Conv(c=33, o=37, padding=2, h=19, w=14),
    "one output pixel": Conv(kernel=(9, 10)),
    "one pixel": Conv(kernel=1, h=1, w=1, c=24),
    "depthwise": Conv(c=16, o=16, groups=16, padding=1),
    "depthwise 5x5 stride 2": Conv(c=19, o=19, groups=19, kernel=5, stride=2, padding=2),
    "depthwise multiplier": Conv(c=6, o=18, groups=6, padding=1),
    "group width 3": Conv(c=12, o=12, groups=4, padding=1),
    "group width 16": Conv(c=32, o=70, groups=2, padding=1, stride=2),
    "one sample": Conv(c=40, o=40, padding=1, n=1),
    "two samples": Conv(c=20, o=33, padding=1, n=2, stride=2),
    "no sample": Conv(padding=1, n=0),
    "outputs mixed": Conv(kernel=1, h=1, w=1, c=300, o=450),
    "steps of many samples": Conv(c=48, o=80, padding=1, n=11, h=4, w=5),
}  # fmt: skip
FEW = {
    k: CONVS[k]
    for k in ("3x3", "1x1", "7x7 stride 2, 3 channels", "odd wide", "depthwise", "group width 16", "winograd")
}


backends = pytest.mark.parametrize("backend", BACKENDS)
ignore_even_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def compare(ours, oracle, tensors: dict, grads=None, backend="cpp") -> Tensor:
    """Also the gradients of all tensors, if no other names are given."""
    return pixel_cases.compare(ours, oracle, tensors, tuple(tensors) if grads is None else grads, backend)


def check_sample(conv: Conv, backend, tensors, grads=None) -> Tensor:
    return compare(
        lambda **t: ops.sample_conv2d(**t, **conv.arguments, backend=backend),
        conv.sample_oracle,
        tensors,
        grads,
        backend,
    )


def check_region(conv: Conv, backend, tensors, region, grads=None) -> Tensor:
    return compare(
        lambda **t: ops.region_conv2d(**t, region=region, **conv.arguments, backend=backend),
        lambda **t: conv.region_oracle(**t, region=region),
        tensors,
        grads,
        backend,
    )


def check_mixed(conv: Conv, backend, tensors, grads=None) -> Tensor:
    return compare(
        lambda **t: ops.mixed_conv2d(**t, **conv.arguments, backend=backend),
        conv.mixed_oracle,
        tensors,
        grads,
        backend,
    )


def sample_tensors(conv: Conv, dtype=torch.float32) -> dict[str, Tensor]:
    bias = random_tensor(conv.n, conv.o, dtype=dtype)
    return {"x": conv.x(dtype), "weight": conv.weight(conv.n, dtype=dtype), "bias": bias}


def region_tensors(conv: Conv, regions=3, shared=False, dtype=torch.float32) -> dict[str, Tensor]:
    lead = (regions,) if shared else (conv.n, regions)
    bias = random_tensor(*lead, conv.o, dtype=dtype)
    return {"x": conv.x(dtype), "weights": conv.weight(*lead, dtype=dtype), "bias": bias}


def mixed_tensors(conv: Conv, experts=4, dtype=torch.float32) -> dict[str, Tensor]:
    return {
        "x": conv.x(dtype),
        "weights": conv.weight(experts, dtype=dtype),
        "mix": random_tensor(conv.n, experts, dtype=dtype),
        "bias": random_tensor(experts, conv.o, dtype=dtype),
    }


@backends
@ignore_even_same
@each(CONVS)
def test_sample(conv, backend):
    check_sample(conv, backend, sample_tensors(conv))


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_sample_dtypes(conv, dtype, backend):
    check_sample(conv, backend, sample_tensors(conv, dtype))


@backends
@each(FEW)
def test_sample_without_bias_and_with_one_for_all(conv, backend):
    tensors = sample_tensors(conv)
    tensors["bias"] = tensors["bias"][0]
    check_sample(conv, backend, tensors)
    del tensors["bias"]
    check_sample(conv, backend, tensors)


@backends
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish"])
def test_sample_activation(activation, backend):
    conv = Conv(c=20, o=35, padding=1)
    act = {
        "relu6": F.relu6, "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }[activation]  # fmt: skip
    compare(
        lambda **t: ops.sample_conv2d(**t, **conv.arguments, activation=activation, backend=backend),
        lambda **t: conv.sample_oracle(**t, act=act),
        sample_tensors(conv),
        backend=backend,
    )


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@each(FEW)
def test_sample_layouts(conv, layout, backend):
    tensors = sample_tensors(conv)
    tensors["x"] = in_layout(tensors["x"], layout)
    assert_format(check_sample(conv, backend, tensors), layout)


@backends
@ignore_even_same
@pytest.mark.parametrize("shared", [False, True])
@each({k: v for k, v in CONVS.items() if v.n})
def test_region(conv, shared, backend):
    check_region(conv, backend, region_tensors(conv, shared=shared), conv.region(3))


@backends
@pytest.mark.parametrize("kind", ["lines", "one"])
@each(FEW)
def test_region_shapes(conv, kind, backend):
    check_region(conv, backend, region_tensors(conv, 4), conv.region(4, kind))


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_region_dtypes(conv, dtype, backend):
    check_region(conv, backend, region_tensors(conv, dtype=dtype), conv.region(3, "lines"))


@backends
def test_region_of_no_sample_and_no_bias(backend):
    conv = Conv(padding=1)
    empty = Conv(padding=1, n=0)
    out = ops.region_conv2d(empty.x(), empty.weight(0, 3), empty.region(3), padding=1, backend=backend)
    assert out.shape == (0, 8, 9, 10)
    tensors = region_tensors(conv)
    tensors["bias"] = tensors["bias"][0]  # [R, O] beside weights of each sample
    check_region(conv, backend, tensors, conv.region(3))
    del tensors["bias"]
    check_region(conv, backend, tensors, conv.region(3).to(torch.uint8))


@backends
@ignore_even_same
@each({k: v for k, v in CONVS.items() if v.n})
def test_mixed(conv, backend):
    experts = 4 if conv.n > 1 else 12  # the error of a gradient of 4 numbers is luck
    check_mixed(conv, backend, mixed_tensors(conv, experts))


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_mixed_dtypes(conv, dtype, backend):
    for experts in (1, 4, 9):
        tensors = mixed_tensors(conv, experts, dtype=dtype)
        check_mixed(conv, backend, tensors, ())
    check_mixed(conv, backend, tensors)


@backends
def test_mixed_bias(backend):
    conv = Conv(c=20, o=35, padding=1)
    tensors = mixed_tensors(conv)
    tensors["bias"] = random_tensor(35)
    check_mixed(conv, backend, tensors)
    del tensors["bias"]
    check_mixed(conv, backend, tensors)


@backends
def test_mixed_sees_a_changed_weight(backend):
    conv = Conv(c=20, o=35, padding=1)
    tensors = mixed_tensors(conv)
    for _ in range(3):
        check_mixed(conv, backend, tensors, ())
        with torch.no_grad():
            tensors["weights"].mul_(-0.5)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the binary is not built")
@pytest.mark.parametrize("threads, n", [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3), (3, 5)])
def test_threads(threads, n, backend="cpp"):
    with torch_threads(threads):
        for conv in (
            Conv(c=40, o=72, padding=1, h=21, w=23, n=n),
            Conv(c=48, o=40, padding=1, stride=2, n=n),
        ):
            check_sample(conv, backend, sample_tensors(conv))
            check_region(conv, backend, region_tensors(conv), conv.region(3, "lines"))
            check_mixed(conv, backend, mixed_tensors(conv), ())


@backends
@given(
    n=st.integers(1, 4), c=st.integers(1, 40), o=st.integers(1, 70), kernel=st.integers(1, 4),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), groups=st.integers(1, 3),
    size=st.integers(1, 14), regions=st.integers(1, 4),
)  # fmt: skip
@settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_properties(backend, n, c, o, kernel, stride, padding, dilation, groups, size, regions):
    """A relative norm decides: an output of a few numbers is exact in the dense op by luck."""
    size = max(size, dilation * (kernel - 1) + 1 - 2 * padding)
    conv = Conv(c * groups, o * groups, kernel, stride, padding, dilation, groups, n=n, h=size, w=size + 1)
    arguments, region = conv.arguments | {"backend": backend}, conv.region(regions)
    for ours, oracle, tensors in (
        (lambda **t: ops.sample_conv2d(**t, **arguments), conv.sample_oracle, sample_tensors(conv)),
        (
            lambda **t: ops.region_conv2d(**t, region=region, **arguments),
            lambda **t: conv.region_oracle(**t, region=region),
            region_tensors(conv, regions),
        ),
        (lambda **t: ops.mixed_conv2d(**t, **arguments), conv.mixed_oracle, mixed_tensors(conv, regions)),
    ):
        dy = random_tensor(n, conv.o, *conv.out_shape()[1:])
        exact, exact_grads = run(oracle, tensors, tuple(tensors), dy.to, torch.float64)
        actual, grads = run(ours, tensors, tuple(tensors), dy.to)
        for a, e in zip((actual, *grads.values()), (exact, *exact_grads.values()), strict=True):
            assert (a.double() - e).norm() <= 1e-5 * max(e.norm(), 1)
