"""The dense layer where a plan is denser than a measured break-even, by the same values and gradients."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynops import BlockPlan, PixelPlan, backends, ops
from dynops.kernels import configs
from dynops.nn import SparseBlocks, SparseConv2d
from dynops.nn.blocks import sparse_blocks as blocks
from dynops.ops import dense_fallback
from dynops.ops.pixels import conv as pixels
from dynops.stack import traced
from dynops.stack.traced import Traced
from dynops.testing import assert_within_budget, dense_masked_conv2d, in_layout, random_mask, random_tensor


def config(**shares: float) -> configs.Config:
    """A config that says of every kind and form near these sizes how dense a plan must be for the dense layer."""
    forms = itertools.product(("half", "tf32", "ieee"), ("conv", "depthwise"), (1, 9))
    sizes = {"inputs": 16, "outputs": 16, "pixels": 256, "shares": shares}
    return configs.Config(
        {}, [], [{"kind": kind, "form": form, "taps": t, **sizes} for kind, form, t in forms]
    )


@pytest.fixture
def ran(monkeypatch):
    """Which of the paths ran."""
    log = []
    for module, name in (
        (dense_fallback, "dense_layer"),
        (pixels, "_pixel_conv"),
        (traced, "run_rows"),
        (blocks, "run_tiles"),
    ):
        original = getattr(module, name)

        def logged(*args, original=original, name=name):
            log.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, logged)
    return log


FUSED = ("scale", "shift", "gate", "residual", "base")


def case(dtype=torch.float32, density=0.8, n=2, c=16, o=24, size=12, groups=1, names=FUSED):
    """x, weight, bias, a plan, and keyword arguments of every kind that needs a gradient."""
    mask = random_mask((n, size, size), density)
    maps = {"scale": (o,), "shift": (o,), "gate": (n, 1, size, size), "residual": (n, o, size, size), "base": (n, o, size, size)}  # fmt: skip
    fused = {name: random_tensor(*maps[name], dtype=dtype) for name in names}
    tensors = random_tensor(n, c, size, size, dtype=dtype), random_tensor(o, c // groups, 3, 3, dtype=dtype)
    return (*tensors, random_tensor(o, dtype=dtype)), mask, fused


def gradients(run, tensors, fused, dy):
    """The result and the gradients of every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *fused.values())]
    out = run(*leaves[:3], **dict(zip(fused, leaves[3:], strict=True)))
    return [out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("names", [(), ("base",), ("gate", "residual"), FUSED], ids="+".join)
def test_both_paths_are_one_function(names, activation, layout, ran):
    """Values and the gradient of every argument, each within the budget of the dense layer's own error."""
    tensors, mask, fused = case(names=names)
    plan, dy = PixelPlan.from_mask(mask), random_tensor(2, 24, 12, 12)
    tensors = (tensors[0].contiguous(memory_format=layout), *tensors[1:])

    def ours(x, weight, bias, **arguments):
        return ops.sparse_conv2d(x, weight, bias, plan, padding=1, activation=activation, **arguments)

    def oracle(x, weight, bias, **arguments):
        return dense_masked_conv2d(x, weight, bias, mask, padding=1, activation=activation, **arguments)

    double = [t.double() for t in tensors], {name: t.double() for name, t in fused.items()}
    exact, dense = gradients(oracle, *double, dy), gradients(oracle, tensors, fused, dy)
    for share, path in ((0.3, "dense_layer"), (1.0, "_pixel_conv")):
        ran.clear()
        with configs.use("cpu", config(pixels=share)):
            actual = gradients(ours, tensors, fused, dy)
            with torch.no_grad():
                forward = ours(*tensors, **fused)
        assert set(ran) == {path}
        assert actual[0].is_contiguous(memory_format=layout) and forward.is_contiguous(memory_format=layout)
        assert_within_budget(forward, exact[0], dense[0].detach(), f"{path} without gradients")
        for name, *values in zip(("out", "x", "weight", "bias", *fused), actual, exact, dense, strict=True):
            assert_within_budget(values[0], values[1].detach(), values[2].detach(), f"{path} {name}")


def test_infinities_elsewhere_stay_there():
    """What overflows at inactive pixels is in no gradient."""
    (x, weight, bias), mask, fused = case(torch.float16, names=("scale", "gate"))
    mask[:] = True
    mask[:, 4:9, 4:9] = False
    x[:, :, 6, 6] = 60000.0  # only inactive pixels read it
    with configs.use("cpu", config(pixels=0.1)):
        run = lambda *args, **kw: ops.sparse_conv2d(*args, PixelPlan.from_mask(mask), padding=1, activation="silu", **kw)  # noqa: E731  # fmt: skip
        for value in gradients(run, (x, weight, bias), fused, random_tensor(2, 24, 12, 12)):
            assert value.isfinite().all()


@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_few_channels_on_a_gpu_take_the_reference(packed, capacity, monkeypatch):
    """Without a name neither the convolution nor a gradient of it is a kernel of ours."""
    tensors, mask, fused = case(c=3, names=("scale", "residual"))
    plan = PixelPlan.from_mask(mask, capacity)

    def ours(x, weight, bias, backend=None):
        given = {"padding": 1, "backend": backend, **fused}
        if packed:
            return ops.scatter_pixels(ops.packed_conv2d(x, weight, bias, None, plan, **given), plan)
        return ops.sparse_conv2d(x, weight, bias, plan, **given)

    def dense(x, weight, bias):
        scale, residual = (t.to(x.dtype) for t in fused.values())
        out = nn.functional.conv2d(x, weight, bias, padding=1) * scale[:, None, None] + residual
        return torch.where(plan.mask()[:, None], out, 0)

    def run(call, tensors, *options):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = call(*leaves, *options)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    rule = dense_fallback.is_thin
    monkeypatch.setattr(
        dense_fallback, "is_thin", lambda x, *given: rule(SimpleNamespace(is_cuda=True), *given)
    )
    monkeypatch.setattr(pixels._KERNELS, "of", lambda backend, x: SimpleNamespace())  # without any kernel
    exact = run(dense, [t.double() for t in tensors])
    for value in zip(run(ours, tensors), exact, run(dense, tensors), strict=True):
        assert_within_budget(*value)
    with pytest.raises(AttributeError, match="conv"):
        run(ours, tensors, "triton")
    with pytest.raises(AttributeError, match="conv"):
        run(ours, case()[0])


def test_who_decides(ran):
    """A named backend, a capacity plan, a float64 input and a plan below the break-even are not the dense layer's."""
    (x, weight, bias), mask, _ = case()
    plan, sparse = PixelPlan.from_mask(mask), PixelPlan.from_mask(random_mask(mask.shape, 0.2))

    def path(x=x, weight=weight, bias=bias, plan=plan, **options):
        ran.clear()
        ops.sparse_conv2d(x, weight, bias, plan, padding=1, **options)
        return ran[-1]

    with configs.use("cpu", config(pixels=0.5, full=0.9)):
        assert path() == "dense_layer"
        assert path(plan=sparse) == "_pixel_conv"
        assert path(plan=PixelPlan.full(plan.shape)) == "dense_layer"
        assert path(plan=PixelPlan.from_mask(mask, capacity=mask.numel())) == "_pixel_conv"
        assert path(backend="reference") == "_pixel_conv"
        assert path(x.double(), weight.double(), bias.double()) == "_pixel_conv"
        layer = SparseConv2d(16, 24, 3, padding=1)
        ran.clear()
        layer(x, mask)
        assert ran == ["dense_layer"]
    with configs.use("cpu", config(pixels=0.5, full=1.0)):  # measured: the op wins even where a plan is full
        assert path(plan=PixelPlan.full(plan.shape)) == "_pixel_conv"
    assert path() == "_pixel_conv"


def test_depthwise_and_groups(ran):
    """Depthwise has a form of its own; other groups were not measured."""
    with configs.use("cpu", config(pixels=0.5)):
        for groups, path in ((16, "dense_layer"), (4, "_pixel_conv")):
            (x, weight, bias), mask, _ = case(o=16, groups=groups)
            ran.clear()
            ops.sparse_conv2d(x, weight, bias, PixelPlan.from_mask(mask), padding=1, groups=groups)
            assert ran == [path]


def test_compiled_without_a_break(ran):
    """A compiler traces no choice by density."""
    (x, weight, bias), mask, _ = case()
    plan = PixelPlan.from_mask(mask)

    def run(x):
        return ops.sparse_conv2d(x, weight, bias, plan, padding=1)

    with configs.use("cpu", config(pixels=0.5)):
        compiled = torch.compile(run, backend="eager", fullgraph=True)(x)
    assert (compiled - run(x)).norm() <= 1e-5 * compiled.norm()


def stack() -> nn.Module:
    layers = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
    return nn.Sequential(*layers).eval()


def block_mask(blocks: int) -> torch.Tensor:
    mask = torch.zeros(2, 1, 16, 16)
    for i in range(blocks):
        mask[i // 16, 0, i % 16 // 4 * 4, i % 4 * 4] = 1
    return mask


@pytest.mark.parametrize(
    "shares, active, expected",
    [
        ({"rows": 0.9, "tiles": 0.7}, 12, "run_rows"),
        ({"rows": 0.5, "tiles": 0.7}, 12, "run_tiles"),
        ({"rows": 0.5, "tiles": 0.7}, 30, None),
        ({"rows": 0.95, "tiles": 0.7}, 30, "run_rows"),
        ({"rows": 0.95, "tiles": 0.7}, 32, None),
        ({"rows": 0.9}, 30, "run_rows"),  # tiles were not measured: as without a table
        (None, 30, "run_rows"),
        (None, 32, "either"),
    ],
)  # fmt: skip
@pytest.mark.skipif(not backends.has_binary(), reason="rows run on the binary")
def test_blocks_take_the_cheapest_path(shares, active, expected, ran):
    module, x = stack(), random_tensor(2, 8, 16, 16)
    layer = SparseBlocks(module, 4)
    mask, base = block_mask(active), random_tensor(2, 8, 16, 16)
    with configs.use("cpu", None if shares is None else config(**shares)), torch.no_grad():
        out = layer(x, mask, base)
        plan = BlockPlan.from_mask(mask, 4)
        exact = torch.where(plan.mask()[:, None], module.double()(x.double()), base.double())
        dense = torch.where(plan.mask()[:, None], module.float()(x), base)
    paths = [name for name in ran if name.startswith("run")]
    assert expected == "either" or paths == ([] if expected is None else [expected])
    assert_within_budget(out, exact, dense)


@pytest.mark.skipif(not backends.has_binary(), reason="rows run on the binary")
def test_gradients_of_blocks_are_those_of_every_path(ran):
    module, x, dy = stack(), random_tensor(2, 8, 16, 16).requires_grad_(), random_tensor(2, 8, 16, 16)
    base = random_tensor(2, 8, 16, 16).requires_grad_()
    leaves, found = [x, base, *module.parameters()], {}
    for shares in ({"rows": 1.0, "tiles": 0.1}, {"rows": 0.1, "tiles": 1.0}, {"rows": 0.1, "tiles": 0.1}):
        with configs.use("cpu", config(**shares)):
            ran.clear()
            out = SparseBlocks(module, 4)(x, block_mask(20), base)
        found[tuple(n for n in ran if n.startswith("run"))] = [out, *torch.autograd.grad(out, leaves, dy)]
    rows, tiles, dense = (found[path] for path in (("run_rows",), ("run_tiles",), ()))
    for other in (rows, tiles):
        for a, b in zip(dense, other, strict=True):
            assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.skipif(not backends.has_binary(), reason="rows run on the binary")
def test_a_named_path_of_blocks_is_used(ran):
    x, mask = random_tensor(2, 8, 16, 16), block_mask(32)
    for path in ("rows", "tiles"):
        with configs.use("cpu", config(rows=0.1, tiles=0.1)), torch.no_grad():
            ran.clear()
            SparseBlocks(stack(), 4, path)(x, mask)
        assert f"run_{path}" in ran


def test_the_halo_is_counted():
    """A 3x3 convolution before another computes 6x6 pixels for a block of 4x4."""
    conv = nn.Conv2d(16, 16, 3, padding=1)
    bound, plan = (
        Traced(nn.Sequential(conv, nn.Conv2d(16, 16, 3, padding=1))),
        BlockPlan.from_mask(block_mask(16), 4),
    )
    arguments = (plan, (2, 16, 16), torch.device("cpu"), torch.float32)
    with configs.use("cpu", config(rows=0.8, tiles=0.8)):
        assert bound.cost("tiles", *arguments) == pytest.approx(0.5 * (36 / 16 + 1) / 2 / 0.8)
        assert bound.cost("rows", *arguments) == pytest.approx((1 + 0.5) / 2 / 0.8)  # meets every other pixel
    with configs.use("cpu", config(tiles=0.8)):
        assert bound.cost("rows", *arguments) is None


def test_no_table_ships_for_a_cpu():
    assert configs.of(torch.device("cpu")) is None
    assert not dense_fallback.decides(torch.device("cpu"), torch.float32, None)


@pytest.mark.skipif(not backends.has_binary(), reason="rows run on the binary")
@pytest.mark.parametrize(
    "path, active, expected", [("tiles", 2, "run_tiles"), ("tiles", 20, None), ("rows", 20, "run_rows")]
)
def test_a_cpu_computes_blocks_only_where_they_win(path, active, expected, ran):
    """Nothing is measured there. Halos make tiles more than the map long before all blocks are active."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(*layers, *([nn.MaxPool2d(3, 1, 1)] if path == "tiles" else [])).eval()
    mask, x = torch.zeros(1, 48, 48), in_layout(random_tensor(1, 32, 48, 48), "channels_last")
    for i in range(active):
        mask[0, i // 6 * 8, i % 6 * 8] = 1
    with torch.no_grad():
        out, base = SparseBlocks(module, 8)(x, mask, x), module(x)
    assert [name for name in ran if name.startswith("run")] == ([] if expected is None else [expected])
    kept = BlockPlan.from_mask(mask, 8).mask()[:, None]
    torch.testing.assert_close(out, torch.where(kept, base, x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not backends.has_binary(), reason="rows run on the binary")
def test_a_small_output_of_a_large_map_is_dense_where_its_halo_is_the_map(ran):
    strided = [nn.Conv2d(16, 16, 3, 2, 1) for _ in range(3)]
    module = nn.Sequential(
        *strided, nn.MaxPool2d(3, 1, 1), *[nn.Conv2d(16, 16, 3, 1, 1) for _ in range(4)]
    ).eval()
    mask, x = torch.zeros(1, 8, 8), in_layout(random_tensor(1, 16, 64, 64), "channels_last")
    mask[0, 4, 4] = 1
    with torch.no_grad():
        out, expected = SparseBlocks(module, 1)(x, mask), module(x)
    assert not [name for name in ran if name.startswith("run")]
    torch.testing.assert_close(out, torch.where(mask[:, None] > 0, expected, 0), rtol=1e-4, atol=1e-5)
