"""Values of the expert kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch

from dynops import ExpertPlan, ops
from dynops.kernels.triton import experts, gemm, tiling
from dynops.ops.experts import activations as expert_activations
from dynops.ops.experts import linear as reference
from dynops.ops.experts import mlp as mlp_reference
from dynops.ops.experts import rows as expert_rows
from dynops.testing import assert_within_budget, random_tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = ("", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2")
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    """A routing and a grouped linear layer.

    ``routing``: "random" (some pairs dropped), "kept" (none), "one" (all to one expert), "dropped" (all are),
    "crowded" (one expert has nearly all rows). ``weight``: "whole", "slice" of a larger one, "shared" by all
    experts, "int8".
    """

    t: int = 9
    k: int = 3
    e: int = 5
    i: int = 20
    o: int = 26
    routing: str = "random"
    capacity: int | None = None
    weight: str = "whole"
    packed_in: bool = False
    packed_out: bool = True
    transposed: bool = False
    weighted: bool = False

    def plan(self) -> ExpertPlan:
        index = torch.randint(0, self.e + (self.routing == "random"), (self.t, self.k))
        if self.routing in ("one", "dropped"):
            index[:] = self.e if self.routing == "dropped" else self.e // 2
        elif self.routing == "crowded":
            index[: self.t - 1] = 1
        return ExpertPlan.from_topk(index.to(DEVICE), self.e, self.capacity)


CASES = {
    "plain": Case(),
    "weighted": Case(weighted=True),
    "summed": Case(packed_out=False),
    "summed-weighted": Case(packed_out=False, weighted=True),
    "one-choice": Case(k=1, packed_out=False, weighted=True),
    "every-expert": Case(k=5, routing="kept", packed_out=False, weighted=True),
    "packed": Case(packed_in=True, weighted=True),
    "packed-in": Case(packed_in=True, packed_out=False, weighted=True),
    "transposed": Case(transposed=True, weighted=True),
    "transposed-packed": Case(transposed=True, packed_in=True, packed_out=False),
    "capacity": Case(capacity=3, packed_out=False, weighted=True),
    "capacity-none": Case(capacity=0, packed_out=False, weighted=True),
    "int8": Case(weight="int8"),
    "int8-transposed": Case(weight="int8", transposed=True, packed_in=True, packed_out=False, weighted=True),
    "slice": Case(weight="slice"),
    "slice-transposed": Case(weight="slice", transposed=True),
    "shared": Case(weight="shared"),
    "aligned": Case(i=32, o=48, t=16, k=2, weighted=True),
    "tall": Case(t=75, k=2, e=3, i=17, o=33),
    "crowded": Case(t=40, k=2, e=7, routing="crowded", weighted=True),
    "one-expert": Case(routing="one"),
    "dropped": Case(routing="dropped", weighted=True),
    "dropped-summed": Case(routing="dropped", packed_out=False),
    "single": Case(t=1, k=1, e=1, i=1, o=1, routing="kept", weighted=True),
    "no-tokens": Case(t=0, packed_out=False),
    "no-inputs": Case(i=0),
    "no-outputs": Case(o=0),
}
HALF = ("weighted", "summed-weighted", "int8", "int8-transposed", "aligned", "one-choice")
EXAMPLES = [(name, dtype) for dtype in DTYPES for name in (CASES if dtype == torch.float32 else HALF)]
of_cases = pytest.mark.parametrize("name,dtype", EXAMPLES, ids=[f"{n}-{str(d)[6:]}" for n, d in EXAMPLES])


def weight_of(case: Case, outputs: int, inputs: int, dtype) -> tuple:
    """The weight and its scale."""
    shape = (case.e, inputs, outputs) if case.transposed else (case.e, outputs, inputs)
    if case.weight == "int8":
        return tuple(ops.quantize_experts(random_tensor(*shape).to(DEVICE), case.transposed))
    weight = random_tensor(*shape, dtype=dtype).to(DEVICE)
    if case.weight == "slice":
        weight = torch.nn.functional.pad(weight, (1, 2, 3, 0, 1, 1), value=NAN)[1:-1, 3:, 1:-2]
    elif case.weight == "shared":
        weight = weight[:1].expand(shape)
    return weight, None


class Inputs:
    """The tensors of a case. Rows that only dropped pairs name are NaN, and must not be read."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.dtype, self.plan = case, dtype, case.plan()
        self.indices = (self.plan.order, self.plan.offsets, self.plan.position)
        self.weight, self.scale = weight_of(case, case.o, case.i, dtype)
        self.bias = random_tensor(case.e, case.o, dtype=dtype).to(DEVICE)
        self.row_weight = random_tensor(case.t, case.k).to(DEVICE) if case.weighted else None
        self.x = self.rows(case.i, case.packed_in)
        self.grad = self.rows(case.o, case.packed_out)

    def rows(self, size: int, packed: bool):
        live = self.plan.expert < self.plan.num_experts if packed else (self.plan.position >= 0).any(1)
        return torch.where(live[:, None], random_tensor(len(live), size, dtype=self.dtype).to(DEVICE), NAN).to(self.dtype)  # fmt: skip

    def linear(self, run, double: bool = False, activation: str = ""):
        tensors = (self.x, self.weight, self.scale, self.bias, self.row_weight)
        options = (self.case.packed_in, self.case.packed_out, self.case.transposed, activation)
        return run(*wide(tensors, double), *self.indices, *options)

    def weight_grad(self, run, double: bool = False):
        options = (self.case.packed_out, self.case.packed_in, self.case.transposed, True)
        return run(*wide((self.grad, self.x, self.row_weight), double), *self.indices, *options)


def wide(tensors, double: bool) -> list:
    """The tensors, floating ones in float64 where that is wanted."""
    return [t.double() if double and t is not None and t.is_floating_point() else t for t in tensors]


def calling(tensors, *others):
    """A method for :func:`check`: the kernel or the reference called with these."""
    return lambda run, double=False: run(*wide(tensors, double), *others)


def check(method, kernel, plain, **changes):
    """``method`` with the kernel, against the reference in float64 and in the same dtype."""
    results = method(kernel, **changes), method(plain, True, **changes), method(plain, **changes)
    for value in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert_within_budget(*value)


@of_cases
def test_linear(name, dtype):
    check(Inputs(CASES[name], dtype).linear, experts.linear, reference._linear, activation="silu")


@of_cases
def test_weight_grad(name, dtype):
    check(Inputs(CASES[name], dtype).weight_grad, experts.weight_grad, reference._weight_grad)


@pytest.mark.parametrize("activation", PLAIN)
def test_linear_activations(activation):
    check(Inputs(CASES["plain"], torch.float32).linear, experts.linear, reference._linear, activation=activation)  # fmt: skip


@pytest.mark.parametrize("name", ["summed-weighted", "transposed-packed", "int8", "one-choice"])
@pytest.mark.parametrize("limit", ["int64-offsets", "small-tiles", "slices"])
def test_other_configurations(name, limit, monkeypatch):
    """The 64-bit offsets that tensors past 2**31 elements take, the tiles of small problems, experts' rows split
    among programs."""
    if limit == "int64-offsets":
        monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    processors = {"int64-offsets": 1, "small-tiles": 10**6, "slices": 64}[limit]
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, processors))
    inputs = Inputs(replace(CASES[name], t=150, e=2, i=6, o=6) if limit == "slices" else CASES[name], torch.float32)  # fmt: skip
    check(inputs.linear, experts.linear, reference._linear)
    check(inputs.weight_grad, experts.weight_grad, reference._weight_grad)


def mlp(case: Case, dtype, activation, gated, interleaved, bias: bool):
    """The MLP of a case, whose ``o`` is the inner size, as a method for :func:`check`."""
    inputs, columns = Inputs(case, dtype), case.o * (2 if gated else 1)
    up, up_scale = weight_of(case, columns, case.i, dtype)
    down, down_scale = weight_of(case, case.i, case.o, dtype)
    biases = [random_tensor(case.e, n, dtype=dtype).to(DEVICE) if bias else None for n in (columns, case.i)]
    options = (activation, gated, interleaved, case.transposed, case.transposed, 1.702, 0.7)
    tensors = (inputs.x, up, down, up_scale, down_scale, *biases, inputs.row_weight)
    return calling(tensors, *inputs.indices, *options)


@pytest.mark.parametrize("processors,transposed", [(1, False), (64, False), (64, True)])
@pytest.mark.parametrize("activation,gated,interleaved", [("silu", True, False), ("gelu", True, True), ("relu2", False, False)])  # fmt: skip
def test_weights_by_tma(activation, gated, interleaved, transposed, processors, monkeypatch):
    """The boxes in which sm_90 fetches weights. The expert without tokens is NaN and lies beside the others."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, processors))
    boxes, from_tensor = [], gemm.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        gemm.TensorDescriptor, "from_tensor", lambda *given: boxes.append(given) or from_tensor(*given)
    )
    t, h, i, e = (40, 64, 128, 5) if transposed else (40, 40, 24, 5)  # whole boxes; and ragged both ways
    index = torch.randint(0, e - 1, (t, 2))
    plan = ExpertPlan.from_topk(torch.where(index >= 2, index + 1, index).to(DEVICE), e)
    shapes = (e, (2 * i if gated else i), h), (e, h, i)
    up, down = (random_tensor(*shape, dtype=torch.bfloat16).to(DEVICE) for shape in shapes)
    up[2], down[2] = NAN, NAN
    if transposed:
        up, down = (weight.mT.contiguous() for weight in (up, down))
    biases = (random_tensor(e, n, dtype=torch.bfloat16).to(DEVICE) for n in (shapes[0][1], h))
    x, weights = random_tensor(t, h, dtype=torch.bfloat16).to(DEVICE), random_tensor(t, 2).to(DEVICE)
    options = (activation, gated, interleaved, transposed, transposed, 1.702, 0.7)
    tensors = (x, up, down, None, None, *biases, weights)
    check(
        calling(tensors, plan.order, plan.offsets, plan.position, *options), experts.mlp, mlp_reference._mlp
    )
    halves_of_8 = (
        gated and not interleaved and not transposed and processors > 1
    )  # columns: too few for a box
    assert len(boxes) == (1 if halves_of_8 else 2)


MLPS = [
    ("summed-weighted", "silu", True, False),
    ("summed-weighted", "gelu", True, True),
    ("summed-weighted", "relu2", False, False),
    ("capacity", "clamped_swiglu", True, True),
    ("transposed", "clamped_swiglu", True, True),
    ("transposed", "gelu_tanh", True, False),
    ("int8-transposed", "silu", True, True),
    ("int8", "silu", True, False),
    ("aligned", "silu", True, False),
    ("aligned", "clamped_swiglu", True, True),
    ("one-choice", "hardswish", True, False),
    ("dropped", "silu", True, False),
    ("no-tokens", "silu", True, False),
    ("single", "", True, False),
]


@pytest.mark.parametrize("name,activation,gated,interleaved", MLPS)
def test_mlp(name, activation, gated, interleaved):
    case = replace(CASES[name], packed_in=False, packed_out=False)
    for dtype, bias in zip(DTYPES if name in HALF else DTYPES[:1], (True, False, True), strict=False):
        check(mlp(case, dtype, activation, gated, interleaved, bias), experts.mlp, mlp_reference._mlp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", (*PLAIN, "clamped_swiglu"))
def test_activation(activation, dtype):
    forms = [(True, False), (True, True), (False, False)][: 2 if activation == "clamped_swiglu" else 3]
    for gated, interleaved in forms:
        z = 4 * random_tensor(9, 2 * 21, dtype=dtype).to(DEVICE)
        grad = random_tensor(9, 21 if gated else 42, dtype=dtype).to(DEVICE)
        options = (activation, gated, interleaved, 1.702, 2.1)
        for kernel, plain, tensors in (
            (experts.activation, expert_activations._activation, (z,)),
            (experts.activation_grad, expert_activations._activation_grad, (grad, z)),
        ):
            check(calling(tensors, *options), kernel, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "weighted", "one-choice", "capacity", "dropped", "no-tokens", "tall"]
)
def test_rows(name, dtype):
    inputs = Inputs(replace(CASES[name], packed_in=False, packed_out=True), dtype)
    check(calling((inputs.x, inputs.row_weight), *inputs.indices), experts.gather, expert_rows._gather)
    check(calling((inputs.grad, inputs.row_weight), *inputs.indices), experts.combine, expert_rows._combine)
    for packed in (False, True):
        x = inputs.rows(inputs.case.o, packed)
        x = x if packed else x.nan_to_num(1.0)  # the reference reads each token
        method = calling((x, inputs.grad), packed, *inputs.indices)
        check(method, experts.dots, expert_rows._dots)


def test_nan_of_dropped_pairs_is_not_read():
    """Neither a token without a pair nor the weight of a dropped one; the reference multiplies before it drops."""
    inputs = Inputs(CASES["summed-weighted"], torch.float32)
    dropped = inputs.plan.position < 0
    assert dropped.any() and not dropped.all()
    inputs.row_weight = inputs.row_weight.masked_fill(dropped, NAN)
    x = inputs.x.masked_fill(dropped.all(1)[:, None], NAN)
    rows = experts.gather(x, inputs.row_weight, *inputs.indices)
    results = [inputs.linear(experts.linear), *inputs.weight_grad(experts.weight_grad), rows]
    results += [
        experts.combine(rows, inputs.row_weight, *inputs.indices),
        experts.dots(x, rows, False, *inputs.indices),
    ]
    assert all(result.isfinite().all() for result in results)


def test_results_are_reproducible():
    inputs = Inputs(CASES["summed-weighted"], torch.float32)
    for method, kernel in ((inputs.linear, experts.linear), (lambda run: inputs.weight_grad(run)[0], experts.weight_grad)):  # fmt: skip
        assert torch.equal(method(kernel), method(kernel))


@pytest.mark.parametrize("counts", [(0,), (5,), (0, 0, 7, 0), (64, 1, 63, 128, 0, 65), (1,) * 40])
def test_every_row_has_one_tile(counts):
    """Whatever the counts and the tile: results of an identity weight are the rows themselves."""
    index = torch.cat([torch.full((n,), e) for e, n in enumerate((*counts, 3))])
    index = index[torch.randperm(len(index))].to(DEVICE)
    plan = ExpertPlan.from_topk(index, len(counts))
    x, weight = (
        random_tensor(len(index), 16).to(DEVICE),
        torch.eye(16, device=DEVICE).expand(len(counts), 16, 16),
    )
    indices = (plan.order, plan.offsets, plan.position)
    for packed_out in (True, False):
        got = experts.linear(x, weight, None, None, None, *indices, False, packed_out, False, "")
        live = (plan.expert if packed_out else index) < len(counts)
        assert torch.equal(got, torch.where(live[:, None], x[plan.token] if packed_out else x, 0))


def test_named_backend_runs_the_kernels():
    case = Case(t=7, i=16, o=24)
    index, tensors = torch.randint(0, case.e + 1, (7, 3)).to(DEVICE), [
        random_tensor(*shape) for shape in ((7, 16), (5, 48, 16), (5, 16, 24), (5, 48), (5, 16), (7, 3))
    ]  # fmt: skip
    plan, results = ExpertPlan.from_topk(index, case.e), {}
    for backend in ("triton", "reference"):
        x, up, down, up_bias, down_bias, weight = leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
        options = {"up_bias": up_bias, "down_bias": down_bias, "backend": backend}
        out = ops.experts_mlp(x, up, down, plan, weight, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        with torch.no_grad():
            results[backend] = [out, ops.experts_mlp(x, up, down, plan, weight, **options), *grads]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
