"""Values of the channel kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from yardstick import torch_weight_grads

from dynops import ChannelPlan, ops
from dynops.geometry import ConvGeometry
from dynops.kernels.triton import channel_lists, channels, channels_weight_grad, gemm, tiling
from dynops.kernels.triton.channel_index import channel_index
from dynops.ops import index as index_reference
from dynops.ops.channels import conv as reference
from dynops.testing import assert_within_budget, random_tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    """A convolution, the plans of its two sides and the form of its tensors.

    A plan is "random" (other channels in each sample), "shared", "prefix", "empty", "one", "ends" (a sample without
    a live channel, one with one, one with all), "padded" (lists with room past all channels) or None.
    """

    c: int = 20
    o: int = 24
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    pad: tuple = (1, 1)
    dil: tuple = (1, 1)
    groups: int = 1
    heads: int = 1
    n: int = 3
    h: int = 6
    w: int = 5
    ins: str | None = "random"
    outs: str | None = "random"
    capacity: int | None = None
    packed_in: bool = False
    packed_out: bool = False
    nchw: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.pad, self.dil, strict=True)
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        steps = (*self.kernel, *self.stride, *self.pad, *self.dil, self.groups, 0)
        return ConvGeometry(self.n, self.h, self.w, *out, *steps)

    def plan(self, kind: str | None, size: int, heads: int = 1) -> ChannelPlan | None:
        shape = (self.n, size) if heads == 1 else (self.n, heads, size)
        if kind is None:
            return None
        if kind == "prefix":
            return ChannelPlan.prefix(torch.randint(1, size + 1, (self.n,)), size, DEVICE)
        if kind == "padded":
            index = [sorted(torch.randperm(size)[: size // 2].tolist()) for _ in range(self.n)]
            index = torch.nn.functional.pad(
                torch.tensor(index, dtype=torch.int64, device=DEVICE), (0, size), value=-1
            )
            return ChannelPlan.from_index(index, size)
        mask = torch.rand(shape, device=DEVICE) < 0.5
        if kind == "shared":
            mask = mask[0]
        elif kind == "ends":
            mask[0], mask[1], mask[2] = False, torch.arange(size, device=DEVICE) == size // 2, True
        elif kind in ("empty", "one"):
            mask[:] = kind == "one" and torch.arange(size, device=DEVICE) == size - 1
        return ChannelPlan.from_mask(mask, self.capacity)


CASES = {
    "3x3": Case(),
    "3x3-in": Case(outs=None),
    "3x3-out": Case(ins=None),
    "3x3-all": Case(ins=None, outs=None),
    "1x1": Case(kernel=(1, 1), pad=(0, 0)),
    "1x1-stride": Case(kernel=(1, 1), pad=(0, 0), stride=(2, 2)),
    "linear": Case(kernel=(1, 1), pad=(0, 0), c=40, o=50, h=1, w=1, n=5),
    "stride": Case(stride=(2, 2), nchw=True),
    "uneven": Case(kernel=(3, 2), stride=(2, 1), pad=(0, 1), dil=(1, 2)),
    "dilation": Case(dil=(2, 2), pad=(2, 2)),
    "5x5": Case(kernel=(5, 5), pad=(2, 2)),
    "wide": Case(c=36, o=70, h=3, w=3),
    "aligned": Case(c=32, o=32, n=2, h=9, w=9),  # maps so large that the weight is packed
    "aligned-in": Case(c=32, o=32, n=2, h=9, w=9, outs=None),
    "groups": Case(c=34, o=36, groups=2),
    "groups-in": Case(c=34, o=36, groups=2, outs=None),
    "groups-out": Case(c=34, o=36, groups=2, ins=None),
    "groups-packed": Case(c=34, o=36, groups=2, packed_in=True, packed_out=True),
    "groups-packed-1x1": Case(
        c=34, o=36, groups=2, packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0)
    ),
    "groups-large": Case(c=32, o=32, groups=2, h=8, w=8),
    "groups-ends": Case(c=34, o=36, groups=2, ins="ends", outs="ends", packed_out=True),
    "narrow-groups": Case(c=12, o=18, groups=6),
    "narrow-groups-packed": Case(c=12, o=18, groups=6, packed_in=True, packed_out=True),
    "depthwise": Case(c=21, o=21, groups=21),
    "depthwise-multiplier": Case(c=10, o=30, groups=10, stride=(2, 2)),
    "depthwise-out": Case(c=21, o=21, groups=21, ins=None),
    "depthwise-in": Case(c=21, o=21, groups=21, outs=None),
    "depthwise-shared": Case(c=21, o=21, groups=21, ins="shared", outs="shared"),
    "depthwise-packed": Case(c=21, o=21, groups=21, packed_in=True, packed_out=True),
    "heads": Case(heads=3),
    "heads-1x1": Case(heads=3, kernel=(1, 1), pad=(0, 0), outs=None),
    "heads-large": Case(heads=2, h=8, w=8),
    "heads-narrow": Case(heads=6, stride=(2, 2)),
    "heads-packed-out": Case(heads=3, packed_out=True),
    "heads-ends": Case(heads=3, ins="ends", outs="ends"),
    "packed-in": Case(packed_in=True, outs=None),
    "packed-out": Case(packed_out=True, ins=None),
    "packed": Case(packed_in=True, packed_out=True, stride=(2, 2)),
    "packed-1x1": Case(packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0), nchw=True),
    "packed-padded": Case(packed_in=True, packed_out=True, ins="padded", outs="padded"),
    "capacity": Case(capacity=16),
    "capacity-exceeded": Case(capacity=5, packed_in=True, packed_out=True),
    "capacity-none": Case(capacity=0),
    "capacity-none-packed": Case(capacity=0, packed_in=True, outs=None),
    "shared": Case(ins="shared", outs="shared"),
    "shared-in": Case(ins="shared"),
    "shared-out": Case(outs="shared", h=8, w=8),
    "prefix": Case(ins="prefix", outs="prefix"),
    "empty": Case(ins="empty", outs="empty"),
    "empty-in": Case(ins="empty"),
    "one": Case(ins="one", outs="one"),
    "ends": Case(ins="ends", outs="ends"),
    "one-channel": Case(c=1, o=1, ins="one", outs="one"),
    "no-samples": Case(n=0),
}
HALF = ("3x3", "1x1", "aligned", "groups", "depthwise", "heads", "packed")
EXAMPLES = [(name, dtype) for dtype in DTYPES for name in (CASES if dtype == torch.float32 else HALF)]
of_cases = pytest.mark.parametrize("name,dtype", EXAMPLES, ids=[f"{n}-{str(d)[6:]}" for n, d in EXAMPLES])


class Inputs:
    """The tensors of a case; what lies at channels that are not live is NaN, and must not be read."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.g, self.dtype = case, case.geometry, dtype
        self.ins = case.plan(case.ins, case.c, case.heads)
        self.outs = case.plan(case.outs, case.o)
        self.lists = [
            t for p in (self.ins, self.outs) for t in ((None, None) if p is None else (p.index, p.count))
        ]
        self.weight = random_tensor(case.o, case.c // case.groups, *case.kernel, dtype=dtype).to(DEVICE)
        self.in_width = self.ins.width if case.packed_in else -1
        self.out_width = self.outs.width if case.packed_out else -1
        self.x = self.map(self.ins, case.c, case.packed_in, self.g.in_shape)
        self.grad = self.map(self.outs, case.o, case.packed_out, self.g.out_shape)

    def map(self, plan, size: int, packed: bool, shape):
        size = plan.width if packed else size
        x = random_tensor(shape[0], size, *shape[1:], dtype=self.dtype).to(DEVICE)
        if plan is not None:
            live = torch.arange(size, device=DEVICE) < plan.count[:, None] if packed else plan.mask()
            live = live.any(1) if live.dim() == 3 else live
            x = torch.where(live.expand(shape[0], -1)[:, :, None, None], x, float("nan"))
        return x if self.case.nchw else x.to(memory_format=torch.channels_last)

    def conv(self, run, double: bool = False, bias=None, activation="", scale=None, base=None):
        tensors = (self.x, self.weight, bias, scale, base)
        x, weight, bias, scale, base = (None if t is None else t.double() if double else t for t in tensors)
        return run(
            x, weight, bias, *self.lists, list(self.g), self.case.heads, activation, scale, base,
            self.case.packed_in, self.out_width,
        )  # fmt: skip

    def input_grad(self, run, double: bool = False):
        grad, weight = (t.double() if double else t for t in (self.grad, self.weight))
        return run(
            grad, weight, *self.lists, list(self.g), self.case.heads, self.in_width, self.case.packed_out
        )

    def weight_grad(self, run, double: bool = False):
        grad, x = (t.double() if double else t for t in (self.grad, self.x))
        return run(
            grad, x, *self.lists, list(self.weight.shape), list(self.g), self.case.heads, self.case.packed_in,
            self.case.packed_out, True,
        )  # fmt: skip


def check(method, kernel, plain, **changes):
    """``method`` with the kernel, against the reference in float64 and in the same dtype."""
    with torch_weight_grads():
        dense = method(plain, **changes)
    results = method(kernel, **changes), method(plain, True, **changes), dense
    for value in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert_within_budget(*value)


def check_all(inputs: Inputs):
    check(inputs.conv, channels.conv, reference._conv)
    check(inputs.input_grad, channels.conv_input_grad, reference._conv_input_grad)
    check(inputs.weight_grad, channels.conv_weight_grad, reference._conv_weight_grad)


@of_cases
def test_forward(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(
        inputs.conv, channels.conv, reference._conv, bias=random_tensor(CASES[name].o, dtype=dtype).to(DEVICE)
    )


@of_cases
def test_input_grad(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(inputs.input_grad, channels.conv_input_grad, reference._conv_input_grad)


@of_cases
def test_weight_grad(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(inputs.weight_grad, channels.conv_weight_grad, reference._conv_weight_grad)


@pytest.mark.parametrize("name", ["3x3", "groups", "depthwise", "packed", "shared", "3x3-all"])
def test_epilogue(name):
    """Every activation is in ``interpreted_pixels.py``: the kernels share them."""
    for dtype in DTYPES if name == "3x3" else DTYPES[:1]:
        inputs, case = Inputs(CASES[name], dtype), CASES[name]
        changes = {"bias": random_tensor(case.o, dtype=dtype).to(DEVICE)}
        changes["scale"] = random_tensor(case.n, case.o, dtype=dtype).to(DEVICE)
        if not case.packed_out:
            base = random_tensor(case.n, case.o, inputs.g.out_h, inputs.g.out_w, dtype=dtype).to(DEVICE)
            live = (
                torch.ones(1, case.o, dtype=torch.bool, device=DEVICE)
                if inputs.outs is None
                else inputs.outs.mask()
            )
            changes["base"] = base.masked_fill(live.expand(case.n, -1)[:, :, None, None], float("nan"))
        check(inputs.conv, channels.conv, reference._conv, activation="silu", **changes)


@pytest.mark.parametrize("name", ["3x3", "aligned", "packed", "depthwise", "heads", "groups"])
@pytest.mark.parametrize("limit", ["int64-offsets", "small-tiles"])
def test_other_configurations(name, limit, monkeypatch):
    """The 64-bit offsets that tensors past 2**31 elements take, and the tiles of small problems."""
    if limit == "int64-offsets":
        monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    else:
        monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    check_all(Inputs(CASES[name], torch.float32))


@pytest.mark.parametrize("name", ["3x3", "heads", "shared", "depthwise"])
def test_weight_grad_in_slices_and_chunks(name, monkeypatch):
    """Pixels split among programs, and samples taken one after another."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    monkeypatch.setattr(channels_weight_grad, "_COPIES", 1)
    case = replace(CASES[name], n=2, h=20, w=20)
    case = case if case.groups > 1 else replace(case, c=6, o=6)
    inputs = Inputs(case, torch.float32)
    check(inputs.weight_grad, channels.conv_weight_grad, reference._conv_weight_grad)


def test_large_maps_have_a_packed_weight(monkeypatch):
    packed, pack = [], channel_lists.pack_weight
    monkeypatch.setattr(channel_lists, "pack_weight", lambda *a: packed.append(a) or pack(*a))
    for name, expected in (("aligned", 2), ("wide", 0), ("3x3-out", 0), ("shared", 2)):
        packed.clear()
        inputs = Inputs(CASES[name], torch.float32)
        inputs.conv(channels.conv), inputs.input_grad(channels.conv_input_grad)
        assert len(packed) == expected, name


def test_results_are_reproducible():
    inputs = Inputs(CASES["aligned"], torch.float32)
    for method, kernel in (
        (inputs.conv, channels.conv),
        (inputs.input_grad, channels.conv_input_grad),
        (lambda run: inputs.weight_grad(run)[0], channels.conv_weight_grad),
    ):
        assert torch.equal(method(kernel), method(kernel))


@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "shared", "ends", "empty", "padded", "capacity", "none"])
def test_gather_and_scatter(kind, dtype, nchw):
    capacity = {"capacity": 5, "none": 0}.get(kind)
    plan = Case(capacity=capacity).plan("random" if capacity is not None else kind, 19)
    x = (random_tensor(3, 19, 7, 6) * 100).to(DEVICE, dtype)
    x = x if nchw else x.to(memory_format=torch.channels_last)
    for width in {plan.width, plan.index.shape[1]}:
        packed = channels.gather(x, plan.index, plan.count, width)
        expected = reference._gather(x, plan.index, plan.count, width)
        assert torch.equal(packed, expected) and packed.stride() == expected.stride()
        for base in (None, x):
            out = channels.scatter(packed + 1, plan.index, plan.count, 19, base)
            expected = reference._scatter(packed + 1, plan.index, plan.count, 19, base)
            assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_named_backend_runs_the_kernels():
    tensors = random_tensor(2, 20, 7, 6), random_tensor(24, 20, 3, 3), random_tensor(24), random_tensor(2, 24)
    plans = [ChannelPlan.from_mask(torch.rand(2, size, device=DEVICE) < 0.5) for size in (20, 24)]
    results = {}
    for backend in ("triton", "reference"):
        x, weight, bias, scale = leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
        out = ops.channel_conv2d(
            x, weight, bias, *plans, padding=1, activation="silu", scale=scale, backend=backend
        )
        results[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows,size", [(0, 5), (1, 1), (3, 17), (2, 1025), (4, 0)])
def test_channel_index(rows, size, dtype):
    """Lists shorter than the mask's rows, as long, and longer than a program takes at once."""
    mask = (torch.rand(rows, size) < 0.5).to(dtype)
    if rows > 1 and size:
        mask[0], mask[1] = 0, 1
        if dtype.is_floating_point and dtype != torch.bfloat16:  # which the interpreter keeps as an integer
            mask[0] = -0.0
    for width in {0, min(1, size), size // 2, size}:
        got = channel_index(mask.to(DEVICE), width)
        for value, expected in zip(got, index_reference._channel_index(mask, width), strict=True):
            assert value.dtype == expected.dtype and torch.equal(value.cpu(), expected)
