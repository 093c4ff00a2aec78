"""The expert ops against every expert on every pair: values and gradients of every argument and backend."""

import itertools

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    BACKENDS,
    CASES,
    FEW,
    KINDS,
    Case,
    backends,
    compare,
    each,
    halves,
    linear_oracle,
    mlp_oracle,
    plan_of,
    transposes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_strategies import SETTINGS, seeds

from dynops import ExpertPlan, ops
from dynops.ops.experts.quantized import QuantizedExperts
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


def check_linear(case: Case, backend, tensors, grads=None, **options):
    plan, index = plan_of(case)
    return compare(
        lambda **t: ops.grouped_linear(plan=plan, backend=backend, **t, **options),
        lambda **t: linear_oracle(index=index, **t, **options),
        tensors,
        grads,
    )


def check_mlp(case: Case, backend, tensors, grads=None, **options):
    plan, index = plan_of(case)
    return compare(
        lambda **t: ops.experts_mlp(plan=plan, backend=backend, **t, **options),
        lambda **t: mlp_oracle(index=index, **t, **options),
        tensors,
        grads,
        few=int(plan.offsets[-1]) * case.outputs < 500,  # numbers between the two GEMMs
    )


@backends
@transposes
@pytest.mark.parametrize("packed_out", [False, True], ids=["sums", "packed out"])
@pytest.mark.parametrize("packed_in", [False, True], ids=["tokens", "packed in"])
@each(CASES)
def test_linear(case, packed_in, packed_out, transposed, backend):
    options = {"packed_in": packed_in, "packed_out": packed_out, "transposed": transposed}
    check_linear(case, backend, case.linear_tensors(packed_in, transposed), **options)


@backends
@halves
@transposes
@pytest.mark.parametrize("packed_in, packed_out", [(False, True), (True, False)], ids=["gather", "combine"])
@each(FEW)
def test_linear_in_half_precision(case, packed_in, packed_out, transposed, dtype, backend):
    options = {"packed_in": packed_in, "packed_out": packed_out, "transposed": transposed}
    check_linear(case, backend, case.linear_tensors(packed_in, transposed, dtype), **options)


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed_out", [False, True], ids=["sums", "packed out"])
@pytest.mark.parametrize("name", ["few rows", "many rows"])
def test_linear_activation(name, packed_out, activation, backend):
    case = CASES[name]
    # gradients in float32 only: z's rounding in half precision decides on which side of a kink it lies
    for grads, dtype in (((), torch.bfloat16), (None, torch.float32)):
        tensors = case.linear_tensors(dtype=dtype)
        tensors["x"] = tensors["x"] * 4  # past the kinks of relu6 and hardswish
        check_linear(case, backend, tensors, grads, packed_out=packed_out, activation=activation)


@backends
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "topk_weight"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_gradient_alone(packed, wanted, backend):
    case = CASES["some dropped"]
    tensors = case.linear_tensors(packed)
    check_linear(case, backend, tensors, (wanted,), packed_in=packed, packed_out=not packed)


@backends
@halves
def test_routing_weights_of_any_dtype(dtype, backend):
    for name, packed in itertools.product(("few rows", "many rows"), (False, True)):
        tensors = CASES[name].linear_tensors(dtype=dtype)
        tensors["topk_weight"] = tensors["topk_weight"].to(dtype)
        check_linear(CASES[name], backend, tensors, packed_out=packed)


@backends
@pytest.mark.parametrize("depth", [1, 2, 15, 16, 17, 31, 33, 63, 65, 129])
def test_every_rest_of_a_vector(depth, backend):
    for columns, tokens in itertools.product((1, 17, 65), (3, 60)):
        case = Case(tokens=tokens, experts=2, inputs=depth, outputs=columns)
        check_linear(case, backend, case.linear_tensors())
        check_linear(case, backend, case.linear_tensors(dtype=torch.bfloat16))


@backends
@pytest.mark.parametrize("rows", [*range(1, 37), 47, 48, 49, 95, 193])
def test_every_number_of_rows(rows, backend):
    """Streamed, packed, and the blocks and tiles of either."""
    case = Case(tokens=rows, topk=1, experts=1, inputs=40, outputs=37)
    for dtype in (torch.float32, torch.bfloat16):
        check_linear(case, backend, case.linear_tensors(dtype=dtype))


@backends
@pytest.mark.parametrize("rows", [1, 25, 64, 300])
def test_long_sums_keep_their_digits(rows, backend):
    """One float32 sum over 4096 products would be 4 times as far from float64 as torch's, and over the budget."""
    case = Case(tokens=rows, topk=1, experts=1, inputs=4096, outputs=64)
    tensors = case.linear_tensors()
    check_linear(case, backend, tensors, ())
    tensors["weight"] = tensors["weight"].mT.contiguous()
    check_linear(case, backend, tensors, (), transposed=True)


@backends
@transposes
@pytest.mark.parametrize("form", ["gated", "interleaved", "plain"])
@each(CASES)
def test_mlp(case, form, transposed, backend):
    gated = form != "plain"
    options = {"gated": gated, "interleaved": form == "interleaved", "transposed": transposed}
    check_mlp(case, backend, case.mlp_tensors(gated, transposed), **options)


@backends
@halves
@pytest.mark.parametrize("form", ["gated", "interleaved", "plain"])
@each(FEW)
def test_mlp_in_half_precision(case, form, dtype, backend):
    gated = form != "plain"
    options = {"gated": gated, "interleaved": form == "interleaved"}
    check_mlp(case, backend, case.mlp_tensors(gated, dtype=dtype), **options)


@backends
@pytest.mark.parametrize("activation", (*ACTIVATIONS, "clamped_swiglu"))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["few rows", "many rows"])
def test_mlp_activation(name, gated, activation, backend):
    if activation == "clamped_swiglu" and not gated:
        pytest.skip("clamped_swiglu needs a gate")
    case = CASES[name]
    tensors = case.mlp_tensors(gated)
    tensors["x"] = tensors["x"] * 4
    check_mlp(case, backend, tensors, gated=gated, activation=activation, alpha=1.3, limit=1.5)


@backends
@pytest.mark.parametrize("name", ["few rows", "many rows", "some dropped", "no token"])
def test_mlp_with_a_callable_between(name, backend):
    case = CASES[name]

    def between(z):
        return torch.tanh(z[:, ::2]) - z[:, 1::2]

    check_mlp(case, backend, case.mlp_tensors(), activation=between)


@st.composite
def cases(draw) -> Case:
    experts = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(KINDS))
    return Case(
        tokens=draw(st.integers(0, 40)),
        topk=draw(st.integers(1, experts if kind == "distinct" else 4)),
        experts=experts,
        inputs=draw(st.sampled_from([1, 2, 3, 8, 17, 32, 33, 50])),
        outputs=draw(st.sampled_from([1, 2, 5, 16, 19, 32, 40, 67])),
        kind=kind,
        capacity=draw(st.none() | st.integers(0, 12)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_linear(backend):
    @settings(SETTINGS, max_examples=80)
    @given(cases(), st.tuples(*[st.booleans()] * 3), st.sampled_from(ACTIVATIONS), st.sets(st.sampled_from(["bias", "topk_weight", "grads"])), seeds)  # fmt: skip
    def property_holds(case, flags, activation, given, seed):
        torch.manual_seed(seed)
        options = dict(zip(("packed_in", "packed_out", "transposed"), flags, strict=True))
        tensors = case.linear_tensors(options["packed_in"], options["transposed"])
        tensors = {k: v for k, v in tensors.items() if k in ("x", "weight") or k in given}
        grads = None if "grads" in given else ()
        check_linear(case, backend, tensors, grads, activation=activation, **options)

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mlp(backend):
    @settings(SETTINGS, max_examples=80)
    @given(cases(), st.sampled_from(["gated", "interleaved", "plain"]), st.booleans(), st.sampled_from(ACTIVATIONS), st.sets(st.sampled_from(["up_bias", "down_bias", "topk_weight", "grads"])), seeds)  # fmt: skip
    def property_holds(case, form, transposed, activation, given, seed):
        torch.manual_seed(seed)
        gated = form != "plain"
        tensors = case.mlp_tensors(gated, transposed)
        tensors = {k: v for k, v in tensors.items() if k in ("x", "up", "down") or k in given}
        options = {"gated": gated, "interleaved": form == "interleaved", "transposed": transposed}
        grads = None if "grads" in given else ()
        check_mlp(case, backend, tensors, grads, activation=activation, **options)

    property_holds()


CASE = Case(tokens=6, topk=2, experts=3, inputs=4, outputs=5)
PLAN = ExpertPlan.from_topk(torch.randint(0, 3, (6, 2)), 3)
LINEAR = CASE.linear_tensors() | {"plan": PLAN}
MLP = CASE.mlp_tensors() | {"plan": PLAN}
X, W, B, K = (LINEAR[k] for k in ("x", "weight", "bias", "topk_weight"))
UP, DOWN = MLP["up"], MLP["down"]
EIGHT = ops.quantize_experts(W)
META = torch.device("meta")


@pytest.mark.parametrize("error, match, changed", [
    (TypeError, r"x: expected a tensor rows \[R, C\].*list", {"x": [1.0]}),
    (TypeError, r"x: expected a floating dtype, got torch.int64", {"x": X.long()}),
    (ValueError, r"x: .*\(4,\)", {"x": X[0]}),
    (ValueError, r"x: expected a row for each token, 6, got shape \(5, 4\)", {"x": X[:5]}),
    (ValueError, r"x: expected a row for each row of the plan \(T \* K\), 12, got shape \(6, 4\)", {"packed_in": True}),
    (TypeError, r"plan: expected an ExpertPlan .*got Tensor", {"plan": PLAN.position}),
    (ValueError, r"plan: .*device cpu, got meta", {"plan": PLAN.to(META)}),
    (TypeError, r"weight: expected a tensor \[E, O, I\].*NoneType", {"weight": None}),
    (TypeError, r"weight: expected x's dtype torch.float32, got torch.bfloat16", {"weight": W.bfloat16()}),
    (ValueError, r"weight: .*\[E, O, I\].*\(5, 4\)", {"weight": W[0]}),
    (ValueError, r"weight: expected 3 experts of 4 inputs.*got 2 of 4 in shape \(2, 5, 4\)", {"weight": W[:2]}),
    (ValueError, r"weight: expected 3 experts of 4 inputs.*got 3 of 5", {"transposed": True}),
    (TypeError, r"weight: expected an int8 weight and a float32 scale", {"weight": QuantizedExperts(W, EIGHT.scale)}),
    (ValueError, r"weight: expected a scale \(3, 5\), got \(3, 4\)", {"weight": QuantizedExperts(EIGHT.weight, EIGHT.scale[:, 1:])}),
    (TypeError, r"bias: .*float32.*float64", {"bias": B.double()}),
    (ValueError, r"bias: expected shape \(3, 5\), got \(3, 4\)", {"bias": B[:, 1:]}),
    (TypeError, r"topk_weight: expected a floating dtype, got torch.int64", {"topk_weight": K.long()}),
    (ValueError, r"topk_weight: expected \(6, 2\), got \(6, 1\)", {"topk_weight": K[:, 1:]}),
    (ValueError, r"topk_weight: .*cpu, got meta", {"topk_weight": K.to(META)}),
    (ValueError, r"activation: .*'tanh'", {"activation": "tanh"}),
    (ValueError, r"activation: .*'clamped_swiglu'", {"activation": "clamped_swiglu"}),
    (ValueError, r"backend: .*'cuda'", {"backend": "cuda"}),
])  # fmt: skip
def test_errors_of_linear(error, match, changed):
    ops.grouped_linear(**LINEAR)
    with pytest.raises(error, match=match):
        ops.grouped_linear(**LINEAR | changed)


@pytest.mark.parametrize("error, match, changed", [
    (ValueError, r"x: expected a row for each token, 6", {"x": X[:5]}),
    (ValueError, r"up: expected 3 experts of 4 inputs.*got 3 of 3", {"up": UP[:, :, 1:]}),
    (ValueError, r"up: expected an even number of outputs, gate and up, got 9", {"up": UP[:, 1:], "up_bias": None}),
    (ValueError, r"down: expected 3 experts of 5 inputs, as the plan and up have them, got 3 of 4", {"down": DOWN[:, :, 1:]}),
    (ValueError, r"down: expected 3 experts of 10 inputs", {"gated": False}),
    (ValueError, r"up_bias: expected shape \(3, 10\), got \(3, 5\)", {"up_bias": MLP["up_bias"][:, :5]}),
    (ValueError, r"down_bias: expected shape \(3, 4\), got \(3, 3\)", {"down_bias": MLP["down_bias"][:, :3]}),
    (ValueError, r"activation: .*'tanh'", {"activation": "tanh"}),
    (ValueError, r"down: expected 3 experts of 10 inputs, as the plan and activation\(rows\) have them", {"activation": lambda z: z}),
    (ValueError, r"activation\(rows\): expected a row for each row of the plan", {"activation": lambda z: z[1:]}),
    (TypeError, r"activation\(rows\): .*int", {"activation": lambda z: 3}),
])  # fmt: skip
def test_errors_of_mlp(error, match, changed):
    ops.experts_mlp(**MLP)
    with pytest.raises(error, match=match):
        ops.experts_mlp(**MLP | changed)


@pytest.mark.parametrize("error, match, call", [
    (ValueError, r"z: expected an even number of columns, gate and up, got shape \(6, 5\)", lambda: ops.expert_activation(random_tensor(6, 5))),
    (ValueError, r"activation: .*'swish'", lambda: ops.expert_activation(X, "swish")),
    (ValueError, r"activation: .*'clamped_swiglu'", lambda: ops.expert_activation(X, "clamped_swiglu", gated=False)),
    (TypeError, r"z: expected a floating dtype", lambda: ops.expert_activation(X.long())),
    (ValueError, r"x: expected a row for each token, 6", lambda: ops.gather_pairs(X[1:], PLAN)),
    (TypeError, r"plan: expected an ExpertPlan", lambda: ops.gather_pairs(X, None)),
    (ValueError, r"rows: expected a row for each row of the plan", lambda: ops.combine_pairs(X, PLAN)),
    (ValueError, r"topk_weight: expected \(6, 2\)", lambda: ops.combine_pairs(X.repeat(2, 1), PLAN, K[1:])),
])  # fmt: skip
def test_errors_of_the_rest(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_the_fused_activation_refuses_to_be_differentiated():
    indices = PLAN.order, PLAN.offsets, PLAN.position
    with pytest.raises(RuntimeError, match="activation has no gradient"):
        torch.ops.dynops.grouped_linear(X.clone().requires_grad_(), W, None, None, None, *indices, False, True, False, "relu", "")  # fmt: skip
