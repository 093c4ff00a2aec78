"""Pixel ops against the dense layer and a mask: values and gradients, every argument."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from pixel_cases import ALL, BACKENDS, CONVS, DTYPES, FEW, MASKS, Conv, check, compare, each, run
from processes import torch_threads
from torch import Tensor

from dynops import PixelPlan, backends, ops
from dynops.geometry import ConvGeometry
from dynops.testing import (
    LAYOUTS,
    assert_within_budget,
    dense_from_rows,
    in_layout,
    random_mask,
    random_tensor,
    rows_at,
)

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------------- dense in, dense out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, about its own copy
@each(ALL)
def test_conv(conv, backend):
    mask = random_mask(conv.out_shape(), 0.4)
    check(conv, backend, mask, conv.tensors(), ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
@each(FEW)
def test_masks(conv, kind, backend):
    mask = random_mask(conv.out_shape(), MASKS[kind], kind)
    check(conv, backend, mask, conv.tensors(), ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(FEW)
def test_dtypes(conv, dtype, backend):
    mask = random_mask(conv.out_shape(), 0.4)
    check(conv, backend, mask, conv.tensors(dtype), ("x", "weight", "bias"))


@pytest.mark.parametrize("kind", MASKS)
@each(FEW)
def test_unnamed_backend(conv, kind):
    mask = random_mask(conv.out_shape(), MASKS[kind], kind)
    tensors = conv.tensors() | {"base": conv.epilogue()["base"]}
    check(conv, None, mask, tensors, ("x", "weight", "bias", "base"), activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@each(FEW)
def test_batch_zero(conv, backend):
    conv = replace(conv, n=0)
    mask = random_mask(conv.out_shape())
    out = check(conv, backend, mask, conv.tensors(), ("x", "weight", "bias"))
    assert out.shape[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each(FEW)
def test_layouts_of_x(conv, layout, backend):
    tensors = conv.tensors()
    tensors["x"] = in_layout(tensors["x"], layout)
    mask = random_mask(conv.out_shape(), 0.4)
    out = check(conv, backend, mask, tensors)
    if layout in ("nchw", "channels_last"):
        same = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert out.is_contiguous(memory_format=same)
    check(conv, backend, mask, tensors, ("x", "weight", "bias"))


@pytest.mark.parametrize("backend", (*BACKENDS, None))
@pytest.mark.parametrize("kind", ["random", "full"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("c", [1, 8])
def test_memory_format_is_kept(c, layout, kind, backend):
    """Also for one channel, where only the strides tell, and whatever the weight's format is."""
    conv = Conv(c=c, padding=1)
    tensors = conv.tensors()
    x, weight = in_layout(tensors["x"], layout), in_layout(tensors["weight"], "channels_last")
    plan = PixelPlan.from_mask(random_mask(conv.out_shape(), 0.5, kind))
    for grad in (False, True):
        weight = weight.detach().requires_grad_(grad)
        out = conv.op(x, weight, None, plan, backend=backend, activation="relu")
        assert out.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert out.is_contiguous() == (layout == "nchw")


# --------------------------------------------------------------------------------- epilogues


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "activation", [None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, backend):
    conv = Conv(c=20, o=24, padding=1)  # sums that reach past 6, where relu6 and hardswish bend
    mask = random_mask(conv.out_shape(), 0.4)
    check(conv, backend, mask, conv.tensors(dtype), activation=activation)
    if dtype == torch.float32:
        check(conv, backend, mask, conv.tensors(dtype), ("x", "weight", "bias"), activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@each({k: ALL[k] for k in ("3x3", "depthwise", "T 2x2 stride 2")})
def test_whole_epilogue(conv, kind, dtype, backend):
    mask = random_mask(conv.out_shape(), MASKS[kind], kind)
    tensors = conv.tensors(dtype) | conv.epilogue(dtype)
    check(conv, backend, mask, tensors, activation="silu")
    if kind != "one" or dtype == torch.float32:  # half-precision sums at one pixel: one number's luck
        check(conv, backend, mask, tensors, tuple(tensors), activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_requires_grad_on_every_subset(activation, backend):
    conv = Conv(c=4, o=6, padding=1, n=1, h=5, w=4)
    tensors = conv.tensors() | conv.epilogue()
    mask = random_mask(conv.out_shape(), 0.5)
    plan = PixelPlan.from_mask(mask)
    dy = random_tensor(*conv.out_shape()[:1], conv.o, *conv.out_shape()[1:])

    def grads_of(function, names, dtype=None):
        return run(function, tensors, names, lambda out: dy.to(out.dtype), dtype)[1]

    def ours(x, weight, bias, **t):
        return conv.op(x, weight, bias, plan, backend=backend, activation=activation, **t)

    def oracle(x, weight, bias, **t):
        return conv.oracle(x, weight, bias, mask, activation=activation, **t)

    exact, dense = grads_of(oracle, tuple(tensors), torch.float64), grads_of(oracle, tuple(tensors))
    subsets = [s for r in range(1, 9) for s in itertools.combinations(tensors, r)]
    assert len(subsets) == 255
    for names in subsets:
        for name, grad in grads_of(ours, names).items():
            assert_within_budget(grad, exact[name], dense[name], f"gradient of {name} of {names}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_gate_and_residual(backend):
    conv = CONVS["3x3"]
    tensors, epilogue = conv.tensors(), conv.epilogue()
    mask = random_mask(conv.out_shape(), 0.4)
    plan = PixelPlan.from_mask(mask)
    epilogue = {k: epilogue[k] for k in ("gate", "residual")}
    rows = {"gate": rows_at(epilogue["gate"], mask)[:, 0], "residual": rows_at(epilogue["residual"], mask)}
    dense = conv.op(**tensors, plan=plan, backend=backend, **epilogue)
    assert torch.equal(conv.op(**tensors, plan=plan, backend=backend, **rows), dense)
    three_d = epilogue | {"gate": epilogue["gate"][:, 0]}
    assert torch.equal(conv.op(**tensors, plan=plan, backend=backend, **three_d), dense)
    compare(
        lambda x, weight, bias, **t: conv.op(x, weight, bias, plan, backend=backend, **t),
        lambda x, weight, bias, gate, residual: conv.oracle(
            x, weight, bias, mask,
            gate=dense_from_rows(gate[:, None], mask), residual=dense_from_rows(residual, mask),
        ),
        tensors | rows,
        (*tensors, *rows),
        backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_norm_on_half_rows(dtype, backend):
    """A folded norm keeps float32 parameters, as a dense BatchNorm does in a half-precision model."""
    conv = CONVS["3x3"]
    tensors, mask = conv.tensors(dtype), random_mask(conv.out_shape(), 0.4)
    norm = {"scale": random_tensor(conv.o), "shift": random_tensor(conv.o)}
    out = conv.op(**tensors, plan=PixelPlan.from_mask(mask), backend=backend, **norm)
    exact = conv.oracle(**{k: v.double() for k, v in (tensors | norm).items()}, mask=mask)
    dense = conv.oracle(**tensors, mask=mask, **{k: v.to(dtype) for k, v in norm.items()})
    assert_within_budget(out, exact, dense)


# ---------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "full"])
@each({k: ALL[k] for k in ("3x3", "depthwise", "T 3x3 stride 2")})
def test_autocast(conv, kind, backend):
    tensors, mask = conv.tensors(), random_mask(conv.out_shape(), 0.4, kind)

    def autocast(function):
        def inside(**leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**leaves)

        return inside

    plan = PixelPlan.from_mask(mask)
    ours = autocast(lambda **t: conv.op(**t, plan=plan, backend=backend if kind == "random" else None))
    oracle = autocast(lambda **t: conv.oracle(**t, mask=mask))
    kept = {}

    def dy_of(out):
        return kept.setdefault("dy", random_tensor(*out.shape, dtype=torch.bfloat16)).to(out.dtype)

    exact, exact_grads = run(
        lambda **t: conv.oracle(**t, mask=mask), tensors, tuple(tensors), dy_of, torch.float64
    )
    dense, dense_grads = run(oracle, tensors, tuple(tensors), dy_of)
    actual, grads = run(ours, tensors, tuple(tensors), dy_of)
    assert actual.dtype == dense.dtype == torch.bfloat16
    assert_within_budget(actual, exact, dense, "output")
    for name in tensors:
        assert_within_budget(grads[name], exact_grads[name], dense_grads[name], f"gradient of {name}")
    with torch.no_grad():
        assert_within_budget(ours(**tensors), exact, dense, "without gradients")


# ------------------------------------------------------------------------- gather and scatter


@pytest.fixture(params=BACKENDS)
def copies(request, monkeypatch):
    """gather and scatter by each backend: they take the binary where it exists."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "has_binary", lambda: False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.bool], ids=str)
def test_gather_pixels(dtype, layout, copies):
    for kind, channels in itertools.product(MASKS, (1, 5, 32)):
        x = in_layout(random_tensor(2, channels, 6, 7).mul(9).to(dtype), layout)
        mask = random_mask((2, 6, 7), MASKS[kind], kind)
        rows = ops.gather_pixels(x, PixelPlan.from_mask(mask))
        assert rows.is_contiguous() and torch.equal(rows, rows_at(x, mask))


@pytest.mark.parametrize("capacity", [None, 6])
def test_gather_pixels_of_no_channels(capacity, copies):
    plan = PixelPlan.from_mask(random_mask((3, 2, 2), 0.4), capacity)
    assert ops.gather_pixels(torch.empty(3, 0, 2, 2), plan).shape == (plan.num_rows, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_scatter_pixels(with_base, dtype, copies):
    for kind, channels, layout in itertools.product(MASKS, (1, 5, 32), ("nchw", "channels_last", "strided")):
        mask = random_mask((2, 6, 7), MASKS[kind], kind)
        rows = random_tensor(int(mask.sum()), 2 * channels, dtype=dtype)[:, ::2]
        base = in_layout(random_tensor(2, channels, 6, 7, dtype=dtype), layout) if with_base else None
        before = None if base is None else base.clone()
        out = ops.scatter_pixels(rows, PixelPlan.from_mask(mask), base)
        expected = dense_from_rows(rows, mask)
        expected = expected if base is None else torch.where(mask[:, None], expected, base)
        assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, expected)
        assert base is None or torch.equal(base, before)  # the base is read, never written


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gather_and_scatter_gradients_are_exact(dtype, copies):
    mask = random_mask((2, 6, 7), 0.4)
    plan = PixelPlan.from_mask(mask)
    x, base, dy = (random_tensor(2, 5, 6, 7, dtype=dtype, ).requires_grad_() for _ in range(3))  # fmt: skip
    rows = random_tensor(len(plan), 5, dtype=dtype).requires_grad_()
    drows = random_tensor(len(plan), 5, dtype=dtype)
    (dx,) = torch.autograd.grad(ops.gather_pixels(x, plan), x, drows)
    assert torch.equal(dx, dense_from_rows(drows, mask))
    grads = torch.autograd.grad(ops.scatter_pixels(rows, plan, base), (rows, base), dy)
    assert torch.equal(grads[0], rows_at(dy, mask))
    assert torch.equal(grads[1], dy.masked_fill(mask[:, None], 0))


def test_capacity_form_of_gather_and_scatter(copies):
    mask = random_mask((2, 6, 7), 0.4)
    exact, (x, base) = PixelPlan.from_mask(mask), random_tensor(2, 2, 5, 6, 7)
    for capacity in (0, 1, len(exact) - 1, len(exact), len(exact) + 5):
        plan = PixelPlan.from_mask(mask, capacity=capacity)
        kept = min(capacity, len(exact))
        rows = ops.gather_pixels(x, plan)
        assert torch.equal(rows[:kept], rows_at(x, mask)[:kept]) and not rows[kept:].any()
        live = PixelPlan(exact.index[:kept], exact.shape).mask()
        rows[kept:] = float("nan")  # what is past the count goes nowhere
        out = ops.scatter_pixels(rows, plan, base)
        assert torch.equal(out, torch.where(live[:, None], x, base))


# -------------------------------------------------------------------------------- packed rows


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
    compare(ours, oracle, tensors, backend=backend)
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
    check(conv, backend, mask, tensors, plan=plan, activation="silu")
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

    compare(ours, oracle, tensors, backend=backend)
    compare(ours, oracle, tensors, tuple(tensors), backend)


# ---------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("name", ["3x3", "uneven dilation, stride 2", "group width 2 to 1", "T uneven", "same, even kernel"])  # fmt: skip
def test_gradcheck(name):
    conv = replace(ALL[name], n=1, h=4, w=5, c=ALL[name].groups, o=ALL[name].groups)
    if name == "uneven dilation, stride 2":
        conv = replace(conv, h=5, w=7)
    plan = PixelPlan.from_mask(random_mask(conv.out_shape(), 0.5))
    assert 0 < len(plan) < plan.num_pixels
    tensors = conv.tensors(torch.float64) | conv.epilogue(torch.float64)
    leaves = [t.clone().requires_grad_() for t in tensors.values()]

    def op(x, weight, bias, *epilogue):
        names = dict(zip(("scale", "shift", "gate", "residual", "base"), epilogue, strict=True))
        return conv.op(x, weight, bias, plan, activation="silu", **names)

    assert torch.autograd.gradcheck(op, leaves)


# ------------------------------------------------------------------------------------ Winograd

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
@pytest.mark.parametrize("threads", [2, 3])
def test_winograd_does_not_depend_on_threads(threads):
    x, weight = random_tensor(1, 300, 24, 25), random_tensor(200, 300, 3, 3)
    plan = PixelPlan.from_mask(blocky_mask(1, 24, 25, "odd corner"))
    with torch_threads(threads):
        several = ops.sparse_conv2d(x, weight, None, plan, padding=1)
    assert torch.equal(several, ops.sparse_conv2d(x, weight, None, plan, padding=1))


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


def test_transposed_1x1_on_packed_rows():
    plan, weight = PixelPlan.full((2, 3, 4)), random_tensor(5, 5, 1, 1)
    rows = random_tensor(24, 5)
    out = ops.packed_conv_transpose2d(rows, weight, None, plan, plan)
    assert (out - rows @ weight[:, :, 0, 0]).norm() <= 1e-6 * out.norm()
