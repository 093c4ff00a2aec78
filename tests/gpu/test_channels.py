"""Channels: plans bit for bit, convolutions on lists of channels, weights of each sample, dynamic filters."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from channel_cases import channels_of, masked_channel_conv2d, packed, unpacked
from on_gpu import BACKENDS, DEVICE, DTYPES, FAST, KINDS, assert_same, compare, moved, sized

from dynops import ChannelPlan, ops
from dynops.testing import random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def of_plan(plan: ChannelPlan) -> list:
    return [plan.index, plan.count, plan.mask()]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32]
)
@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (3, 37), (16, 4, 64), (130,), (sized(256, 8), 2048)], ids=str
)
def test_plans_are_those_of_the_cpu(shape, dtype):
    for density in (0.0, 0.4, 1.0):
        mask = (torch.rand(shape) < density).to(dtype)
        for capacity in (None, 0, 5, 4000):
            expected, plan = (ChannelPlan.from_mask(mask.to(d), capacity) for d in ("cpu", DEVICE))
            assert_same(moved(of_plan(plan), "cpu"), of_plan(expected))


def test_prefixes_and_groups_are_those_of_the_cpu():
    width = torch.tensor([0, 3, 12, 7])
    for make in (
        lambda d: ChannelPlan.prefix(width.to(d), 12),
        lambda d: ChannelPlan.prefix(5, 12, d),
        lambda d: ChannelPlan.grouped((width > 3).to(d), 3),
        lambda d: ChannelPlan.full(12, d),
    ):
        assert_same(moved(of_plan(make(DEVICE)), "cpu"), of_plan(make("cpu")))


@dataclass(frozen=True)
class Case:
    """A convolution, its map, and what its lists are (see ``channel_cases.KINDS``)."""

    c: int = 32
    o: int = 48
    n: int = 3
    side: tuple = (9, 8)
    kernel: int = 3
    padding: int = 1
    stride: int = 1
    groups: int = 1
    ins: str = "random"
    outs: str = "random"
    nchw: bool = False

    @property
    def options(self) -> dict:
        return {"padding": self.padding, "stride": self.stride, "groups": self.groups}


LARGE = sized((28, 28), (7, 6))  # on a GPU enough pixels for the largest tiles
CASES = {
    "256 to 256": Case(256, 256, n=sized(32, 2), side=LARGE),
    "64 to 128": Case(64, 128, n=sized(32, 2), side=LARGE, ins="prefix", outs="prefix"),
    "1x1": Case(128, 64, n=sized(16, 2), side=LARGE, kernel=1, padding=0, nchw=True),
    "ragged": Case(21, 37, ins="ragged", outs="ragged", nchw=True),
    "outputs alone": Case(ins="every"),
    "inputs alone": Case(outs="every"),
    "shared": Case(ins="shared", outs="shared prefix"),
    "groups of four": Case(ins="grouped", outs="grouped", stride=2),
    "none": Case(ins="none", outs="random"),
    "nothing out": Case(ins="random", outs="none"),
    "capacity": Case(ins="capacity", outs="wide capacity"),
    "two groups": Case(32, 64, groups=2),
    "depthwise": Case(24, 24, groups=24, ins="every"),
    "one channel": Case(1, 1, ins="every", outs="one"),
}
IN_EVERY_KIND = ("64 to 128", "depthwise")
KIND_OF = {name: ("bfloat16", "float16", "ieee")[i % 3] for i, name in enumerate(CASES)}
EXAMPLES = [
    (name, kind, FAST) for name in CASES for kind in (KINDS if name in IN_EVERY_KIND else (KIND_OF[name],))
] + [("64 to 128", "ieee", backend) for backend in BACKENDS if backend != FAST]


def inputs(case: Case, kind: str):
    """The tensors by name, and the two plans."""
    dtype = DTYPES[kind]
    x = random_tensor(case.n, case.c, *case.side, dtype=dtype)
    x = x if case.nchw else x.to(memory_format=torch.channels_last)
    in_plan, in_mask = channels_of(case.ins, case.n, case.c)
    out_plan, out_mask = channels_of(case.outs, case.n, case.o)
    weight = random_tensor(case.o, case.c // case.groups, case.kernel, case.kernel, dtype=dtype)
    tensors = {"x": x, "weight": weight, "bias": random_tensor(case.o, dtype=dtype)}
    return tensors | {"in_mask": in_mask, "out_mask": out_mask}, moved(in_plan), moved(out_plan)


@pytest.mark.parametrize("name,kind,backend", EXAMPLES)
def test_convolutions(name, kind, backend):
    case = CASES[name]
    tensors, in_plan, out_plan = inputs(case, kind)

    def ours(x, weight, bias, in_mask, out_mask):
        out = ops.channel_conv2d(x, weight, bias, in_plan, out_plan, **case.options, backend=backend)
        assert out.is_contiguous(memory_format=torch.contiguous_format if case.nchw else torch.channels_last)
        return out

    def oracle(**given):
        return masked_channel_conv2d(**given, **case.options)

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("kind", ["bfloat16", "ieee"])
def test_heads(kind):
    """Each group of outputs has inputs of its own."""
    mask = torch.rand(3, 4, 32) < 0.5
    plan = moved(ChannelPlan.from_mask(mask))
    tensors = {
        "x": random_tensor(3, 32, 9, 8, dtype=DTYPES[kind]),
        "weight": random_tensor(64, 32, 3, 3, dtype=DTYPES[kind]),
        "bias": random_tensor(64, dtype=DTYPES[kind]),
        "in_mask": mask,
    }

    def ours(x, weight, bias, in_mask):
        return ops.channel_conv2d(x, weight, bias, plan, padding=1, backend=FAST)

    def oracle(x, **given):
        every = torch.ones(3, 64, dtype=torch.bool, device=x.device)
        return masked_channel_conv2d(x, **given, out_mask=every, padding=1)

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("name,kind", [("64 to 128", "bfloat16"), ("ragged", "ieee")])
def test_fused_epilogues(name, kind):
    case = CASES[name]
    tensors, in_plan, out_plan = inputs(case, kind)
    tensors["scale"] = random_tensor(case.n, case.o, dtype=DTYPES[kind])
    tensors["base"] = random_tensor(case.n, case.o, *case.side, dtype=DTYPES[kind])

    def ours(x, weight, bias, in_mask, out_mask, **epilogue):
        plans = (in_plan, out_plan)
        return ops.channel_conv2d(
            x, weight, bias, *plans, **case.options, **epilogue, activation="silu", backend=FAST
        )

    def oracle(**given):
        return masked_channel_conv2d(**given, **case.options, activation="silu")

    compare(ours, oracle, tensors, grads=(), kind=kind)
    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("name,kind", [("capacity", "bfloat16"), ("shared", "float16"), ("ragged", "ieee")])
def test_packed_channels(name, kind):
    """gather, a packed convolution, and scatter: a chain that stays compact."""
    case = CASES[name]
    tensors, in_plan, out_plan = inputs(case, kind)

    def ours(x, weight, bias, in_mask, out_mask):
        rows = ops.gather_channels(x, in_plan)
        live = packed(x.detach().cpu(), in_mask.cpu(), in_plan.width)
        assert_same(rows.detach().cpu(), live)
        rows = ops.packed_channel_conv2d(rows, weight, bias, in_plan, out_plan, **case.options, backend=FAST)
        out = ops.scatter_channels(rows, out_plan)
        assert_same(unpacked(rows.detach().cpu(), out_mask.cpu()), out.detach().cpu())
        return out

    def oracle(**given):
        return masked_channel_conv2d(**given, **case.options)

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("kind", ["bfloat16", "ieee"])
def test_linear(kind):
    in_plan, in_mask = channels_of("random", 5, 64)
    out_plan, out_mask = channels_of("prefix", 5, 96)
    plans = moved([in_plan, out_plan])
    tensors = {
        "x": random_tensor(5, 7, 64, dtype=DTYPES[kind]),
        "weight": random_tensor(96, 64, dtype=DTYPES[kind]),
        "bias": random_tensor(96, dtype=DTYPES[kind]),
        "in_mask": in_mask,
        "out_mask": out_mask,
    }

    def ours(x, weight, bias, in_mask, out_mask):
        return ops.channel_linear(x, weight, bias, *plans, backend=FAST)

    def oracle(x, weight, bias, in_mask, out_mask):
        out = F.linear(torch.where(in_mask[:, None], x, 0), weight, bias)
        return torch.where(out_mask[:, None], out, 0)

    compare(ours, oracle, tensors, kind=kind)


def weighted(kind: str, *lead: int) -> dict[str, torch.Tensor]:
    dtype = DTYPES[kind]
    x = random_tensor(3, 16, 9, 8, dtype=dtype).to(memory_format=torch.channels_last)
    return {
        "x": x,
        "weight": random_tensor(*lead, 24, 8, 3, 3, dtype=dtype),
        "bias": random_tensor(*lead, 24, dtype=dtype),
    }


def each(x, weight, bias):
    """A convolution for each sample."""
    outs = [F.conv2d(x[i : i + 1], weight[i], bias[i], padding=1, groups=2) for i in range(len(x))]
    return torch.cat(outs)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_each_sample(kind):
    def ours(x, weight, bias):
        return ops.sample_conv2d(x, weight, bias, padding=1, groups=2, backend=FAST)

    compare(ours, each, weighted(kind, 3), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_weights(kind):
    tensors = weighted(kind, 4) | {"mix": torch.rand(3, 4).softmax(1).to(DTYPES[kind])}

    def ours(x, weight, bias, mix):
        return ops.mixed_conv2d(x, weight, mix, bias, padding=1, groups=2, backend=FAST)

    def oracle(x, weight, bias, mix):
        return each(x, torch.einsum("ne,eoikl->noikl", mix, weight), mix @ bias)

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_regions(kind):
    tensors = weighted(kind, 4) | {"region": torch.randint(0, 4, (3, 9, 8))}

    def ours(x, weight, bias, region):
        return ops.region_conv2d(x, weight, region, bias, padding=1, groups=2, backend=FAST)

    def oracle(x, weight, bias, region):
        outs = [F.conv2d(x, w, b, padding=1, groups=2) for w, b in zip(weight, bias, strict=True)]
        return sum(torch.where((region == r)[:, None], out, 0) for r, out in enumerate(outs))

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_filters(kind):
    x = random_tensor(2, 12, 9, 8, dtype=DTYPES[kind]).to(memory_format=torch.channels_last)
    kernels = random_tensor(2, 3 * 9, 9, 8, dtype=DTYPES[kind])

    def ours(x, kernels):
        return ops.local_conv2d(x, kernels, 3, padding=1, groups=3, backend=FAST)

    def oracle(x, kernels):
        wide = torch.promote_types(x.dtype, torch.float32)
        unfolded = F.unfold(x.to(wide), 3, padding=1).view(2, 3, 4, 9, 9, 8)
        return (unfolded * kernels.to(wide).view(2, 3, 1, 9, 9, 8)).sum(3).view(x.shape).to(x.dtype)

    compare(ours, oracle, {"x": x, "kernels": kernels}, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_outputs(kind):
    tensors = {
        "x": random_tensor(2, 16, 9, 8, dtype=DTYPES[kind]),
        "weight": random_tensor(12, 16, 3, 3, dtype=DTYPES[kind]),
        "partial": random_tensor(2, 12, 9, 8, dtype=DTYPES[kind]),
        "mask": torch.rand(2, 12, 9, 8) < 0.3,
    }

    def ours(x, weight, partial, mask):
        return ops.masked_output_conv2d(x, weight, mask, partial, padding=1, backend=FAST)

    def oracle(x, weight, partial, mask):
        return torch.where(mask, F.conv2d(x, weight, padding=1) + partial, partial)

    compare(ours, oracle, tensors, kind=kind)
