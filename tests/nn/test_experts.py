"""Experts, MoE and ConvExperts against loops over tokens, and against transformers' blocks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mixture_cases import E, H, K, M, T, randomised, routed
from torch import Tensor, nn

from dynops import ExpertPlan
from dynops.nn import (
    Experts,
    MoE,
    Routing,
    TopKRouter,
    importance_loss,
    load_balance_loss,
    load_loss,
    z_loss,
)
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda z: F.relu(z).square(), None: lambda z: z}


def between(layer: Experts, z: Tensor) -> Tensor:
    """What stands between the two layers, of one row."""
    if not layer.gated:
        return ACTIVATIONS[layer.activation](z)
    gate, up = (z[::2], z[1::2]) if layer.interleaved else (z[: layer.intermediate], z[layer.intermediate :])
    if layer.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
        return (up + 1) * gate * torch.sigmoid(layer.alpha * gate)
    return ACTIVATIONS[layer.activation](gate) * up


def loop(layer: Experts, parameters: dict, x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """Every pair by itself, in the dtype of ``x``."""
    name = "gate_up_proj" if layer.gated else "up_proj"
    out = []
    for t in range(x.shape[0]):
        total = x.new_zeros(layer.hidden)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if e == layer.num_experts:
                continue
            up, down = parameters[name][e], parameters["down_proj"][e]
            up, down = (up.mT, down.mT) if layer.transposed else (up, down)
            z = F.linear(x[t], up, parameters[f"{name}_bias"][e] if layer.bias else None)
            h = between(layer, z)
            y = F.linear(h, down, parameters["down_proj_bias"][e] if layer.bias else None)
            total = total + (y if weight is None else weight[t, k].to(y.dtype) * y)
        out.append(total)
    return torch.stack(out) if out else x.new_zeros(0, layer.hidden)


def double(parameters: dict) -> dict:
    return {name: p.detach().double().requires_grad_() for name, p in parameters.items()}


VARIANTS = {
    "SwiGLU": {},
    "GeGLU with biases": {"activation": "gelu", "bias": True},
    "bilinear": {"activation": None},
    "gpt-oss": {
        "activation": "clamped_swiglu", "bias": True, "interleaved": True, "transposed": True, "limit": 0.7,
    },
    "ReLU2, not gated": {"activation": "relu2", "gated": False},
    "GELU, not gated, biases": {"activation": "gelu", "gated": False, "bias": True, "transposed": True},
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def experts(request) -> Experts:
    return randomised(Experts(E, H, M, **VARIANTS[request.param]))


def test_equals_the_loop_with_gradients(experts):
    x, (index, weight) = random_tensor(T, H).requires_grad_(), routed()
    weight.requires_grad_()
    parameters = dict(experts.named_parameters())
    wide = double(parameters)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    actual = experts(x, index, weight)
    exact, dense = loop(experts, wide, x64, index, w64), loop(experts, parameters, x, index, weight)
    assert_within_budget(actual, exact.detach(), dense)
    grad = random_tensor(T, H)
    leaves, leaves64 = (x, weight, *parameters.values()), (x64, w64, *wide.values())
    mine, reference = torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(dense, leaves, grad)
    exact = torch.autograd.grad(exact, leaves64, grad.double())
    for name, a, e, d in zip(("x", "weight", *parameters), mine, exact, reference, strict=True):
        assert_within_budget(a, e, d, f"gradient of {name}")
    with torch.no_grad():
        assert_within_budget(experts(x, index, weight), loop(experts, wide, x64, index, w64), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(experts, dtype):
    experts = experts.to(dtype)
    x, (index, weight) = random_tensor(T, H, dtype=dtype), routed()
    parameters = {name: p.detach() for name, p in experts.named_parameters()}
    exact = loop(experts, double(parameters), x.double(), index, weight.double()).detach()
    assert_within_budget(experts(x, index, weight), exact, loop(experts, parameters, x, index, weight))


def test_gpt_oss_checkpoints_load():
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = theirs.GptOssConfig(
        hidden_size=H, intermediate_size=M, num_local_experts=E, swiglu_alpha=1.702, swiglu_limit=1.0
    )
    config._experts_implementation = "eager"
    block = randomised(theirs.GptOssExperts(config))
    options = {"bias": True, "interleaved": True, "transposed": True, "limit": 1.0}
    ours = Experts(E, H, M, "clamped_swiglu", **options)
    ours.load_state_dict(block.state_dict())
    x, (index, weight) = random_tensor(T, H), routed(dropped=False)
    exact = copy.deepcopy(block).double()(x.double(), index, weight.double()).detach()
    assert_within_budget(ours(x, index, weight), exact, block(x, index, weight))


def test_starts_as_linear_layers_do():
    torch.manual_seed(0)
    layer, bound = Experts(4, 64, 16, bias=True), {"gate_up": 1 / 8, "down": 1 / 4}
    for name, parameter in layer.named_parameters():
        limit = bound[name.split("_proj")[0]]
        assert 0.9 * limit < parameter.abs().max() <= limit, name
        assert abs(parameter.std() * math.sqrt(3) / limit - 1) < 0.2, name


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0), (0,)])
def test_any_leading_shape(leading):
    layer, x = randomised(Experts(E, H, M)), random_tensor(*leading, H)
    index, weight = routed(math.prod(leading))
    out = layer(x, index.reshape(*leading, K), weight.reshape(*leading, K))
    assert out.shape == x.shape
    assert torch.equal(out, layer(x.reshape(-1, H), index, weight).reshape(x.shape))
    assert torch.equal(
        out, layer(x, index, weight)
    )  # flat choices of shaped tokens, as transformers has them


def test_takes_a_plan_and_no_weight():
    layer, x, (index, _) = randomised(Experts(E, H, M)), random_tensor(T, H), routed()
    out = layer(x, index)
    assert torch.equal(out, layer(x, ExpertPlan.from_topk(index, E)))
    assert torch.equal(out, layer(x, index, torch.ones(T, K)))
    assert torch.equal(layer(x, index[:, :1]), layer(x, index[:, 0]))


def test_a_token_without_experts_is_zero_and_its_values_are_not_read():
    layer, x, (index, weight) = randomised(Experts(E, H, M)), random_tensor(T, H), routed(dropped=False)
    index[3] = E
    x[3] = math.nan
    out = layer(x, index, weight)
    assert out[3].count_nonzero() == 0 and out.isfinite().all()


def test_capacity_drops_later_tokens_and_later_choices():
    layer, x, weight = randomised(Experts(E, H, M)), random_tensor(4, H), torch.rand(4, 2) + 0.5
    index = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])
    kept = torch.tensor(
        [[0, 1], [0, E], [1, E], [E, 2]]
    )  # expert 0: tokens 0 and 1; expert 1: 2 (first), then 0
    assert torch.equal(layer(x, index, weight, capacity=2), layer(x, kept, weight))
    plan = ExpertPlan.from_topk(index, E, capacity=2)
    assert torch.equal(layer(x, plan, weight), layer(x, kept, weight))


def test_a_callable_activation():
    named, own = Experts(E, H, M), Experts(E, H, M, lambda z: F.silu(z[:, :M]) * z[:, M:])
    own.load_state_dict(randomised(named).state_dict())
    x, (index, weight) = random_tensor(T, H), routed()
    assert_within_budget(
        own(x, index, weight),
        copy.deepcopy(named).double()(x.double(), index, weight),
        named(x, index, weight),
    )


def test_quantized_is_its_rounded_weights(experts):
    eight = experts.quantized()
    x, (index, weight) = random_tensor(T, H).requires_grad_(), routed()
    rounded = {name: p.detach() for name, p in experts.named_parameters()}
    for name in (experts.up_name, "down_proj"):
        dim = 1 if experts.transposed else 2
        scale = rounded[name].abs().amax(dim, keepdim=True) / 127
        assert (getattr(eight, name).double() - rounded[name] / scale).abs().max() <= 0.5 + 1e-4
        assert torch.equal(getattr(eight, f"{name}_scale"), scale.squeeze(dim))
        rounded[name] = getattr(eight, name).float() * scale
    exact = loop(experts, double(rounded), x.double(), index, weight.double()).detach()
    assert_within_budget(eight(x, index, weight), exact, loop(experts, rounded, x, index, weight))
    (grad,) = torch.autograd.grad(eight(x, index, weight).sum(), x)
    assert grad.count_nonzero() > 0
    assert eight.quantized() is eight and "int8" in repr(eight)


def test_quantized_shares_biases_and_keeps_its_scales():
    layer = randomised(Experts(E, H, M, bias=True)).eval()
    eight = layer.quantized()
    assert eight.down_proj_bias is layer.down_proj_bias and not eight.training
    assert set(eight.state_dict()) == {*layer.state_dict(), "gate_up_proj_scale", "down_proj_scale"}
    scale = eight.down_proj_scale.clone()
    half = copy.deepcopy(eight).bfloat16()
    assert half.down_proj_scale.dtype == torch.float32 and torch.equal(half.down_proj_scale, scale)
    assert half.down_proj.dtype == torch.int8 and half.down_proj_bias.dtype == torch.bfloat16
    x, (index, weight) = random_tensor(T, H), routed()
    assert half(x.bfloat16(), index, weight).dtype == torch.bfloat16
    other = Experts(E, H, M, bias=True).quantized()
    other.load_state_dict(eight.state_dict())
    assert torch.equal(other(x, index, weight), eight(x, index, weight))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_experts": 0}, ValueError, "num_experts: expected an int >= 1, got 0"),
        ({"hidden": 1.5}, ValueError, "hidden: expected an int >= 1, got 1.5"),
        ({"intermediate": -1}, ValueError, "intermediate: expected an int >= 1, got -1"),
        ({"activation": "tanh"}, ValueError, "activation: expected None or one of"),
        ({"activation": "clamped_swiglu", "gated": False}, ValueError, "activation: expected None or one of"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Experts(**{"num_experts": E, "hidden": H, "intermediate": M} | options)


def test_bad_inputs_are_named():
    layer, x, (index, weight) = Experts(E, H, M), random_tensor(T, H), routed()
    with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., 12\], got shape \(9, 11\)"):
        layer(x[:, 1:], index, weight)
    with pytest.raises(TypeError, match=r"^x: expected a tensor \[\.\.\., 12\], got list"):
        layer([], index, weight)
    with pytest.raises(ValueError, match=r"^x: expected a row for each token, 8, got shape \(9, 12\)"):
        layer(x, index[1:], weight[1:])
    with pytest.raises(ValueError, match=r"^topk_index: expected values in \[0, 5\], got "):
        layer(x, index + E, weight)
    with pytest.raises(ValueError, match=r"^topk_weight: expected \(9, 2\), got \(9, 1\)"):
        layer(x, index, weight[:, :1])
    with pytest.raises(TypeError, match=r"^topk_index: expected integers \[T, K\], got torch.float32"):
        layer(x, weight, weight)
    with pytest.raises(ValueError, match=r"^topk_index: expected a plan of 5 experts, got ExpertPlan"):
        layer(x, ExpertPlan.from_topk(index, E + 1), weight)
    with pytest.raises(ValueError, match=r"^topk_index: expected a plan of 5 experts and capacity 3, got"):
        layer(x, ExpertPlan.from_topk(index, E), weight, capacity=3)


def transformers_block(family: str, name: str, configuration: str, **values):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = getattr(module, configuration)(hidden_size=H, num_experts_per_tok=K, **values)
    config._experts_implementation = "eager"
    return randomised(getattr(module, name)(config)).eval()


SIZES = {"num_experts": E, "moe_intermediate_size": M}
BLOCKS = {
    "Mixtral": (("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"), {"num_local_experts": E, "intermediate_size": M}, {}),
    "Qwen3-MoE": (("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"), {"norm_topk_prob": True, **SIZES}, {}),
    "OLMoE": (("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig"), {"num_experts": E, "intermediate_size": M}, {"router": {"renormalize": False}}),
    "Qwen2-MoE": (("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"), {"shared_expert_intermediate_size": 10, **SIZES}, {"router": {"renormalize": False}, "shared_intermediate": 10, "shared_gate": True}),
}  # fmt: skip


@pytest.mark.parametrize("model", BLOCKS)
def test_moe_is_transformers_block(model):
    names, values, options = BLOCKS[model]
    block = transformers_block(*names, **values)
    moe = MoE.from_sizes(H, M, E, K, **options)
    moe.load_state_dict(block.state_dict())  # strict: the keys are theirs
    x = random_tensor(2, T, H)
    output, losses, routing = moe.eval()(x)
    assert losses == {} and routing.index.shape == (2, T, K)
    dense = block(x.clone())
    # the block's router rounds to float32 whatever its dtype, so the exact one has a router of ours
    exact = copy.deepcopy(moe).double()(x.double()).output
    assert (exact - dense).norm() <= 1e-5 * exact.norm()
    assert_within_budget(output, exact, dense)


def moe_of(**options) -> MoE:
    return randomised(MoE.from_sizes(H, M, E, K, **options))


def test_moe_gradients():
    options = {"shared_intermediate": 3, "shared_gate": True, "losses": {"load_balance": 1.0, "z": 0.5}}
    moe = randomised(MoE.from_sizes(5, 3, 3, 2, **options)).double()
    x = random_tensor(4, 5, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in moe.named_parameters()]

    def outputs(x, *values):
        result = torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))
        return result.output, *result.losses.values()

    assert torch.autograd.gradcheck(outputs, (x, *moe.parameters()), fast_mode=True)


def test_moe_losses_are_the_functions_times_their_coefficients():
    factors = {"load_balance": 0.25, "importance": 0.5, "load": 2.0, "z": 4.0}
    moe = moe_of(router={"noise": True}, losses=factors)
    x = random_tensor(T, H)
    _, losses, routing = moe(x)
    expected = {
        "load_balance": load_balance_loss(routing.probs, routing.index),
        "importance": importance_loss(routing.weight, routing.index, E),
        "load": load_loss(routing.load),
        "z": z_loss(routing.logits),
    }
    assert list(losses) == list(factors)
    assert all(torch.equal(losses[name], factors[name] * expected[name]) for name in factors)
    assert moe.eval()(x).losses == {} and MoE.from_sizes(H, M, E, K)(x).losses == {}
    for name in factors:  # each of them trains the router
        (grad,) = torch.autograd.grad(losses[name], moe.gate.weight, retain_graph=True)
        assert grad.count_nonzero() > 0, name


@pytest.mark.parametrize("factor, capacity", [(1.0, 4), (0.5, 2), (0.01, 1), (100.0, 360)])
def test_moe_capacity(factor, capacity):
    moe, x = moe_of(capacity_factor=factor), random_tensor(T, H)  # 9 * 2 / 5 = 3.6 pairs an expert
    output, _, routing = moe(x)
    assert torch.equal(output, moe.experts(x, routing.index, routing.weight, capacity=capacity))
    unlimited = moe.experts(x, routing.index, routing.weight)
    most = int(torch.bincount(routing.index.flatten()).max())
    assert torch.equal(output, unlimited) == (capacity >= most)


def test_moe_jitter_leaves_the_experts_input_alone():
    moe, x = moe_of(router={"jitter": 0.5}), random_tensor(T, H)
    output, _, routing = moe(x)
    assert torch.equal(output, moe.experts(x, routing.index, routing.weight))


def test_moe_of_any_modules():
    """A router and experts that are nobody's subclass."""

    class First(nn.Module):
        def forward(self, x):
            one = x.new_ones(*x.shape[:-1], 1)
            return Routing(torch.zeros_like(one, dtype=torch.int64), one, one, one)

    class Double(nn.Module):
        def forward(self, x, index, weight, *, capacity):
            assert capacity is None
            return 2 * x * weight * (index == 0)

    x = random_tensor(2, 3, H)
    assert torch.equal(MoE(First(), Double(), shared=nn.Identity())(x).output, 3 * x)


def test_moe_exports():
    moe = moe_of(shared_intermediate=6, shared_gate=True, capacity_factor=1.25).eval()
    sizes = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}}
    exported = torch.export.export(moe, (random_tensor(T, H),), dynamic_shapes=sizes).module()
    x = random_tensor(13, H)
    assert torch.equal(exported(x).output, moe(x).output)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"experts": Experts(E + 1, H, M)},
            "router, experts: expected the same number of experts, got 5 and 6",
        ),
        ({"shared_gate": nn.Linear(H, 1)}, "shared_gate: expected None without a shared expert"),
        ({"capacity_factor": 0}, "capacity_factor: expected a positive number or None, got 0"),
        ({"losses": {"zz": 1.0}}, r"losses: expected some of \('load_balance', .*\), got \['zz'\]"),
        ({"losses": {"load": 1.0}}, "losses: expected a router with noise=True for 'load'"),
    ],
)
def test_moe_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MoE(**{"router": TopKRouter(H, E, K), "experts": Experts(E, H, M)} | options)
