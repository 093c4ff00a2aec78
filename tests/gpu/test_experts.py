"""Experts: plans bit for bit, grouped products and whole MLPs with their gradients."""

import pytest
import torch
from expert_cases import Case, linear_oracle, mlp_oracle, with_capacity
from on_gpu import BACKENDS, DEVICE, DTYPES, FAST, KINDS, assert_same, compare, sized

from dynops import ExpertPlan, ops
from dynops.testing import random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

# On a GPU enough rows for the largest tiles, and few rows of enough channels for those of 16.
CASES = {
    "many rows": Case(sized(8192, 90), topk=2, experts=4, inputs=sized(128, 40), outputs=sized(256, 50)),
    "few rows": Case(tokens=33, topk=2, experts=8, inputs=64, outputs=96, kind="skewed"),
    "one row": Case(tokens=1, topk=1, experts=2, inputs=70, outputs=101),
    "one choice": Case(tokens=200, topk=1, experts=5, inputs=64, outputs=32),
    "odd": Case(tokens=33, topk=3, experts=5, inputs=37, outputs=19),
    "some dropped": Case(tokens=25, kind="some dropped"),
    "all dropped": Case(kind="dropped"),
    "capacity": Case(tokens=30, topk=3, experts=3, kind="skewed", capacity=9),
    "more experts than rows": Case(tokens=3, topk=2, experts=200, inputs=16, outputs=16),
    "no token": Case(tokens=0),
    "few wide rows": Case(tokens=9, topk=3, experts=8, inputs=sized(512, 48), outputs=sized(256, 32)),
}
IN_EVERY_KIND = ("many rows", "few wide rows")
OF_THE_MLP = ("many rows", "few rows", "few wide rows", "capacity", "no token")
KIND_OF = {name: ("bfloat16", "ieee", "float16")[i % 3] for i, name in enumerate(CASES)}
EXAMPLES = [
    (name, kind, FAST) for name in CASES for kind in (KINDS if name in IN_EVERY_KIND else (KIND_OF[name],))
] + [("few rows", "ieee", backend) for backend in BACKENDS if backend != FAST]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "tokens,topk,experts", [(0, 2, 3), (1, 1, 1), (777, 3, 11), (sized(20000, 3000), 2, 200)]
)
def test_plans_are_those_of_the_cpu(tokens, topk, experts, dtype):
    index = torch.randint(0, experts + 1, (tokens, topk)).to(dtype)
    for capacity in (None, 0, 5, tokens):
        expected, plan = (ExpertPlan.from_topk(index.to(d), experts, capacity) for d in ("cpu", DEVICE))
        for name in ("order", "offsets", "position", "counts", "token", "expert"):
            assert_same(getattr(plan, name).cpu(), getattr(expected, name), name)


def test_choices_outside_are_dropped_on_a_gpu_and_refused_on_a_cpu():
    index = torch.tensor([[0, 7], [-1, 1], [3, 2]])
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"index: expected values in \[0, 3\]"):
            ExpertPlan.from_topk(index, 3)
        return
    dropped = torch.where((index < 0) | (index > 3), 3, index)
    plan, expected = ExpertPlan.from_topk(index.to(DEVICE), 3), ExpertPlan.from_topk(dropped, 3)
    assert_same(plan.position.cpu(), expected.position)


def indexed(case: Case, tensors: dict) -> tuple[dict, torch.Tensor]:
    """The tensors with the choices, and the choices that find a place."""
    index = case.index()
    return tensors | {"index": index}, with_capacity(index, case.experts, case.capacity)


@pytest.mark.parametrize("name,kind,backend", EXAMPLES)
def test_grouped_linear(name, kind, backend):
    """Rows in the order of tokens in and of experts out, and the other way round, by turns."""
    case = CASES[name]
    packed_in = transposed = list(CASES).index(name) % 2 == 1
    packed_out = not packed_in
    tensors, index = indexed(case, case.linear_tensors(packed_in, transposed, DTYPES[kind]))
    options = {"packed_in": packed_in, "packed_out": packed_out, "transposed": transposed}

    def ours(x, weight, bias, topk_weight, index):
        plan = ExpertPlan.from_topk(index, case.experts, case.capacity)
        return ops.grouped_linear(x, weight, plan, bias, topk_weight=topk_weight, **options, backend=backend)

    def oracle(index=index, **tensors):
        return on_one_device(linear_oracle, index, tensors, **options)

    compare(ours, lambda **given: oracle(**{**given, "index": index}), tensors, kind=kind)


def on_one_device(run, index, tensors: dict, **options):
    """An oracle with the lists that it makes on the device of its tensors."""
    device = tensors["x"].device
    with torch.device(device):
        return run(**tensors, index=index.to(device), **options)


@pytest.mark.parametrize("name,kind,backend", [example for example in EXAMPLES if example[0] in OF_THE_MLP])
def test_mlp(name, kind, backend):
    case = CASES[name]
    tensors, index = indexed(case, case.mlp_tensors(dtype=DTYPES[kind]))

    def ours(x, up, down, topk_weight, up_bias, down_bias, index):
        plan = ExpertPlan.from_topk(index, case.experts, case.capacity)
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        return ops.experts_mlp(x, up, down, plan, topk_weight, **biases, backend=backend)

    def oracle(**given):
        return on_one_device(mlp_oracle, index, {k: v for k, v in given.items() if k != "index"})

    compare(ours, oracle, tensors, kind=kind)
    compare(ours, oracle, tensors, grads=(), kind=kind)  # the fused one


@pytest.mark.parametrize("options", [
    {"activation": "gelu", "gated": False}, {"activation": "clamped_swiglu", "interleaved": True},
    {"activation": "silu", "transposed": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["bfloat16", "ieee"])
def test_forms_of_the_mlp(kind, options):
    case = Case(tokens=70, topk=2, experts=4, inputs=48, outputs=32)
    gated, transposed = options.get("gated", True), options.get("transposed", False)
    tensors, index = indexed(case, case.mlp_tensors(gated, transposed, DTYPES[kind]))

    def ours(x, up, down, topk_weight, up_bias, down_bias, index):
        plan = ExpertPlan.from_topk(index, case.experts)
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        return ops.experts_mlp(x, up, down, plan, topk_weight, **biases, **options, backend=FAST)

    def oracle(**given):
        return on_one_device(mlp_oracle, index, {k: v for k, v in given.items() if k != "index"}, **options)

    compare(ours, oracle, tensors, grads=(), kind=kind)
    compare(ours, oracle, tensors, kind=kind)


@pytest.mark.parametrize("kind", ["bfloat16", "ieee"])
def test_weights_of_eight_bits(kind):
    """As the same op with the weight that the eight bits stand for."""
    case = Case(tokens=50, topk=2, experts=4, inputs=64, outputs=48)
    x, index = case.rows(64, dtype=DTYPES[kind]), case.index()
    eight = ops.quantize_experts(case.weight(48, 64))
    weight = eight.weight.double() * eight.scale[:, :, None].double()

    def ours(x, index, levels, scale):
        plan = ExpertPlan.from_topk(index, case.experts)
        return ops.grouped_linear(x, ops.QuantizedExperts(levels, scale), plan, backend=FAST)

    def oracle(x, index, levels, scale):
        return on_one_device(linear_oracle, index, {"x": x, "weight": weight.to(x)})

    tensors = {"x": x, "index": index, "levels": eight.weight, "scale": eight.scale}
    compare(ours, oracle, tensors, grads=(), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind):
    """Rows to experts and back: a sum of what was sent, weighted."""
    case = Case(tokens=65, topk=3, experts=7, inputs=40, kind="some dropped")
    tensors = {"x": case.rows(40, dtype=DTYPES[kind]), "share": random_tensor(65, 3), "index": case.index()}

    def ours(x, share, index):
        plan = ExpertPlan.from_topk(index, 7)
        return ops.combine_pairs(ops.gather_pairs(x, plan, backend=FAST), plan, share, backend=FAST)

    def oracle(x, share, index):
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * torch.where(index < 7, share, 0).sum(1, keepdim=True)).to(x.dtype)

    compare(ours, oracle, tensors, kind=kind)
