"""Expert ops under hostile values, indices, threads, compilers and sizes."""

from __future__ import annotations

import pytest
import torch
from expert_cases import CASES, Case, assert_close, compare, linear_oracle, mlp_oracle
from processes import all_isas, in_threads, run_script

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


# ----------------------------------------------------------------------- what is read and written


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


@backends
def test_tied_weights(backend):
    """One tensor for all experts, and the same one for up and down."""
    case = Case(inputs=20, outputs=20, tokens=30)
    index = case.index()
    plan = ExpertPlan.from_topk(index, 4)
    tensors = {"x": case.rows(20), "weight": random_tensor(20, 20) / 4}

    def tied(run, x, weight, **rest):
        every = weight.expand(4, 20, 20)
        return run(x, every, every, gated=False, **rest)

    compare(
        lambda **t: tied(ops.experts_mlp, plan=plan, backend=backend, **t),
        lambda **t: tied(mlp_oracle, index=index, **t),
        tensors,
    )


@backends
def test_inputs_are_not_altered(backend):
    plan, _, tensors = layer(CASES["some dropped"])
    before = {k: t.clone() for k, t in tensors.items()}
    indices = [t.clone() for t in (plan.order, plan.offsets, plan.position)]
    all_results(plan, tensors, backend)
    assert all(torch.equal(tensors[k], before[k]) for k in before)
    for a, b in zip(indices, (plan.order, plan.offsets, plan.position), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------- threads, machines


@needs_binary
@pytest.mark.parametrize(
    "name", ["one token", "few rows", "many rows", "blocks of rows", "more experts than rows"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_nothing(dtype, name):
    plan, _, tensors = layer(CASES[name], dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(all_results(plan, tensors, "cpp"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@backends
def test_two_threads_at_once(backend):
    plan, _, tensors = layer(CASES["many rows"])
    expected = all_results(plan, tensors, backend)

    def work(i):
        for _ in range(5):
            found = all_results(plan, tensors, backend)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    in_threads(2, work)


ISA_SCRIPT = """
    import os, sys
    import torch
    from expert_cases import CASES
    from test_experts import check_linear, check_mlp
    import dynops

    torch.manual_seed(0)
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in ("one token", "odd", "many rows", "some dropped"):
            case = CASES[name]
            for flip in (False, True):
                tensors = case.linear_tensors(flip, flip, dtype)
                check_linear(case, "cpp", tensors, packed_in=flip, transposed=flip, packed_out=not flip)
                tensors = case.mlp_tensors(dtype=dtype)
                for grads in ((), None):
                    check_mlp(case, "cpp", tensors, grads, interleaved=flip, activation="gelu" if flip else "silu")
    print(dynops.build_info()["cpu_isa"])
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    if isa not in all_isas():
        pytest.skip(f"{isa}: not built, or not on this CPU")
    assert run_script(ISA_SCRIPT, DYNOPS_CPU_ISA=isa).split() == [isa]


# --------------------------------------------------------------------------------------- sizes


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


# ------------------------------------------------------------------------- the last guard of kernels


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


# ------------------------------------------------------------------------------ compilers, functorch


def block(x, up, down, weight, index, backend=None):
    """A plan, the fused MLP, and the ops around experts that are modules of their own."""
    plan = ExpertPlan.from_topk(index, up.shape[0])
    y = ops.experts_mlp(x, up, down, plan, weight, backend=backend)
    rows = ops.grouped_linear(y, up, plan, packed_out=True, backend=backend)
    rows = ops.expert_activation(rows, "gelu", backend=backend)
    rows = ops.grouped_linear(rows, down, plan, packed_in=True, activation="silu", backend=backend)
    return ops.combine_pairs(rows + ops.gather_pairs(x, plan, backend=backend), plan, weight, backend=backend)


def block_inputs(tokens=7):
    case = Case(tokens=tokens, inputs=12, outputs=8)
    tensors = case.mlp_tensors()
    return [tensors[k].requires_grad_() for k in ("x", "up", "down", "topk_weight")], case.index()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", (*BACKENDS, None))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend, fresh_dynamo):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (7, 30):
        leaves, index = block_inputs(tokens)
        expected, actual = block(*leaves, index, backend), compiled(*leaves, index, backend)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        dy = random_tensor(*expected.shape)
        grads = [torch.autograd.grad(y, leaves, dy) for y in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves, index, backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, fresh_dynamo):
    class Net(torch.nn.Module):
        def forward(self, x, weight, index):
            return block(x, up, down, weight, index)

    (x, up, down, weight), index = (
        [t.detach() for t in part] if isinstance(part, list) else part for part in block_inputs()
    )
    with torch.no_grad():
        program = torch.export.export(Net(), (x, weight, index), strict=strict)
        assert any("dynops.experts_mlp" in str(node.target) for node in program.graph.nodes)
        for choices in (index, index.flip(0), torch.zeros_like(index), torch.full_like(index, 4)):
            actual, expected = program.module()(x, weight, choices), block(x, up, down, weight, choices)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@backends
def test_func_grad(backend):
    leaves, index = block_inputs()
    right = torch.autograd.grad(block(*leaves, index, backend).square().sum(), leaves)
    grads = torch.func.grad(lambda *t: block(*t, index, backend).square().sum(), argnums=(0, 1, 2, 3))
    torch.testing.assert_close(grads(*(t.detach() for t in leaves)), right, rtol=1e-5, atol=1e-5)


@backends
def test_autocast(backend):
    leaves, index = block_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        plan = ExpertPlan.from_topk(index, 4)
        out = ops.experts_mlp(*leaves[:3], plan, leaves[3], backend=backend)
        assert out.dtype == torch.bfloat16
        eight = [ops.quantize_experts(t) for t in leaves[1:3]]
        assert ops.experts_mlp(leaves[0], *eight, plan, backend=backend).dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
