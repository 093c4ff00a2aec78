"""Values of the pixel kernels in Triton's interpreter. Run by ``test_triton_interpreter.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from yardstick import torch_weight_grads

from dynops import PixelPlan, ops
from dynops.geometry import ConvGeometry
from dynops.kernels.epilogue import Epilogue
from dynops.kernels.layout import empty_map, memory_format_of
from dynops.kernels.triton import gemm, pixels, rows, tiling
from dynops.ops.pixels import conv as reference
from dynops.testing import assert_within_budget, random_mask, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A convolution, its plan and the form of its tensors."""

    c: int = 20
    o: int = 24
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    pad: tuple = (1, 1)
    dil: tuple = (1, 1)
    groups: int = 1
    extra: int | None = None  # not None: a transposed convolution with this output_padding
    n: int = 2
    h: int = 7
    w: int = 6
    mask: str = "random"
    packed_in: bool = False
    packed_out: bool = False
    capacity: int | None = None
    nchw: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.pad, self.dil, strict=True)
        if self.extra is None:
            out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        else:
            out = [(size - 1) * s - 2 * p + d * (k - 1) + self.extra + 1 for size, k, s, p, d in sizes]
        steps = (*self.kernel, *self.stride, *self.pad, *self.dil, self.groups, int(self.extra is not None))
        return ConvGeometry(self.n, self.h, self.w, *out, *steps)


CASES = {
    "3x3": Case(),
    "1x1": Case(kernel=(1, 1), pad=(0, 0)),
    "1x1-stride": Case(kernel=(1, 1), pad=(0, 0), stride=(2, 2)),
    "stride": Case(stride=(2, 2), nchw=True),
    "uneven": Case(kernel=(3, 2), stride=(2, 1), pad=(0, 1), dil=(1, 2)),
    "dilation": Case(dil=(2, 2), pad=(2, 2)),
    "5x5": Case(kernel=(5, 5), pad=(2, 2)),  # int32 tap sets
    "7x7": Case(kernel=(7, 7), pad=(3, 3), c=5, o=6),  # int64 tap sets
    "9x7": Case(kernel=(9, 7), pad=(4, 3), c=5, o=6),  # more taps than a set holds
    "groups": Case(c=32, o=48, groups=2),
    "narrow-groups": Case(c=12, o=18, groups=6),
    "depthwise": Case(c=21, o=21, groups=21),
    "depthwise-multiplier": Case(c=10, o=30, groups=10, stride=(2, 2)),
    "wide": Case(c=70, o=130, n=1, h=5, w=5),
    "one-channel": Case(c=1, o=1),
    "transposed": Case(extra=0, pad=(0, 0)),
    "transposed-stride": Case(extra=1, stride=(2, 2)),
    "transposed-2x2": Case(extra=0, kernel=(2, 2), stride=(2, 2), pad=(0, 0), nchw=True),
    "transposed-groups": Case(extra=1, stride=(2, 2), c=32, o=48, groups=2),
    "transposed-depthwise": Case(extra=1, stride=(2, 2), c=18, o=18, groups=18),
    "packed-in": Case(packed_in=True),
    "packed-out": Case(packed_out=True),
    "packed": Case(packed_in=True, packed_out=True, stride=(2, 2)),
    "packed-depthwise": Case(packed_in=True, packed_out=True, c=9, o=9, groups=9),
    "packed-1x1": Case(packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0)),
    "packed-transposed": Case(packed_in=True, packed_out=True, extra=1, stride=(2, 2)),
    "capacity": Case(capacity=60),
    "capacity-exceeded": Case(capacity=16),
    "capacity-packed": Case(capacity=60, packed_in=True, packed_out=True),
    "capacity-transposed": Case(capacity=200, extra=1, stride=(2, 2), packed_out=True),
    "capacity-depthwise": Case(capacity=60, c=9, o=9, groups=9, packed_out=True),
    "capacity-empty": Case(capacity=8, mask="empty", packed_out=True),
    "empty": Case(mask="empty"),
    "one": Case(mask="one"),
    "full": Case(mask="full"),
    "square": Case(mask="square", n=3, h=9, w=9),
    "no-images": Case(n=0),
}
HALF = ("3x3", "stride", "groups", "depthwise", "transposed-stride", "packed", "capacity")
EXAMPLES = [(name, dtype) for dtype in DTYPES for name in (CASES if dtype == torch.float32 else HALF)]
of_cases = pytest.mark.parametrize("name,dtype", EXAMPLES, ids=[f"{n}-{str(d)[6:]}" for n, d in EXAMPLES])


def mask_of(shape, density: float, kind: str) -> torch.Tensor:
    """``random_mask``, of which "last" is a kind too: random, and the last pixel of the buffer."""
    mask = random_mask(shape, density, "random" if kind == "last" else kind)
    mask.view(-1)[-1:] |= kind == "last"
    return mask


class Inputs:
    """The tensors of a case; ``double`` gives the same ones in float64."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.g, self.dtype = case, case.geometry, dtype
        self.plan = PixelPlan.from_mask(mask_of(self.g.out_shape, 0.4, case.mask), case.capacity)
        in_plan = None
        if case.packed_in:
            in_capacity = case.capacity and self.g.batch * self.g.in_h * self.g.in_w
            in_mask = mask_of(self.g.in_shape, 0.6, "last" if case.mask == "last" else "random")
            in_plan = PixelPlan.from_mask(in_mask, in_capacity)
        self.source = None if in_plan is None else in_plan.inverse()
        inner = case.o if case.extra is not None else case.c
        lead = case.c if case.extra is not None else case.o
        self.weight = random_tensor(lead, inner // case.groups, *case.kernel, dtype=dtype)
        self.x = self.map_or_rows(in_plan, case.c, self.g.in_shape)
        self.grad = self.map_or_rows(self.plan if case.packed_out else None, case.o, self.g.out_shape)
        self.live = self.plan.index >= 0  # [P]

    def map_or_rows(self, plan, channels: int, shape):
        if plan is not None:  # what lies past the count must not be read
            rows = random_tensor(plan.num_rows, channels, dtype=self.dtype)
            return torch.where((plan.index >= 0)[:, None], rows, float("nan"))
        x = random_tensor(shape[0], channels, *shape[1:], dtype=self.dtype)
        return x if self.case.nchw else x.to(memory_format=torch.channels_last)

    def conv(self, run, double: bool = False, **changes):
        x, weight = (t.double() if double else t for t in (self.x, self.weight))
        names = ("bias", "activation", "scale", "shift", "gate", "residual", "base")
        given = {name: changes.get(name) for name in names}
        if double:
            given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        out = run(
            x, weight, given["bias"], self.plan.index, self.plan.count, self.source, list(self.g),
            Epilogue(given["activation"] or "", *(given[name] for name in names[2:-1])), given["base"],
            self.case.packed_out,
        )  # fmt: skip
        if not self.case.packed_out:
            return out
        if run is pixels.conv:
            assert not out[~self.live].any(), "rows past the count are zero"
        return out[self.live]

    def input_grad(self, run, double: bool = False):
        grad, weight = (t.double() if double else t for t in (self.grad, self.weight))
        rows = self.x.shape[0] if self.case.packed_in else 0
        return run(
            self.clean(run, grad), weight, self.plan.index, self.plan.count, self.source, rows, list(self.g),
            self.case.packed_out,
        )  # fmt: skip

    def weight_grad(self, run, double: bool = False):
        grad, x = (t.double() if double else t for t in (self.grad, self.x))
        return run(
            self.clean(run, grad), self.clean(run, x), self.plan.index, self.plan.count, self.source,
            list(self.weight.shape), list(self.g), self.case.packed_out,
        )  # fmt: skip

    def clean(self, run, value):
        """The reference multiplies unused rows by zero and needs them finite; the kernels skip them."""
        return value if run.__module__.startswith("dynops.kernels") else value.nan_to_num(0)


def check(method, kernel, plain, **changes):
    """``method`` with the kernel, against the reference in float64 and in the same dtype."""
    with torch_weight_grads():
        dense = method(plain, **changes)
    results = method(kernel, **changes), method(plain, True, **changes), dense
    for value in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert_within_budget(*value)


@of_cases
def test_forward(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(inputs.conv, pixels.conv, reference._conv, bias=random_tensor(CASES[name].o, dtype=dtype))
    if not CASES[name].packed_out and not CASES[name].packed_in:
        assert memory_format_of(inputs.conv(pixels.conv)) == memory_format_of(inputs.x)


@of_cases
def test_input_grad(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)


@of_cases
def test_weight_grad(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check(inputs.weight_grad, pixels.conv_weight_grad, reference._conv_weight_grad)


@pytest.mark.parametrize(
    "activation", ["", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2"]
)
@pytest.mark.parametrize("name", ["3x3", "depthwise", "packed", "transposed-stride"])
def test_epilogue(name, activation):
    for dtype in DTYPES if name == "3x3" else DTYPES[:1]:
        inputs, channels = Inputs(CASES[name], dtype), CASES[name].o
        rows, g = inputs.plan.num_rows, inputs.g
        changes = {k: random_tensor(channels, dtype=dtype) for k in ("bias", "scale", "shift")}
        changes |= {
            "gate": random_tensor(rows, dtype=dtype),
            "residual": random_tensor(rows, channels, dtype=dtype),
        }
        if not CASES[name].packed_out:
            changes["base"] = random_tensor(g.batch, channels, g.out_h, g.out_w, dtype=dtype)
        check(inputs.conv, pixels.conv, reference._conv, activation=activation, **changes)


def test_nan_passes_through_every_activation():
    inputs = Inputs(replace(CASES["1x1"], mask="full"), torch.float32)
    inputs.x[0, 0, 0, 0] = float("nan")
    for activation in ("", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2"):
        assert inputs.conv(pixels.conv, activation=activation)[0, :, 0, 0].isnan().all(), activation


@pytest.mark.parametrize("name", ["3x3", "packed", "depthwise", "transposed-stride", "capacity"])
@pytest.mark.parametrize("limit", ["int64-offsets", "small-tiles"])
def test_other_configurations(name, limit, monkeypatch):
    """The 64-bit offsets that tensors past 2**31 elements take, and the tiles of small problems."""
    if limit == "int64-offsets":
        monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    else:
        monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    inputs = Inputs(CASES[name], torch.float32)
    check(inputs.conv, pixels.conv, reference._conv)
    check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    check(inputs.weight_grad, pixels.conv_weight_grad, reference._conv_weight_grad)


@pytest.mark.parametrize("name", ["3x3", "groups", "transposed-stride", "packed", "capacity", "wide"])
def test_weights_by_tma(name, monkeypatch):
    """The boxes in which sm_90 fetches weights. What lies beside a box's own part is NaN or another group's."""
    case = replace(CASES[name], c=64 if name == "wide" else 32, o=40)
    boxes, from_tensor = [], gemm.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        gemm.TensorDescriptor, "from_tensor", lambda *given: boxes.append(given) or from_tensor(*given)
    )
    for processors in (1, 64) if name == "3x3" else (64,):
        monkeypatch.setattr(tiling, "device_facts", lambda device, n=processors: (90, n))
        inputs = Inputs(case, torch.bfloat16)
        check(inputs.conv, pixels.conv, reference._conv)
        check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    assert len(boxes) == (2 if name == "3x3" else 1), "one for the forward product of each run"


SPLIT = [(name, torch.float32) for name in ("groups", "dilation", "packed-in", "packed-out", "capacity", "capacity-packed", "empty")]  # fmt: skip


@pytest.mark.parametrize("name,dtype", [*SPLIT, ("3x3", torch.bfloat16)])
def test_split_reductions(name, dtype, monkeypatch):
    """Few rows: the reduction in parts, whose sums are added and finished by a second kernel."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    split, choose = [], tiling.parts
    monkeypatch.setattr(tiling, "parts", lambda *given: split.append(choose(*given)) or split[-1])
    case, packed = replace(CASES[name], c=72, o=36 if name == "groups" else 20), CASES[name].packed_out
    inputs = Inputs(case, dtype)
    rows, g = inputs.plan.num_rows, inputs.g
    changes = {key: random_tensor(case.o, dtype=dtype) for key in ("bias", "scale", "shift")}
    changes |= {
        "gate": random_tensor(rows, dtype=dtype),
        "residual": random_tensor(rows, case.o, dtype=dtype),
    }
    if not packed:
        changes["base"] = random_tensor(g.batch, case.o, g.out_h, g.out_w, dtype=dtype)
    check(inputs.conv, pixels.conv, reference._conv, activation="relu", **changes)
    assert name == "empty" or max(split) > 1


@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise", "transposed-stride", "packed-in", "capacity", "empty", "full", "one", "no-images"])  # fmt: skip
def test_filled_beside(name, monkeypatch):
    """The fill of a large map, which writes where the plan has no pixel and nowhere else."""
    monkeypatch.setattr(rows, "_LARGE", 1)
    inputs = Inputs(CASES[name], torch.float32)
    g = inputs.g
    base = random_tensor(g.batch, CASES[name].o, g.out_h, g.out_w)
    for value in (None, base):
        check(inputs.conv, pixels.conv, reference._conv, base=value)
    check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    out = empty_map(base, base.shape, torch.channels_last)
    with rows.filled(out, base, inputs.plan.index, inputs.plan.count):
        assert out.permute(0, 2, 3, 1)[inputs.plan.mask()].isnan().all(), "an active pixel was written"


def test_programs_walk_over_tiles(monkeypatch):
    """A capacity form with more tiles than programs: each walks over several."""
    monkeypatch.setattr(tiling, "resident", lambda device: 2)
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    monkeypatch.setattr(tiling, "parts", lambda *given: 1)
    for name in ("capacity", "capacity-packed", "capacity-exceeded", "capacity-transposed", "capacity-empty"):
        case = replace(CASES[name], n=3, h=11, w=11, capacity=CASES[name].capacity * 5)
        inputs = Inputs(case, torch.float32)
        check(inputs.conv, pixels.conv, reference._conv, bias=random_tensor(case.o))


def test_many_slices_of_rows(monkeypatch):
    """A weight gradient whose rows are split among programs and added in a second pass."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    for name in ("3x3", "depthwise"):
        inputs = Inputs(replace(CASES[name], h=14, w=14, mask="full"), torch.float32)
        check(inputs.weight_grad, pixels.conv_weight_grad, reference._conv_weight_grad)


def test_input_gradient_walks_over_the_taps_of_active_outputs():
    """The work of a tile is the union of its rows' taps; the docstring of kernels/pixels.py has the numbers."""
    g = ConvGeometry(8, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    plan = PixelPlan.from_mask(random_mask(g.out_shape, 0.5))
    active = plan.inverse()
    options = {"READS": "active", "WIDE": False, **gemm.geometry_arguments(gemm.adjoint(g))}
    keys, order = gemm.tap_order(None, active, plan.num_pixels, options, active.device)
    sets = keys.int() ^ (keys.int() >> 1)
    read = torch.nn.functional.unfold((active >= 0).float()[:, None], 3, padding=1)  # [N, 9, H*W]
    bits = (read.flip(1).long() << torch.arange(9).view(1, 9, 1)).sum(1).reshape(-1)
    assert torch.equal(sets, bits[order].int())
    union = sets.view(-1, 64).clone()
    while union.shape[1] > 1:
        union = union[:, ::2] | union[:, 1::2]
    walked = sum(int(((union >> tap) & 1).sum()) for tap in range(9)) * 64
    assert walked <= 1.16 * int(read.sum())


def test_results_are_reproducible():
    inputs = Inputs(CASES["stride"], torch.float32)
    for method, kernel in (
        (inputs.conv, pixels.conv),
        (inputs.input_grad, pixels.conv_input_grad),
        (lambda run: inputs.weight_grad(run)[0], pixels.conv_weight_grad),
    ):
        assert torch.equal(method(kernel), method(kernel))


@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [None, 60])
def test_gather_and_scatter(dtype, nchw, capacity):
    x = (random_tensor(2, 19, 7, 6) * 100).to(dtype)
    x = x if nchw else x.to(memory_format=torch.channels_last)
    plan = PixelPlan.from_mask(random_mask((2, 7, 6), 0.4), capacity)
    rows = pixels.gather_rows(x, plan.index, plan.count)
    assert torch.equal(rows, torch.ops.dynops.gather_rows(x, plan.index, plan.count))
    for base in (None, x):
        out = pixels.scatter_rows(rows + 1, plan.index, plan.count, list(plan.shape), base)
        expected = torch.ops.dynops.scatter_rows(rows + 1, plan.index, plan.count, list(plan.shape), base)
        assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_named_backend_runs_the_kernels():
    x, weight, bias = random_tensor(2, 20, 7, 6), random_tensor(24, 20, 3, 3), random_tensor(24)
    plan = PixelPlan.from_mask(random_mask((2, 7, 6), 0.4))
    grads = {}
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = ops.sparse_conv2d(
            leaves[0], leaves[1], leaves[2], plan, padding=1, activation="silu", backend=backend
        )
        out.square().sum().backward()
        grads[backend] = [out, *(t.grad for t in leaves)]
    for got, expected in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
