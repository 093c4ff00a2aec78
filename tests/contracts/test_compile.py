"""torch.compile, torch.export and autocast of functions that call several ops."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from expert_cases import Case
from on_gpu import moved
from torch import Tensor

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops
from dynops.testing import available_backends, in_layout, random_mask, random_tensor

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)) if torch.cuda.is_available() else ("cpu",)
on_every_device = pytest.mark.parametrize("device", DEVICES)


def pixels(x, weight, bias, depthwise, mask, backend=None):
    """A plan, its halo, a packed chain and a dense-out convolution with everything fused."""
    plan = PixelPlan.from_mask(mask)
    inner = plan.needed(3, padding=1)
    rows = ops.packed_conv2d(x, weight, bias, None, inner, activation="silu", backend=backend)
    rows = ops.packed_conv2d(rows, depthwise, None, inner, plan, padding=1, groups=8, backend=backend)
    out = ops.scatter_pixels(rows, plan)
    gate = mask.to(x.dtype) * 0.5
    return ops.sparse_conv2d(
        out, weight, bias, plan, gate=gate, residual=x, base=x, activation="gelu", backend=backend
    )


def transposed(x, weight, mask, backend=None):
    plan = PixelPlan.from_mask(mask)
    scale = weight[0, :, 0, 0]
    y = ops.sparse_conv_transpose2d(x, weight, None, plan, stride=2, scale=scale, backend=backend)
    return ops.gather_pixels(y, plan).sum(0)


def blocks(x, mask, backend=None):
    """A plan, its tiles with a halo, the way back over a base, and the pixels of the blocks."""
    plan = BlockPlan.from_mask(mask, 4, "mean", 0.1)
    tiles = torch.nn.functional.avg_pool2d(ops.gather_blocks(x, plan, 1), 3, 1)
    out = ops.scatter_blocks(tiles, plan, base=x)
    rows = ops.gather_pixels(out, plan.pixels())
    return out + ops.scatter_pixels(rows, plan.pixels()) * plan.mask()[:, None]


def channels(x, weight, bias, second, mask, inner, backend=None):
    """Two plans, a gather, a packed chain and a dense-out convolution with a gate."""
    ins, mid = ChannelPlan.from_mask(mask), ChannelPlan.from_mask(inner)
    rows = ops.gather_channels(x, ins)
    rows = ops.packed_channel_conv2d(
        rows, weight, bias, ins, mid, padding=1, activation="silu", backend=backend
    )
    y = ops.scatter_channels(rows, mid)
    scale = inner.to(x.dtype)[:, : second.shape[0]] * 0.5
    y = ops.channel_conv2d(y, second, None, mid, ins, scale=scale, base=x, activation="gelu", backend=backend)
    return ops.channel_linear(y.mean((2, 3)), second[:, :, 0, 0].T, None, ins, mid, backend=backend)


def weights(x, weight, of_regions, mix, region, backend=None):
    y = ops.sample_conv2d(x, weight, padding=1, activation="relu", backend=backend)
    y = ops.region_conv2d(y, of_regions, region, padding=1, backend=backend)
    return ops.mixed_conv2d(y, weight, mix, padding=1, activation="silu", backend=backend)


def filters(x, kernels, weight, mask, backend=None):
    y = ops.local_conv2d(x, kernels, 3, padding=1, groups=2, backend=backend)
    return ops.masked_output_conv2d(y, weight, mask, x, in_channels=(2, 6), padding=1, backend=backend)


def experts(x, up, down, weight, index, backend=None):
    """A plan, the fused MLP, and the ops around experts that are modules of their own."""
    plan = ExpertPlan.from_topk(index, up.shape[0])
    y = ops.experts_mlp(x, up, down, plan, weight, backend=backend)
    rows = ops.grouped_linear(y, up, plan, packed_out=True, backend=backend)
    rows = ops.expert_activation(rows, "gelu", backend=backend)
    rows = ops.grouped_linear(rows, down, plan, packed_in=True, activation="silu", backend=backend)
    rows = rows + ops.gather_pairs(x, plan, backend=backend).to(rows.dtype)
    return ops.combine_pairs(rows, plan, weight, backend=backend)


def samples(x, keep, backend=None):
    plan = SamplePlan.from_mask(keep)
    rows = ops.gather_samples(x, plan)
    return ops.scatter_samples(rows.relu(), plan, x, add=True, scale=rows.flatten(1).mean(1))


class Calls(NamedTuple):
    """``run(*leaves, *rest)``, where only ``leaves(n)`` have gradients; ``n``: 2 or more samples."""

    run: Callable
    leaves: Callable[[int], list[Tensor]]
    rest: Callable[[int], list[Tensor]]
    op: str


def maps(n: int, c: int = 8) -> Tensor:
    return in_layout(random_tensor(n, c, 9, 7 + n), "channels_last")


def of_experts(n: int) -> Case:
    return Case(tokens=8 * n - 9, inputs=12, outputs=8)


CALLS = {
    "pixels": Calls(pixels, lambda n: [maps(n), random_tensor(8, 8, 1, 1), random_tensor(8), random_tensor(8, 1, 3, 3)],
                    lambda n: [random_mask((n, 9, 7 + n), 0.3)], "pixel_conv"),
    "transposed": Calls(transposed, lambda n: [maps(n, 4), random_tensor(4, 3, 2, 2)],
                        lambda n: [random_mask((n, 18, 14 + 2 * n), 0.3)], "pixel_conv"),
    "blocks": Calls(blocks, lambda n: [maps(n)], lambda n: [random_mask((n, 9, 7 + n), 0.15)], "gather_tiles"),
    "channels": Calls(channels, lambda n: [maps(n), random_tensor(12, 8, 3, 3), random_tensor(12), random_tensor(8, 12, 1, 1)],
                      lambda n: [torch.rand(n, 8) < 0.5, torch.rand(n, 12) < 0.5], "channel_conv"),
    "weights": Calls(weights, lambda n: [maps(n), random_tensor(n, 8, 8, 3, 3), random_tensor(n, 2, 8, 8, 3, 3), random_tensor(n, n)],
                     lambda n: [torch.randint(0, 2, (n, 9, 7 + n))], "mixed_conv"),
    "filters": Calls(filters, lambda n: [maps(n), random_tensor(n, 18, 9, 7 + n), random_tensor(8, 4, 3, 3)],
                     lambda n: [torch.rand(n, 8, 9, 7 + n) < 0.5], "local_conv"),
    "experts": Calls(experts, lambda n: [of_experts(n).mlp_tensors()[k] for k in ("x", "up", "down", "topk_weight")],
                     lambda n: [of_experts(n).index()], "experts_mlp"),
    "samples": Calls(samples, lambda n: [maps(n)], lambda n: [torch.arange(n) % 2 == 0], "gather_rows"),
}  # fmt: skip
of_every_call = pytest.mark.parametrize("name", CALLS)


def case(name: str, n: int = 2, device="cpu") -> tuple[list[Tensor], list[Tensor]]:
    leaves, rest = moved((CALLS[name].leaves(n), CALLS[name].rest(n)), device)
    return [t.detach().requires_grad_() for t in leaves], rest


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def check_compiled(compiled, name, backend, n=2, device="cpu"):
    leaves, rest = case(name, n, device)
    expected, actual = CALLS[name].run(*leaves, *rest, backend), compiled(*leaves, *rest, backend)
    assert_same(actual, expected)
    assert actual.stride() == expected.stride()
    dy = random_tensor(*expected.shape).to(device)
    assert_same(*(torch.autograd.grad(y, leaves, dy) for y in (actual, expected)))
    with torch.no_grad():
        assert_same(compiled(*leaves, *rest, backend), expected)


@of_every_call
def test_compile_aot_eager(name, fresh_dynamo):
    compiled = torch.compile(CALLS[name].run, fullgraph=True, backend="aot_eager", dynamic=False)
    check_compiled(compiled, name, None)


@pytest.mark.parametrize("backend", available_backends())
def test_compile_of_any_size(backend, fresh_dynamo):
    """Of pixels alone, as each compiles for seconds: opcheck looks at the dynamic sizes of every op."""
    compiled = torch.compile(pixels, fullgraph=True, backend="aot_eager", dynamic=True)
    check_compiled(compiled, "pixels", backend)
    check_compiled(compiled, "pixels", backend, 3)


@on_every_device
def test_compile_inductor(device, fresh_dynamo):
    check_compiled(torch.compile(pixels, fullgraph=True), "pixels", None, device=device)


def of_pixels(x, weight, plan):
    rows = ops.packed_conv2d(ops.gather_pixels(x, plan), weight, None, plan, plan, padding=1)
    rows = ops.packed_conv2d(rows, weight[:, :, :1, :1], None, plan, plan, activation="relu")
    return ops.scatter_pixels(rows, plan)


def of_blocks(x, weight, plan):
    tiles = torch.conv2d(ops.gather_blocks(x, plan, (1, 2)), weight)
    return ops.scatter_blocks(tiles[:, :, :, 1:-1], plan, add=True) + plan.mask()[:, None]


@pytest.mark.parametrize("run", [of_pixels, of_blocks])
def test_compile_with_a_plan_as_input(run, fresh_dynamo):
    """A plan made outside, compact or not, goes in as an argument, and other plans reuse the graph."""
    x, weight = random_tensor(2, 8, 9, 10).requires_grad_(), random_tensor(8, 8, 3, 3).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for density, capacity in ((0.3, None), (0.6, None), (0.4, 180)):
        mask = random_mask((2, 9, 10), density)
        plans = [
            PixelPlan.from_mask(mask, capacity)
            if run is of_pixels
            else BlockPlan.from_mask(mask, 4, capacity=capacity and 9)
            for _ in range(2)
        ]
        expected, actual = run(x, weight, plans[0]), compiled(x, weight, plans[1])
        assert_same(actual, expected)
        dy = random_tensor(*expected.shape)
        assert_same(*(torch.autograd.grad(y, (x, weight), dy) for y in (actual, expected)))


class Exported(torch.nn.Module):
    """A call with all but its first tensor as parameters."""

    def __init__(self, name):
        super().__init__()
        self.run, (leaves, _) = CALLS[name].run, case(name)
        self.names = [
            f"part{i}" for i in range(1, len(leaves))
        ]  # dynamo of torch 2.11 unpacks no ParameterList
        for name, leaf in zip(self.names, leaves[1:], strict=True):
            self.register_parameter(name, torch.nn.Parameter(leaf))

    def forward(self, x, *rest):
        return self.run(x, *[getattr(self, name) for name in self.names], *rest)


@on_every_device
@of_every_call
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict, device, fresh_dynamo):
    module = Exported(name).eval().to(device)
    (x, *_), rest = case(name, device=device)
    with torch.no_grad():
        program = torch.export.export(module, (x.detach(), *rest), strict=strict)
        names = {str(node.target) for node in program.graph.nodes}
        assert any(f"dynops.{CALLS[name].op}" in each for each in names), names
        exported = program.module()
        for change in (torch.zeros_like, torch.ones_like, lambda t: t.flip(0)):
            others = [change(t) for t in rest]
            assert_same(exported(x.detach(), *others), module(x, *others))


def test_export_with_a_dynamic_batch():
    module, (leaves, rest) = Exported("pixels").eval(), case("pixels")
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},) * 2
    with torch.no_grad():
        program = torch.export.export(
            module, (leaves[0].detach(), *rest), dynamic_shapes=(sizes[0], sizes[1:])
        )
        x, mask = random_tensor(5, 8, 9, 9), random_mask((5, 9, 9))
        assert_same(program.module()(x, mask), module(x, mask))


@on_every_device
@of_every_call
def test_autocast(name, device):
    """Computed in half precision; gradients have their leaf's dtype."""
    leaves, rest = case(name, device=device)
    expected = CALLS[name].run(*leaves, *rest).detach()
    with torch.autocast(device, torch.bfloat16):
        out = CALLS[name].run(*leaves, *rest)
    assert out.dtype == (torch.float32 if name in ("blocks", "samples") else torch.bfloat16)
    assert (out.float() - expected).norm() <= 0.05 * expected.norm()
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
