"""Pixels: plans bit for bit, convolutions and their gradients in every form of the kernels."""

from dataclasses import dataclass

import pytest
import torch
from on_gpu import BACKENDS, DEVICE, DTYPES, FAST, KINDS, assert_same, compare, sized

from dynops import PixelPlan, ops
from dynops.geometry import ConvGeometry
from dynops.testing import (
    dense_masked_conv2d,
    dense_masked_conv_transpose2d,
    random_mask,
    random_tensor,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


MASK_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip
SHAPES = [(0, 3, 4), (1, 1, 1), (2, 5, 7), (3, 129, 65), sized((4, 513, 300), (2, 130, 120))]


def of_plan(plan: PixelPlan) -> list:
    return [plan.index, plan.count, plan.inverse(), plan.mask()]


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_those_of_the_cpu(shape, density):
    mask = random_mask(shape, density) if 0 < density < 1 else torch.full(shape, density == 1)
    some = int(mask.sum())
    for dtype in MASK_DTYPES:
        values = mask.to(dtype) * 3 if dtype != torch.bool else mask
        for capacity in (None, 0, some // 2, some, some + 5, mask.numel() + 300):
            expected, plan = (PixelPlan.from_mask(values.to(d), capacity) for d in ("cpu", DEVICE))
            assert plan.index.device == DEVICE
            assert_same(
                [None if t is None else t.cpu() for t in of_plan(plan)], of_plan(expected), str(dtype)
            )
        values = values[:, None].transpose(2, 3)  # no contiguous one
        expected, plan = (PixelPlan.from_mask(values.to(d)) for d in ("cpu", DEVICE))
        assert_same(plan.index.cpu(), expected.index)


@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 5, "stride": 3, "padding": 2},
])  # fmt: skip
def test_needed_pixels_are_those_of_the_cpu(options, capacity):
    mask = random_mask((3, 11, 13), 0.1)
    plans = [PixelPlan.from_mask(mask.to(d), capacity).needed(**options) for d in ("cpu", DEVICE)]
    assert_same(
        [t.cpu() for t in of_plan(plans[1]) if t is not None], [t for t in of_plan(plans[0]) if t is not None]
    )
    transposed = list(ConvGeometry(3, 6, 7, 11, 13, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1))
    lists = [(p.index, p.count) for p in (PixelPlan.from_mask(mask.to(d), capacity) for d in ("cpu", DEVICE))]
    cpu, there = (torch.ops.dynops.needed_mask(*of, transposed) for of in lists)
    assert_same(there.cpu(), cpu)


def test_nan_in_a_mask_is_refused():
    for shape in ((1, 1, 1), (3, 129, 65)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            mask = torch.ones(shape, dtype=dtype)
            mask[-1, -1, -1] = float("nan")
            with pytest.raises(ValueError, match="NaN"):
                PixelPlan.from_mask(mask.to(DEVICE))


@dataclass(frozen=True)
class Case:
    """A convolution, its map and its mask."""

    c: int
    o: int
    n: int = 2
    side: tuple = (13, 11)
    kernel: tuple = (3, 3)
    stride: int = 1
    padding: tuple = (1, 1)
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    density: float = 0.6
    kind: str = "random"
    nchw: bool = False
    capacity: float | None = None  # of the active pixels
    packed: bool = False

    @property
    def options(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


LARGE = sized((56, 56), (9, 10))  # on a GPU enough rows for the largest tiles
CASES = {
    "64 to 256": Case(64, 256, n=sized(8, 2), side=LARGE, density=0.75),
    "128 to 128": Case(128, 128, n=sized(8, 1), side=LARGE, density=0.75),
    "64 to 64": Case(64, 64, n=sized(4, 1), side=LARGE, kind="square"),
    "1x1": Case(256, 64, n=sized(8, 2), side=sized((28, 28), (7, 7)), kernel=(1, 1), padding=(0, 0), nchw=True),
    "ragged": Case(21, 37, nchw=True),
    "one pixel": Case(16, 16, n=1, side=(5, 5), kind="one"),
    "one channel": Case(1, 1),
    "stride": Case(32, 64, stride=2),
    "dilation": Case(32, 48, kernel=(3, 2), padding=(2, 1), dilation=2, capacity=2.0),
    "5x5": Case(16, 32, kernel=(5, 5), padding=(2, 2)),
    "9x7": Case(5, 6, kernel=(9, 7), padding=(4, 3)),
    "groups": Case(64, 96, groups=2),
    "depthwise": Case(40, 40, groups=40, nchw=True),
    "transposed": Case(48, 32, side=(7, 6), stride=2, padding=(0, 0), transposed=True, kernel=(2, 2)),
    "transposed 3x3": Case(32, 20, side=(7, 6), stride=2, transposed=True, nchw=True),
    "transposed depthwise": Case(24, 24, groups=24, side=(7, 6), stride=2, transposed=True),
    "packed": Case(48, 64, packed=True, capacity=1.0),
    "packed compact": Case(48, 64, packed=True, stride=2),
    "packed 1x1": Case(48, 64, packed=True, kernel=(1, 1), padding=(0, 0)),
    "packed depthwise": Case(24, 24, packed=True, groups=24),
    "over capacity": Case(32, 64, capacity=0.5),
    "empty": Case(32, 64, kind="empty"),
    "empty capacity": Case(32, 64, kind="empty", capacity=1.0),
    "full": Case(32, 64, kind="full"),
}  # fmt: skip
IN_EVERY_KIND = ("128 to 128", "depthwise", "packed")
KIND_OF = {name: ("bfloat16", "float16", "ieee")[i % 3] for i, name in enumerate(CASES)}
EXAMPLES = [
    (name, kind, FAST) for name in CASES for kind in (KINDS if name in IN_EVERY_KIND else (KIND_OF[name],))
] + [(name, "ieee", b) for name in ("stride", "transposed", "packed") for b in BACKENDS if b != FAST]


def kept(mask: torch.Tensor, capacity: int | None) -> torch.Tensor:
    """What a plan of this capacity keeps of a mask: the first ones."""
    flat = mask.flatten()
    return mask if capacity is None else (flat & (flat.cumsum(0) <= capacity)).view_as(mask)


def inputs(case: Case, kind: str) -> tuple[dict[str, torch.Tensor], int | None]:
    """The tensors of a case by name, and its capacity."""
    dtype = DTYPES[kind]
    x = random_tensor(case.n, case.c, *case.side, dtype=dtype)
    x = x if case.nchw else x.to(memory_format=torch.channels_last)
    lead, inner = (case.c, case.o) if case.transposed else (case.o, case.c)
    weight = random_tensor(lead, inner // case.groups, *case.kernel, dtype=dtype)
    like = (torch.conv_transpose2d if case.transposed else torch.conv2d)(
        x[:1].double(), weight.double(), None, case.stride, case.padding, *([0] if case.transposed else []),
        **({"groups": case.groups, "dilation": case.dilation}),
    )  # fmt: skip
    mask = random_mask((case.n, *like.shape[2:]), case.density, case.kind)
    tensors = {"x": x, "weight": weight, "bias": random_tensor(case.o, dtype=dtype), "mask": mask}
    if case.packed:
        tensors["in_mask"] = random_mask((case.n, *case.side), 0.7)
    return tensors, None if case.capacity is None else int(int(mask.sum()) * case.capacity) + 1


@pytest.mark.parametrize("name,kind,backend", EXAMPLES)
def test_convolutions(name, kind, backend):
    case = CASES[name]
    tensors, capacity = inputs(case, kind)

    def ours(x, weight, bias, mask, in_mask=None):
        plan = PixelPlan.from_mask(mask, capacity)
        if in_mask is not None:
            in_plan = PixelPlan.from_mask(in_mask, capacity and in_mask.numel())
            plan = in_plan if case.options["padding"] == (0, 0) else plan  # 1x1: a row from its own row
            rows = ops.gather_pixels(x, in_plan)
            rows = ops.packed_conv2d(rows, weight, bias, in_plan, plan, **case.options, backend=backend)
            return ops.scatter_pixels(rows, plan)
        run = ops.sparse_conv_transpose2d if case.transposed else ops.sparse_conv2d
        out = run(x, weight, bias, plan, **case.options, backend=backend)
        assert out.is_contiguous(memory_format=torch.contiguous_format if case.nchw else torch.channels_last)
        return out

    def oracle(x, weight, bias, mask, in_mask=None):
        mask = kept(mask, capacity)
        if in_mask is not None:
            x = torch.where(in_mask[:, None], x, 0)
            mask = in_mask if case.options["padding"] == (0, 0) else mask
        run = dense_masked_conv_transpose2d if case.transposed else dense_masked_conv2d
        return run(x, weight, bias, mask, **case.options)

    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("name,kind,activation", [
    ("64 to 64", "bfloat16", "silu"), ("64 to 64", "float16", "gelu"), ("64 to 64", "ieee", "gelu_tanh"),
    ("ragged", "bfloat16", "hardswish"), ("depthwise", "float16", "relu2"), ("transposed", "bfloat16", "relu6"),
])  # fmt: skip
def test_fused_epilogues(name, kind, activation):
    case = CASES[name]
    tensors, _ = inputs(case, kind)
    dtype, (n, h, w) = DTYPES[kind], tensors["mask"].shape
    for key in ("residual", "base"):
        tensors[key] = random_tensor(n, case.o, h, w, dtype=dtype)
    tensors |= {"gate": random_tensor(n, 1, h, w, dtype=dtype)}
    tensors |= {key: random_tensor(case.o, dtype=dtype) for key in ("scale", "shift")}

    def ours(x, weight, bias, mask, **epilogue):
        plan = PixelPlan.from_mask(mask)
        run = ops.sparse_conv_transpose2d if case.transposed else ops.sparse_conv2d
        return run(x, weight, bias, plan, **case.options, activation=activation, **epilogue, backend=FAST)

    def oracle(x, weight, bias, mask, **epilogue):
        run = dense_masked_conv_transpose2d if case.transposed else dense_masked_conv2d
        return run(x, weight, bias, mask, **case.options, activation=activation, **epilogue)

    compare(ours, oracle, tensors, grads=(), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 90])
def test_rows(kind, capacity):
    """gather_pixels and scatter_pixels move values and change none."""
    for channels in (1, 3, 64):
        x = random_tensor(2, channels, 9, 10, dtype=DTYPES[kind]).to(DEVICE)
        mask = random_mask((2, 9, 10), 0.4)
        live, plan = kept(mask, capacity).to(DEVICE), PixelPlan.from_mask(mask.to(DEVICE), capacity)
        for layout in (torch.contiguous_format, torch.channels_last):
            x, base = x.to(memory_format=layout), x.flip(0).to(memory_format=layout)
            rows = ops.gather_pixels(x, plan)
            expected = x.permute(0, 2, 3, 1)[live]
            assert_same(rows[: len(expected)], expected)
            assert bool((rows[len(expected) :] == 0).all())
            assert_same(ops.scatter_pixels(rows, plan), torch.where(live[:, None], x, 0))
            assert_same(ops.scatter_pixels(rows, plan, base), torch.where(live[:, None], x, base))
