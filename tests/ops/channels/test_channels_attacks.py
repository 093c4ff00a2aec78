"""Channel ops under hostile values, arguments, threads and compilers; properties over any convolution."""

import pytest
import torch
from channel_cases import KINDS, at_channels, channels_of, masked_channel_conv2d, packed, unpacked
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pixel_cases import Conv, compare
from pixel_strategies import SETTINGS, activations, close_to_dense, convs, layouts, seeds
from processes import run_script, torch_threads

from dynops import ChannelPlan, ops
from dynops.testing import available_backends, in_layout, random_tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch's, about its own copy
]

BACKENDS = available_backends()
D = torch.ops.dynops
NAN = float("nan")
SHAPES = {"3x3": Conv(c=24, o=40, padding=1), "1x1": Conv(c=33, o=20, kernel=1), "depthwise": Conv(c=40, o=40, groups=40, padding=1),
          "groups": Conv(c=32, o=48, groups=4, padding=1), "winograd": Conv(c=96, o=80, padding=1, h=15, w=14)}  # fmt: skip
each_shape = pytest.mark.parametrize("conv", list(SHAPES.values()), ids=list(SHAPES))


GROWING_LISTS = """
    import torch
    from dynops import ChannelPlan, ops

    torch.manual_seed(0)
    mask = torch.zeros(4, 256, dtype=torch.bool)
    for n, live in enumerate((64, 128, 200, 256)):
        mask[n, torch.randperm(256)[:live]] = True
    plans = ChannelPlan.from_mask(mask), ChannelPlan.from_mask(torch.rand(4, 256) < 0.6)
    x, weight = torch.randn(4, 256, 7, 7), torch.randn(256, 256, 3, 3)
    for _ in range(2):
        ops.channel_conv2d(x.contiguous(memory_format=torch.channels_last), weight, None, *plans, padding=1, backend="cpp")
    print("alive")
"""


def test_samples_in_turn_may_have_ever_more_channels():
    """Samples that take a large weight in turn wrote to memory that had moved. Here freed memory is unmapped at once."""
    assert run_script(GROWING_LISTS, MALLOC_MMAP_THRESHOLD_="65536").split() == ["alive"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("kinds", [("random", "random"), ("prefix", "prefix"), ("ragged", "shared"), ("capacity", "one")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_shape
def test_dead_channels_are_never_read(conv, dtype, kinds, bad, backend):
    """Neither of x, of the upstream gradient, of a base where it does not show, nor of the scale."""
    (ins, in_mask), (outs, out_mask) = (
        channels_of(kinds[0], conv.n, conv.c),
        channels_of(kinds[1], conv.n, conv.o),
    )
    n, h, w = conv.out_shape()
    clean = conv.tensors(dtype) | {"scale": random_tensor(n, conv.o, dtype=dtype), "base": random_tensor(n, conv.o, h, w, dtype=dtype)}  # fmt: skip
    dirty = dict(clean)
    dirty["x"] = torch.where(at_channels(in_mask), clean["x"], bad).to(dtype)  # in the format of x
    dirty["scale"] = clean["scale"].masked_fill(~out_mask, bad)
    dirty["base"] = clean["base"].masked_fill(at_channels(out_mask), bad)
    results = []
    dy = random_tensor(n, conv.o, h, w, dtype=dtype)
    for tensors in (clean, dirty):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        base, scale = leaves["base"], leaves["scale"]
        arguments = (leaves["x"], leaves["weight"], leaves["bias"], ins, outs)
        out = ops.channel_conv2d(*arguments, base=base, **conv.arguments, backend=backend)
        upstream = dy if tensors is clean else dy.masked_fill(~at_channels(out_mask), bad)
        grads = torch.autograd.grad(out, [leaves[k] for k in ("x", "weight", "bias")], upstream)
        with torch.no_grad():
            fused = ops.channel_conv2d(*arguments, scale=scale, base=base, activation="silu", **conv.arguments, backend=backend)  # fmt: skip
        results.append((out, fused, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])  # which multiplies by zeros
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c, o", [(24, 40), (96, 80)])
def test_a_weight_reaches_exactly_the_samples_that_have_both_its_channels(c, o, dtype, backend):
    conv = Conv(c=c, o=o, padding=1, n=4, h=12, w=11)
    (ins, in_mask), (outs, out_mask) = channels_of("random", 4, c), channels_of("random", 4, o)
    in_mask[:, 5], out_mask[:, 7] = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    ins, outs = ChannelPlan.from_mask(in_mask), ChannelPlan.from_mask(out_mask)
    tensors = conv.tensors(dtype)
    tensors["weight"][7, 5] = NAN
    out = ops.channel_conv2d(**tensors, in_plan=ins, out_plan=outs, padding=1, backend=backend)
    assert out[0, 7].isnan().all() and int(out.isnan().sum()) == out[0, 7].numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_live_channel_spreads_as_in_the_dense_layer(dtype, backend):
    conv = Conv(c=8, o=6, padding=1, h=12, w=12)
    tensors = conv.tensors(dtype)
    tensors["x"][1, 3, 5, 6] = NAN
    outs, out_mask = channels_of("random", 2, 6)
    out = ops.channel_conv2d(
        **tensors, in_plan=ChannelPlan.full(8), out_plan=outs, padding=1, backend=backend
    )
    reached = torch.zeros(2, 6, 12, 12, dtype=torch.bool)
    reached[1, :, 4:7, 5:8] = True
    assert torch.equal(out.isnan(), reached & at_channels(out_mask))


@pytest.mark.parametrize("backend", BACKENDS)
@each_shape
def test_the_number_of_threads_changes_no_gradient_of_a_weight(conv, backend):
    """Nor the values: to rounding in the values, to the bit in the sums of the weight and the bias."""
    (ins, _), (outs, _) = channels_of("random", conv.n, conv.c), channels_of("random", conv.n, conv.o)
    tensors, results = conv.tensors(), []
    n, h, w = conv.out_shape()
    dy = random_tensor(n, conv.o, h, w)
    for threads in (1, 2, 3, 7):
        with torch_threads(threads):
            leaves = [t.detach().requires_grad_() for t in tensors.values()]
            out = ops.channel_conv2d(*leaves, ins, outs, **conv.arguments, backend=backend)
            results.append((out, *torch.autograd.grad(out, leaves, dy)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
        if backend == "cpp":
            assert torch.equal(result[2], results[0][2]) and torch.equal(result[3], results[0][3])


X, W, B = random_tensor(2, 6, 9, 8), random_tensor(4, 6, 3, 3), random_tensor(4)
INS, OUTS = ChannelPlan.from_mask(torch.rand(2, 6) < 0.5), ChannelPlan.from_mask(torch.rand(2, 4) < 0.5)
HEADS = ChannelPlan.from_mask(torch.rand(2, 3, 6) < 0.5)


def refused(error, match, x=X, weight=W, bias=B, in_plan=INS, out_plan=OUTS, op=ops.channel_conv2d, **rest):
    return pytest.param(
        error, match, op, (x, weight, bias, in_plan, out_plan), rest, id=f"{match}-{len(rest)}"
    )


@pytest.mark.parametrize("error, match, op, arguments, rest", [
    refused(TypeError, r"x: expected a floating dtype, got torch.int64", x=X.long()),
    refused(ValueError, r"x: expected 6 channels.*got 5", x=X[:, :5]),
    refused(TypeError, r"weight: expected x's dtype torch.float32, got torch.bfloat16", weight=W.bfloat16()),
    refused(TypeError, r"in_plan: expected a ChannelPlan.*Tensor", in_plan=INS.mask()),
    refused(TypeError, r"out_plan: expected a ChannelPlan.*list", out_plan=[1]),
    refused(ValueError, r"x: expected 5 channels, as in_plan has them, got 6", in_plan=ChannelPlan.full(5)),
    refused(ValueError, r"in_plan: expected a list for each of 2 samples, got 3", in_plan=ChannelPlan.prefix([1, 2, 3], 6)),
    refused(ValueError, r"out_plan: expected one of 4 channels.*got 5", out_plan=ChannelPlan.full(5)),
    refused(ValueError, r"out_plan: expected a list for each of 2 samples, got 1", out_plan=ChannelPlan.prefix([1], 4)),
    refused(ValueError, r"in_plan: expected 3 heads to divide the 4 output", in_plan=HEADS),
    refused(ValueError, r"out_plan: .*without heads.*2 heads", out_plan=ChannelPlan.from_mask(torch.ones(2, 2, 4))),
    refused(ValueError, r"groups: .*5", in_plan=None, groups=5),
    refused(ValueError, r"activation: .*tanh", activation="tanh"),
    refused(ValueError, r"scale: expected shape \(2, 4\), got \(2, 6\)", scale=torch.ones(2, 6)),
    refused(ValueError, r"base: expected the output's shape \(2, 4, 7, 6\), got \(2, 4, 9, 8\)", base=torch.ones(2, 4, 9, 8)),
    refused(TypeError, r"base: .*float32.*float64", base=torch.ones(2, 4, 7, 6).double()),
    refused(ValueError, r"x: expected \d channels, as in_plan has them, got 6", op=ops.packed_channel_conv2d,
            in_plan=ChannelPlan.from_mask(torch.ones(2, 6), 4)),
    refused(ValueError, r"in_plan: .*a packed input", op=ops.packed_channel_conv2d, in_plan=ChannelPlan.from_mask(torch.ones(2, 2, 6))),
    refused(ValueError, r"weight: .*\[O, I\]", op=ops.channel_linear),
])  # fmt: skip
def test_refusals(error, match, op, arguments, rest):
    with pytest.raises(error, match=match):
        op(*arguments, **rest)


@pytest.mark.parametrize("error, match, run", [
    (ValueError, r"x: expected 6 channels, as plan has them, got 5", lambda: ops.gather_channels(X[:, :5], INS)),
    (ValueError, r"plan: expected a list for each of 1 samples, got 2", lambda: ops.gather_channels(X[:1], INS)),
    (TypeError, r"x: expected a floating dtype", lambda: ops.gather_channels(X.long(), INS)),
    (ValueError, r"plan: expected a plan with one list a sample, got 3 heads", lambda: ops.gather_channels(X, HEADS)),
    (TypeError, r"plan: expected a ChannelPlan", lambda: ops.scatter_channels(X, None)),
    (ValueError, r"packed: expected \d channels, as plan has them, got 6", lambda: ops.scatter_channels(X, ChannelPlan.prefix([1, 2], 6))),
    (ValueError, r"base: expected the output's shape", lambda: ops.scatter_channels(X[:, :2], ChannelPlan.prefix([1, 2], 6), X[:, :3])),
    (TypeError, r"base: .*float64", lambda: ops.scatter_channels(X[:, :2], ChannelPlan.prefix([1, 2], 6), X.double())),
])  # fmt: skip
def test_refusals_of_copies(error, match, run):
    with pytest.raises(error, match=match):
        run()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the last guard is the binary's")
@pytest.mark.parametrize("index, count", [([[0, 6]], 2), ([[-1, 2]], 2), ([[3, 3]], 2), ([[4, 1]], 2), ([[0, 1]], 3), ([[0, 1]], -1)])  # fmt: skip
def test_no_wrong_index_reaches_a_kernel(index, count):
    index, count = torch.tensor(index, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    x, weight, dy, packed = X[:1], random_tensor(6, 6, 1, 1), X[:1], X[:1, :2]
    g = [1, 9, 8, 9, 8, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    none = (None, None)
    for lists in ((index, count, *none), (*none, index, count)):
        calls = (
            lambda lists=lists: D.channel_conv(x, weight, None, *lists, g, 1, "", None, None, False, -1, "cpp"),
            lambda lists=lists: D.channel_conv_input_grad(dy, weight, *lists, g, 1, -1, False, "cpp"),
            lambda lists=lists: D.channel_conv_weight_grad(dy, x, *lists, [6, 6, 1, 1], g, 1, False, False, True, "cpp"),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(RuntimeError, match=r"index|count"):
                call()
    for call in (
        lambda: D.gather_channels(x, index, count, 2),
        lambda: D.scatter_channels(packed, index, count, 6, None),
        lambda: D.channel_mask(index, count, 6),
    ):
        with pytest.raises(RuntimeError, match=r"index|count"):
            call()


kinds = st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_in_dense_out(backend):
    @settings(SETTINGS, max_examples=80)
    @given(
        convs(False),
        kinds,
        layouts,
        activations,
        st.sets(st.sampled_from(["bias", "scale", "base", "grads"])),
        seeds,
    )
    def property_holds(conv, kinds, layout, activation, given, seed):
        torch.manual_seed(seed)
        (ins, in_mask), (outs, out_mask) = (
            channels_of(kinds[0], conv.n, conv.c),
            channels_of(kinds[1], conv.n, conv.o),
        )
        n, h, w = conv.out_shape()
        tensors = conv.tensors(bias="bias" in given)
        tensors["x"] = in_layout(tensors["x"], layout)
        extra = {"scale": random_tensor(n, conv.o), "base": random_tensor(n, conv.o, h, w)}
        tensors |= {k: v for k, v in extra.items() if k in given}
        grads = tuple(k for k, v in tensors.items() if v is not None) if "grads" in given else ()

        def ours(x, weight, bias, **t):
            return ops.channel_conv2d(x, weight, bias, ins, outs, activation=activation, backend=backend, **conv.arguments, **t)  # fmt: skip

        def oracle(x, weight, bias, **t):
            return masked_channel_conv2d(x, weight, bias, in_mask, out_mask, activation=activation, **conv.arguments, **t)  # fmt: skip

        close_to_dense(lambda: compare(ours, oracle, tensors, grads))

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_in_packed_out(backend):
    @SETTINGS
    @given(convs(False), kinds, st.booleans(), seeds)
    def property_holds(conv, kinds, training, seed):
        assume("every" not in kinds)
        torch.manual_seed(seed)
        (ins, in_mask), (outs, out_mask) = (
            channels_of(kinds[0], conv.n, conv.c),
            channels_of(kinds[1], conv.n, conv.o),
        )
        tensors = conv.tensors()
        tensors["x"] = packed(tensors["x"], in_mask, ins.width)

        def ours(x, weight, bias):
            return ops.packed_channel_conv2d(x, weight, bias, ins, outs, backend=backend, **conv.arguments)

        def oracle(x, weight, bias):
            out = masked_channel_conv2d(
                unpacked(x, in_mask), weight, bias, in_mask, out_mask, **conv.arguments
            )
            return packed(out, out_mask, outs.width)

        close_to_dense(lambda: compare(ours, oracle, tensors, tuple(tensors) if training else ()))

    property_holds()
