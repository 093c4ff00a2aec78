"""Expert ops on weights of eight bits, activations, and the sums over a token's choices."""

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    CASES,
    FEW,
    HALVES,
    Case,
    activation_oracle,
    backends,
    compare,
    each,
    from_pairs,
    linear_oracle,
    mlp_oracle,
    plan_of,
    to_pairs,
    transposes,
    weighted,
)

from dynops import ops
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@transposes
def test_quantize(transposed):
    weight = random_tensor(3, 20, 30)
    weight[1, 4] = 0
    weight[:, :, 7] = 0  # a channel of zeros either way
    levels, scale = ops.quantize_experts(weight, transposed)
    dim = 1 if transposed else 2
    assert levels.dtype == torch.int8 and levels.shape == weight.shape
    assert scale.dtype == torch.float32 and torch.equal(scale * 127, weight.abs().amax(dim) / 127 * 127)
    error = (levels * scale.unsqueeze(dim) - weight).abs()
    assert (error <= 0.5001 * scale.unsqueeze(dim)).all() and levels.abs().amax() == 127


@backends
@transposes
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@each(FEW)
def test_linear_of_eight_bits(case, dtype, transposed, backend):
    plan, index = plan_of(case)
    tensors = case.linear_tensors(transposed=transposed, dtype=dtype)
    eight = ops.quantize_experts(tensors.pop("weight"), transposed)
    scale = eight.scale[:, None] if transposed else eight.scale[:, :, None]
    for packed_out, activation in ((True, None), (False, "gelu")):
        options = {"packed_out": packed_out, "transposed": transposed, "activation": activation}

        def oracle(options=options, **t):
            weight = (eight.weight.double() * scale.double()).to(t["x"].dtype)
            return linear_oracle(weight=weight, index=index, **t, **options)

        def ours(options=options, **t):
            return ops.grouped_linear(weight=eight, plan=plan, backend=backend, **t, **options)

        compare(ours, oracle, tensors)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("form", ["gated", "interleaved", "plain"])
@each(FEW)
def test_mlp_of_eight_bits(case, form, dtype, backend):
    plan, index = plan_of(case)
    tensors = case.mlp_tensors(form != "plain", dtype=dtype)
    options = {"gated": form != "plain", "interleaved": form == "interleaved"}
    eight = {name: ops.quantize_experts(tensors.pop(name)) for name in ("up", "down")}

    def oracle(**t):
        weights = {
            k: (q.weight.double() * q.scale[:, :, None].double()).to(t["x"].dtype) for k, q in eight.items()
        }
        return mlp_oracle(index=index, **weights, **t, **options)

    def ours(**t):
        return ops.experts_mlp(plan=plan, backend=backend, **eight, **t, **options)

    compare(ours, oracle, tensors)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("form", ["gated", "interleaved", "plain"])
@pytest.mark.parametrize("activation", (*ACTIVATIONS, "clamped_swiglu"))
def test_activation(activation, form, dtype, backend):
    if activation == "clamped_swiglu" and form == "plain":
        pytest.skip("clamped_swiglu needs a gate")
    gated = form != "plain"
    options = {"gated": gated, "interleaved": form == "interleaved", "alpha": 1.3, "limit": 2.0}
    for rows, columns in ((1, 1), (3, 7), (5, 16), (4, 24), (2, 33), (40, 100), (0, 8), (3, 0)):
        compare(
            lambda x: ops.expert_activation(x, activation, backend=backend, **options),
            lambda x: activation_oracle(x, activation, **options),
            {"x": random_tensor(rows, columns * (2 if gated else 1), dtype=dtype) * 4},
        )


@backends
@pytest.mark.parametrize("form", ["gated", "interleaved", "plain"])
@pytest.mark.parametrize("activation", (*ACTIVATIONS, "clamped_swiglu"))
def test_activation_at_its_kinks(activation, form, backend):
    """Zero, 3, 6, the limit, and values past the range of exp: the slopes are those of torch."""
    if activation == "clamped_swiglu" and form == "plain":
        pytest.skip("clamped_swiglu needs a gate")
    at = torch.tensor([-200.0, -88, -7, -6, -3, -2, -0.0, 0, 1e-30, 2, 3, 6, 7, 88, 200])
    gate, up = torch.meshgrid(at, at, indexing="ij")
    pair = torch.stack((gate.flatten(), up.flatten()))
    z = {"gated": pair, "interleaved": pair.t(), "plain": at}[form].reshape(1, -1)
    options = {"gated": form != "plain", "interleaved": form == "interleaved", "alpha": 1.3, "limit": 2.0}
    compare(
        lambda x: ops.expert_activation(x, activation, backend=backend, **options),
        lambda x: activation_oracle(x, activation, **options),
        {"x": z},
    )


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@each(CASES)
def test_gather_and_combine(case, dtype, backend):
    plan, index = plan_of(case)
    live = (index.flatten() < case.experts)[:, None]
    for columns in (1, case.inputs, 130):
        compare(
            lambda x: ops.gather_pairs(x, plan, backend=backend),
            lambda x: from_pairs(torch.where(live, to_pairs(x, index, False), 0), index, True),
            {"x": case.rows(columns, dtype=dtype)},
        )
        tensors = {"x": case.rows(columns, True, dtype), "topk_weight": random_tensor(case.tokens, case.topk)}
        for names in (("x",), ("x", "topk_weight")):
            compare(
                lambda x, **t: ops.combine_pairs(x, plan, backend=backend, **t),
                lambda x, topk_weight=None: from_pairs(
                    weighted(torch.where(live, to_pairs(x, index, True), 0), topk_weight), index, False
                ),
                {k: tensors[k] for k in names},
            )


@backends
def test_the_sum_over_choices_is_taken_in_float32(backend):
    """Sixty-four choices of a bfloat16 layer: each partial sum rounded would be an error 8 times as large."""
    case = Case(tokens=20, topk=64, experts=64, inputs=32, outputs=64, kind="distinct")
    tensors = {k: v for k, v in case.linear_tensors(dtype=torch.bfloat16).items() if k != "topk_weight"}
    plan, index = plan_of(case)
    exact = linear_oracle(**{k: v.double() for k, v in tensors.items()}, index=index, packed_out=False)
    once = linear_oracle(
        **{k: v.float() for k, v in tensors.items()}, index=index, packed_out=False
    ).bfloat16()
    out = ops.grouped_linear(plan=plan, packed_out=False, backend=backend, **tensors)
    if backend == "cpp":
        assert_within_budget(out, exact, once)
    rows = ops.grouped_linear(plan=plan, backend=backend, **tensors)
    wide = rows.double()[plan.position.long()].sum(1)
    assert_within_budget(ops.combine_pairs(rows, plan, backend=backend), wide, wide.bfloat16())
