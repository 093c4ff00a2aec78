"""Pixel ops against the dense layer and a mask: values and gradients, every argument."""

import itertools
from dataclasses import replace

import pytest
import torch
from pixel_cases import (
    ACTIVATIONS,
    ALL,
    BACKENDS,
    CONVS,
    DTYPES,
    FEW,
    MASKS,
    Conv,
    assert_format,
    check,
    compare,
    each,
    run,
)

from dynops import PixelPlan, backends, ops
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
@pytest.mark.parametrize("layout", LAYOUTS)
@each(FEW)
def test_layouts_of_x(conv, layout, backend):
    tensors = conv.tensors()
    tensors["x"] = in_layout(tensors["x"], layout)
    mask = random_mask(conv.out_shape(), 0.4)
    assert_format(check(conv, backend, mask, tensors, ("x", "weight", "bias")), layout)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, backend):
    conv = Conv(c=20, o=24, padding=1)  # sums that reach past 6, where relu6 and hardswish bend
    mask = random_mask(conv.out_shape(), 0.4)
    grads = ("x", "weight", "bias") if dtype == torch.float32 else ()
    check(conv, backend, mask, conv.tensors(dtype), grads, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@each({k: ALL[k] for k in ("3x3", "depthwise", "T 2x2 stride 2")})
def test_whole_epilogue(conv, kind, dtype, backend):
    mask = random_mask(conv.out_shape(), MASKS[kind], kind)
    tensors = conv.tensors(dtype) | conv.epilogue(dtype)
    lucky = kind == "one" and dtype != torch.float32  # half-precision sums at one pixel: one number's luck
    check(conv, backend, mask, tensors, () if lucky else tuple(tensors), activation="silu")


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


def test_transposed_1x1_on_packed_rows():
    plan, weight = PixelPlan.full((2, 3, 4)), random_tensor(5, 5, 1, 1)
    rows = random_tensor(24, 5)
    out = ops.packed_conv_transpose2d(rows, weight, None, plan, plan)
    assert (out - rows @ weight[:, :, 0, 0]).norm() <= 1e-6 * out.norm()
