"""Channel ops against the dense layer and masks: values and gradients, every argument."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from channel_cases import (
    KINDS,
    at_channels,
    channels_of,
    masked_channel_conv2d,
    packed,
    packed_slots,
    unpacked,
)
from pixel_cases import ACTIVATIONS, BACKENDS, CONVS, DTYPES, Conv, assert_format, compare, each
from torch import Tensor

from dynops import ChannelPlan, backends, ops
from dynops.testing import LAYOUTS, in_layout, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")
FEW = {k: CONVS[k] for k in ("3x3", "1x1", "7x7 stride 2, 3 channels", "depthwise", "group width 3", "odd wide", "winograd")}  # fmt: skip


def extras(conv: Conv, dtype=torch.float32) -> dict[str, Tensor]:
    n, h, w = conv.out_shape()
    return {
        "scale": random_tensor(n, conv.o, dtype=dtype),
        "base": random_tensor(n, conv.o, h, w, dtype=dtype),
    }


def check(conv: Conv, backend, ins, outs, tensors, grads=(), **rest) -> Tensor:
    """Values and gradients of ``channel_conv2d``; ``ins`` and ``outs`` are plans and their masks."""
    (in_plan, in_mask), (out_plan, out_mask) = ins, outs
    return compare(
        lambda x, weight, bias, **t: ops.channel_conv2d(
            x, weight, bias, in_plan, out_plan, **conv.arguments, backend=backend, **t, **rest
        ),
        lambda x, weight, bias, **t: masked_channel_conv2d(
            x, weight, bias, in_mask, out_mask, **conv.arguments, **t, **rest
        ),
        tensors,
        grads,
        backend,
    )


def both(conv: Conv, in_kind="random", out_kind="random"):
    return channels_of(in_kind, conv.n, conv.c), channels_of(out_kind, conv.n, conv.o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, about its own copy
@each(CONVS)
def test_conv(conv, backend):
    check(conv, backend, *both(conv), conv.tensors(), ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [("ragged", "ragged"), ("prefix", "prefix"), ("shared", "shared"), ("none", "random"),
                                   ("random", "none"), ("one", "all"), ("every", "random"), ("random", "every")],
                         ids="-".join)  # fmt: skip
@each(FEW)
def test_plans(conv, kinds, backend):
    conv = replace(conv, n=3)
    check(conv, backend, *both(conv, *kinds), conv.tensors(), ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_dtypes(conv, dtype, backend):
    check(conv, backend, *both(conv), conv.tensors(dtype), ("x", "weight", "bias"))
    check(conv, backend, *both(conv, "prefix", "shared prefix"), conv.tensors(dtype), ("x", "weight", "bias"))


@pytest.mark.parametrize(
    "kinds", [("random", "random"), ("every", "every"), ("all", "all"), ("all", "random")]
)
@each(FEW)
def test_unnamed_backend(conv, kinds):
    tensors = conv.tensors() | extras(conv)
    check(conv, None, *both(conv, *kinds), tensors, tuple(tensors), activation="silu")
    del tensors["scale"]
    check(conv, None, *both(conv, *kinds), tensors, tuple(tensors), activation="silu")


@pytest.mark.parametrize("backend", (*BACKENDS, None))
@pytest.mark.parametrize("kind", ["every", "random", "shared", "prefix"])
@each(FEW)
def test_batch_zero(conv, kind, backend):
    conv = replace(conv, n=0)
    out = check(conv, backend, *both(conv, kind, kind), conv.tensors(), ("x", "weight", "bias"))
    assert out.shape[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each(FEW)
def test_layouts_of_x(conv, layout, backend):
    tensors = conv.tensors()
    tensors["x"] = in_layout(tensors["x"], layout)
    assert_format(check(conv, backend, *both(conv), tensors, ("x", "weight", "bias")), layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, backend):
    conv = Conv(c=40, o=24, padding=1)  # sums that reach past 6, where relu6 and hardswish bend
    grads = ("x", "weight", "bias") if dtype == torch.float32 else ()
    check(conv, backend, *both(conv), conv.tensors(dtype), grads, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("scale",), ("base",), ("scale", "base")], ids="-".join)
@pytest.mark.parametrize("activation", [None, "silu"])
@each({k: FEW[k] for k in ("3x3", "1x1", "depthwise", "group width 3", "winograd")})
def test_scale_and_base(conv, activation, names, dtype, backend):
    tensors = conv.tensors(dtype) | {k: v for k, v in extras(conv, dtype).items() if k in names}
    check(conv, backend, *both(conv), tensors, tuple(tensors), activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_requires_grad_on_every_subset(activation, backend):
    conv = Conv(c=8, o=24, padding=1, h=7, w=6)
    tensors, ins_outs = conv.tensors() | extras(conv), both(conv, "ragged", "random")
    subsets = [s for r in range(1, 6) for s in itertools.combinations(tensors, r)]
    assert len(subsets) == 31
    for names in subsets:
        check(conv, backend, *ins_outs, tensors, names, activation=activation)


HEADED = {
    "3x3": Conv(c=10, o=12, padding=1, n=3),
    "1x1": Conv(c=33, o=40, kernel=1),
    "stride 2": Conv(c=12, o=8, padding=1, stride=2),
    "winograd": Conv(c=72, o=136, padding=1, h=14, w=15),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("out_kind", ["every", "random", "prefix", "none"])
@each(HEADED)
def test_heads(conv, out_kind, heads, dtype, backend):
    mask = torch.rand(conv.n, heads, conv.c) < 0.5
    ins = ChannelPlan.from_mask(mask), mask
    assert ins[0].heads == heads
    outs = channels_of(out_kind, conv.n, conv.o)
    tensors = conv.tensors(dtype) | {"scale": extras(conv, dtype)["scale"]}
    check(conv, backend, ins, outs, tensors, tuple(tensors) if dtype == torch.float32 else ())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [None, 3])
def test_heads_without_and_with_all_inputs(capacity, backend):
    conv = HEADED["3x3"]
    mask = torch.zeros(3, 2, 10, dtype=torch.bool)
    mask[0, 0], mask[1], mask[2, 1, 4] = True, True, True
    live = mask if capacity is None else mask & (mask.cumsum(2) <= capacity)
    ins = ChannelPlan.from_mask(mask, capacity), live
    check(conv, backend, ins, channels_of("every", 3, 12), conv.tensors(), ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("random", "random"), ("every", "random"), ("random", "every"), ("ragged", "ragged"),
                                   ("capacity", "wide capacity"), ("wide capacity", "capacity"), ("prefix", "prefix"),
                                   ("shared", "shared"), ("none", "none"), ("all", "all")], ids="-".join)  # fmt: skip
@each({k: FEW[k] for k in ("3x3", "1x1", "depthwise", "group width 3", "winograd")})
def test_packed(conv, kinds, dtype, backend):
    conv = replace(conv, n=3)
    (in_plan, in_mask), (out_plan, out_mask) = both(conv, *kinds)
    tensors = conv.tensors(dtype) | {"scale": random_tensor(conv.n, conv.o, dtype=dtype)}
    if in_plan is not None:
        rows = packed(tensors["x"], in_mask, in_plan.width)
        live = at_channels(packed_slots(in_mask, in_plan.width))
        tensors["x"] = in_layout(rows.masked_fill(~live, float("nan")), "channels_last")
    arguments = {k: v for k, v in conv.arguments.items() if k != "padding_mode"}

    def ours(x, weight, bias, scale):
        return ops.packed_channel_conv2d(
            x, weight, bias, in_plan, out_plan, scale=scale, activation="silu", backend=backend, **arguments
        )

    def oracle(x, weight, bias, scale):
        x = x if in_plan is None else unpacked(x, in_mask)
        out = masked_channel_conv2d(
            x, weight, bias, in_mask, out_mask, scale=scale, activation="silu", **arguments
        )
        return out if out_plan is None else packed(out, out_mask, out_plan.width)

    compare(ours, oracle, tensors, tuple(tensors) if dtype == torch.float32 else (), backend)


@pytest.mark.parametrize("backend", (*BACKENDS, None))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_packed_chain(layout, backend):
    """Two layers that stay compact, between a gather and a scatter, as the masked dense ones."""
    n, c, o, h = 3, 16, 24, 9
    (ins, in_mask), (inner, inner_mask), (outs, out_mask) = (channels_of("random", n, k) for k in (c, o, c))
    tensors = {
        "x": in_layout(random_tensor(n, c, h, h), layout),
        "w1": random_tensor(o, c, 3, 3),
        "w2": random_tensor(c, o, 1, 1),
        "scale": random_tensor(n, o),
        "base": random_tensor(n, c, h, h),
    }

    def ours(x, w1, w2, scale, base):
        rows = ops.gather_channels(x, ins)
        rows = ops.packed_channel_conv2d(rows, w1, None, ins, inner, padding=1, scale=scale, activation="relu", backend=backend)  # fmt: skip
        rows = ops.packed_channel_conv2d(rows, w2, None, inner, outs, backend=backend)
        return ops.scatter_channels(rows, outs, base)

    def oracle(x, w1, w2, scale, base):
        y = masked_channel_conv2d(x, w1, None, in_mask, inner_mask, padding=1, scale=scale, activation="relu")
        return masked_channel_conv2d(y, w2, None, inner_mask, out_mask, base=base)

    assert_format(compare(ours, oracle, tensors, tuple(tensors), backend), layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 7), (2, 4, 5), (0,), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("kinds", [("random", "random"), ("every", "prefix"), ("ragged", "every"), ("shared", "all")], ids="-".join)  # fmt: skip
def test_linear(kinds, shape, dtype, backend):
    n, i, o = shape[0], 24, 37
    (in_plan, in_mask), (out_plan, out_mask) = channels_of(kinds[0], n, i), channels_of(kinds[1], n, o)
    spread = (n, *[1] * (len(shape) - 1), -1)
    in_live, out_live = in_mask.reshape(n, *spread[1:-1], i), out_mask.reshape(n, *spread[1:-1], o)
    tensors = {
        "x": random_tensor(*shape, i, dtype=dtype),
        "weight": random_tensor(o, i, dtype=dtype),
        "bias": random_tensor(o, dtype=dtype),
        "scale": random_tensor(n, o, dtype=dtype),
        "base": random_tensor(*shape, o, dtype=dtype),
    }

    def ours(x, weight, bias, scale, base):
        return ops.channel_linear(
            x, weight, bias, in_plan, out_plan, scale=scale, base=base, activation="silu", backend=backend
        )

    def oracle(x, weight, bias, scale, base):
        z = F.linear(torch.where(in_live, x, 0), weight, bias) * scale.view(n, *spread[1:-1], o)
        return torch.where(out_live, z * torch.sigmoid(z), base)

    out = compare(ours, oracle, tensors, tuple(tensors) if dtype == torch.float32 else (), backend)
    assert out.is_contiguous()


@pytest.fixture(params=BACKENDS)
def copies(request, monkeypatch):
    """gather and scatter by each backend: they take the binary where it exists."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "_C", None)


SHAPES = ((), (6,), (6, 7), (1, 1), (2, 3, 4), (0, 3))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_and_scatter(shape, dtype, copies):
    for kind, c in itertools.product(KINDS[1:], (1, 5, 16, 70)):
        plan, mask = channels_of(kind, 3, c)
        x, base = random_tensor(2, 3, c, *shape, dtype=dtype)
        rows = ops.gather_channels(x, plan)
        assert torch.equal(rows, packed(x, mask, plan.width)), kind
        spread = mask.view(3, c, *[1] * len(shape))
        assert torch.equal(ops.scatter_channels(rows, plan), x.masked_fill(~spread, 0)), kind
        assert torch.equal(ops.scatter_channels(rows, plan, base), torch.where(spread, x, base)), kind


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_layouts(layout, dtype, copies):
    for kind, c in itertools.product(("random", "ragged", "prefix", "shared", "capacity"), (1, 5, 33)):
        plan, mask = channels_of(kind, 2, c)
        x = in_layout(random_tensor(2, c, 6, 7, dtype=dtype), layout)
        base = in_layout(random_tensor(2, c, 6, 7, dtype=dtype), layout)
        x_before, base_before = x.clone(), base.clone()
        rows = ops.gather_channels(x, plan)
        assert torch.equal(rows, packed(x, mask, plan.width))
        for given in (rows, in_layout(rows, layout if layout in ("nchw", "strided") else "channels_last")):
            out = ops.scatter_channels(given, plan, base)
            assert torch.equal(out, torch.where(at_channels(mask), x, base))
        assert torch.equal(x, x_before) and torch.equal(base, base_before)  # read, never written
        assert_format(rows, layout)
        assert_format(ops.scatter_channels(in_layout(rows, layout), plan), layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", ["random", "ragged", "capacity", "wide capacity", "shared"])
def test_gather_and_scatter_gradients_are_exact(kind, layout, copies):
    plan, mask = channels_of(kind, 3, 20)
    x, base, dy = (in_layout(random_tensor(3, 20, 6, 7), layout).requires_grad_() for _ in range(3))
    rows = packed(random_tensor(3, 20, 6, 7), mask, plan.width).requires_grad_()
    drows = random_tensor(*rows.shape)
    (dx,) = torch.autograd.grad(ops.gather_channels(x, plan), x, drows)
    assert torch.equal(dx, unpacked(drows, mask))
    grads = torch.autograd.grad(ops.scatter_channels(rows, plan, base), (rows, base), dy)
    assert torch.equal(grads[0], packed(dy, mask, plan.width))
    assert torch.equal(grads[1], dy.masked_fill(at_channels(mask), 0))


def test_what_is_past_the_count_goes_nowhere(copies):
    plan, mask = channels_of("ragged", 3, 20)
    rows = torch.full((3, plan.width, 4, 5), float("nan"))
    rows = torch.where(at_channels(packed_slots(mask, plan.width)), random_tensor(*rows.shape), rows)
    assert torch.equal(ops.scatter_channels(rows, plan), unpacked(rows, mask))
