"""Expert ops under hostile values, indices, threads, compilers and sizes."""

import pytest
import torch
from expert_cases import CASES, Case, assert_close, linear_oracle
from processes import assert_same_on_any_threads

from dynops import ExpertPlan, ops
from dynops.ops.experts.quantized import QuantizedExperts
from dynops.testing import available_backends, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = available_backends()
D = torch.ops.dynops
NAN = float("nan")

backends = pytest.mark.parametrize("backend", BACKENDS)
needs_binary = pytest.mark.skipif("cpp" not in BACKENDS, reason="about the binary")


def layer(case: Case, dtype=torch.float32):
    """A plan, its choices, and everything that an MLP reads."""
    index = case.index()
    return ExpertPlan.from_topk(index, case.experts), index, case.mlp_tensors(dtype=dtype)


def all_results(plan, tensors, backend) -> list[torch.Tensor]:
    """The fused MLP, then the composed one with all its gradients."""
    fused = ops.experts_mlp(plan=plan, backend=backend, **tensors)
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    out = ops.experts_mlp(plan=plan, backend=backend, **leaves)
    return [fused, out.detach(), *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [6, 60])
def test_what_is_dropped_is_never_read(tokens, dtype, backend):
    """Neither tokens without a choice, weights of dropped pairs, nor experts that nobody chose."""
    case = Case(tokens=tokens, experts=5, kind="some dropped")
    index = case.index().masked_fill(case.index() == 3, 5)
    index[index == 3] = 5
    index[::3] = 5
    plan, clean = ExpertPlan.from_topk(index, 5), case.mlp_tensors(dtype=dtype)
    dirty = {k: t.clone() for k, t in clean.items()}
    dirty["x"][::3] = NAN
    dirty["topk_weight"][index == 5] = NAN
    for name in ("up", "down", "up_bias", "down_bias"):
        dirty[name][3] = NAN
    for a, b in zip(*(all_results(plan, t, backend) for t in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("tokens", [6, 60])
def test_nan_reaches_its_own_token_only(tokens, backend):
    plan, _, tensors = layer(Case(tokens=tokens))
    tensors["x"][2, 5] = NAN
    out = ops.experts_mlp(plan=plan, backend=backend, **tensors)
    assert out[2].isnan().all() and int(out.isnan().sum()) == out.shape[1]


@backends
def test_packed_rows_of_dropped_pairs_are_zero_and_not_read(backend):
    case = CASES["some dropped"]
    index = case.index()
    plan, rows = ExpertPlan.from_topk(index, case.experts), case.rows(case.inputs, True)
    kept = int(plan.offsets[-1])
    assert kept < plan.num_rows
    dirty = rows.clone()
    dirty[kept:] = NAN
    weight, bias = case.weight(case.outputs, case.inputs), random_tensor(case.experts, case.outputs)
    results = []
    for x in (rows, dirty):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = ops.grouped_linear(leaves[0], leaves[1], plan, leaves[2], packed_in=True, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).index_fill(0, torch.arange(kept, plan.num_rows), NAN))])  # fmt: skip
        results[-1].append(ops.combine_pairs(x, plan, backend=backend))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][0][kept:].abs().sum() == 0 and results[0][1][kept:].abs().sum() == 0


@backends
@pytest.mark.parametrize("packed_out", [False, True])
def test_nan_weights_of_dropped_pairs_reach_nothing(packed_out, backend):
    """Nor where the op is composed: with an activation and gradients, with the gradient of packed rows."""
    case = CASES["some dropped"]
    index = case.index()
    plan, rows = ExpertPlan.from_topk(index, case.experts), case.rows(case.inputs, True)
    weight, shares = case.weight(case.outputs, case.inputs), torch.rand(index.shape)
    results = []
    for given in (shares, shares.masked_fill(index == case.experts, NAN)):
        leaves = [t.detach().clone().requires_grad_() for t in (rows, weight, given)]
        options = {"topk_weight": leaves[2], "packed_in": True, "packed_out": packed_out, "backend": backend}
        for activation in (None, "silu"):
            out = ops.grouped_linear(*leaves[:2], plan, activation=activation, **options)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert torch.equal(a, b)


@backends
def test_experts_without_rows_get_a_gradient_of_zero(backend):
    plan, _, tensors = layer(CASES["all to one"])
    grads = dict(zip(tensors, all_results(plan, tensors, backend)[2:], strict=True))
    for name in ("up", "down", "up_bias", "down_bias"):
        others = torch.arange(4) != 2
        assert grads[name][others].abs().sum() == 0 and grads[name][2].abs().sum() > 0


@needs_binary
@pytest.mark.parametrize(
    "name", ["one token", "few rows", "many rows", "blocks of rows", "more experts than rows"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_nothing(dtype, name):
    plan, _, tensors = layer(CASES[name], dtype)
    assert_same_on_any_threads(lambda: all_results(plan, tensors, "cpp"), (1, 2, 3, 1))


@needs_binary
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [2, 50])
def test_a_weight_past_two_to_the_31_elements(tokens, transposed):
    """Of bytes whose pages are touched for two experts only: the address of the last one needs 64 bits."""
    experts, inputs, outputs = 1100, 512, 4096
    size = (inputs, outputs) if transposed else (outputs, inputs)
    torch.use_deterministic_algorithms(False)  # poison would touch all of it; the fixture puts it back
    weight = torch.empty(experts, *size, dtype=torch.int8)
    assert weight.numel() > 2**31
    scale, index = (
        torch.full((experts, outputs), 0.01),
        torch.tensor([[experts - 1], [1030]]).repeat(tokens // 2, 1),
    )
    for e in (experts - 1, 1030):
        weight[e] = torch.randint(-127, 128, size, dtype=torch.int8)
    x = random_tensor(tokens, inputs)
    plan = ExpertPlan.from_topk(index, experts)
    out = ops.grouped_linear(x, QuantizedExperts(weight, scale), plan, packed_out=False, transposed=transposed, backend="cpp")  # fmt: skip
    where = (index == experts - 1).long()
    few = weight[torch.tensor([1030, experts - 1])]
    exact, dense = (
        linear_oracle(
            x.to(t), few.to(t) * scale[0, 0].to(t), index=where, packed_out=False, transposed=transposed
        )
        for t in (torch.float64, torch.float32)
    )
    assert_close(out, exact, dense, "output")


@backends
@pytest.mark.parametrize("inputs, outputs", [(0, 5), (5, 0), (0, 0)])
def test_no_columns(inputs, outputs, backend):
    case = Case(inputs=inputs, outputs=outputs)
    index = case.index()
    plan, tensors = ExpertPlan.from_topk(index, 4), case.linear_tensors()
    for packed in (False, True):
        out = ops.grouped_linear(plan=plan, packed_out=packed, backend=backend, **tensors)
        torch.testing.assert_close(out, linear_oracle(index=index, packed_out=packed, **tensors))


def wrong_plans():
    plan = ExpertPlan.from_topk(torch.tensor([[0, 1], [2, 0]]), 3)
    parts = plan.order, plan.offsets, plan.position
    for at, value in ((0, 4), (0, -1), (1, 5), (1, -1), (2, 4), (2, -2)):
        changed = [t.clone() for t in parts]
        changed[at].view(-1)[-1] = value
        yield changed
    down = [t.clone() for t in parts]
    down[1][1] = 4
    yield down
    late = [t.clone() for t in parts]
    late[1][0] = 1
    yield late


@needs_binary
@pytest.mark.parametrize("order, offsets, position", list(wrong_plans()))
def test_no_wrong_index_reaches_a_kernel(order, offsets, position):
    x, rows, dy, weight = (random_tensor(*size) for size in ((2, 6), (4, 6), (2, 5), (3, 5, 6)))
    plan = order, offsets, position
    for call in (
        lambda: D.grouped_weight_grad(dy, x, None, *plan, False, False, False, True, "cpp"),
        lambda: D.gather_pairs(x, None, *plan, "cpp"),
        lambda: D.combine_pairs(rows, None, *plan, "cpp"),
        lambda: D.pair_dots(x, rows, False, *plan, "cpp"),
    ):
        with pytest.raises(RuntimeError, match=r"order|offsets|position"):
            call()
    if int(position.max()) < 4 and int(position.min()) >= -1:  # which these two do not read
        with pytest.raises(RuntimeError, match=r"order|offsets"):
            D.grouped_linear(x, weight, None, None, None, *plan, False, False, False, "", "cpp")
        with pytest.raises(RuntimeError, match=r"order|offsets"):
            D.experts_mlp(x, weight, weight.mT.contiguous(), *[None] * 5, *plan, "silu", False, False, False, False, 1.0, 1.0, "cpp")  # fmt: skip
