"""Values of the expert kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

from dataclasses import replace

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from expert_launches import (
    CASES,
    DEVICE,
    HALF,
    NAN,
    PLAIN,
    Case,
    Inputs,
    calling,
    mlp,
    of_cases,
)
from launch_checks import DTYPES, check, check_named_backends

from dynops import ExpertPlan, ops
from dynops.kernels.triton import experts, gemm, tiling
from dynops.ops.experts import activations as expert_activations
from dynops.ops.experts import linear as reference
from dynops.ops.experts import mlp as mlp_reference
from dynops.ops.experts import rows as expert_rows
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


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


@pytest.mark.parametrize(
    "tokens,processors,transposed", [(40, 1, False), (40, 64, False), (40, 64, True), (3, 1, False)]
)
@pytest.mark.parametrize("activation,gated,interleaved", [("silu", True, False), ("gelu", True, True), ("relu2", False, False)])  # fmt: skip
def test_weights_by_tma(activation, gated, interleaved, tokens, transposed, processors, monkeypatch):
    """The boxes in which sm_90 fetches weights. The expert without tokens is NaN and lies beside the others."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, processors))
    boxes, matrix_box = [], gemm.matrix_box
    monkeypatch.setattr(gemm, "matrix_box", lambda *given: boxes.append(given) or matrix_box(*given))
    t, e = tokens, 5
    h, i = (64, 128) if transposed else (40, 24)  # whole boxes; and ragged both ways
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


MANY = (*[0] * 1000, *[1] * 20, *[0] * 500, 40)  # more than are searched at a time


@pytest.mark.parametrize(
    "counts",
    [(0,), (5,), (0, 0, 7, 0), (64, 1, 63, 128, 0, 65), (1,) * 40, MANY],
    ids=lambda counts: len(counts),
)
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
    plan = ExpertPlan.from_topk(index, case.e)

    def call(x, up, down, up_bias, down_bias, weight, backend):
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        return ops.experts_mlp(x, up, down, plan, weight, **biases, backend=backend)

    check_named_backends(call, [t.to(DEVICE) for t in tensors])
