"""Routers and their losses, against transformers' routers and formulas written from the papers."""

import math
import statistics

import pytest
import torch
from comparison import close
from torch import Tensor

from dynops.nn import TopKRouter, importance_loss, load_balance_loss, load_loss, z_loss
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS, HIDDEN, EXPERTS = 9, 12, 8


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    close(actual, expected, tolerance)  # 1e-6: a few roundings of float32


@torch.no_grad()
def randomised(router: torch.nn.Module):
    """Its parameters and buffers are all random, so that none can be left out unseen."""
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.copy_(random_tensor(*tensor.shape))
    return router


def router_of(*arguments, **options) -> TopKRouter:
    return randomised(TopKRouter(*arguments, **options))


def transformers_router(family: str, name: str, **values):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    defaults = {
        "num_experts_per_tok": 3, "num_local_experts": EXPERTS, "num_experts": EXPERTS, "hidden_size": HIDDEN,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
        "topk_method": "group_limited_greedy",
    }  # fmt: skip
    return randomised(getattr(module, name)(type("Config", (), defaults | values)()))


GROUPS = {"groups": 4, "top_groups": 2, "scale": 2.5}
SIGMOID = {"scoring": "sigmoid", "correction_bias": True, **GROUPS}
THEIRS = {
    "Mixtral": ("mixtral", "MixtralTopKRouter", {}, {}),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeTopKRouter", {}, {}),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, {"renormalize": False}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}, {"bias": True}),
    "DeepSeek-V2": ("deepseek_v2", "DeepseekV2TopkRouter", {}, {"renormalize": False, "group_topk": 1, **GROUPS}),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3TopkRouter", {}, SIGMOID),
    "DeepSeek-V3, sums kept": (
        "deepseek_v3", "DeepseekV3TopkRouter", {"norm_topk_prob": False}, {"renormalize": False, **SIGMOID}
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", THEIRS)
def test_routes_as_transformers_does(model):
    family, name, values, options = THEIRS[model]
    theirs = transformers_router(family, name, **values)
    ours = TopKRouter(HIDDEN, EXPERTS, 3, **options)
    ours.load_state_dict(theirs.state_dict())  # strict: the keys are theirs
    x = random_tensor(TOKENS, HIDDEN)
    routing, (logits, weight, index) = ours(x), theirs(x)
    assert_near(routing.logits, logits)
    mine, order = routing.index.argsort(1), index.argsort(1)  # some do not sort their choices
    assert torch.equal(routing.index.gather(1, mine), index.gather(1, order))
    assert_near(routing.weight.gather(1, mine), weight.gather(1, order))


def test_the_correction_and_the_groups_of_the_cases_matter():
    """Without them DeepSeek-V3's choices would be others, so that the test above sees them."""
    x = random_tensor(TOKENS, HIDDEN)
    router = router_of(HIDDEN, EXPERTS, 3, **SIGMOID)
    whole = router(x).index.sort(1).values
    router.top_groups = 4
    assert not torch.equal(router(x).index.sort(1).values, whole)
    router.top_groups = 2
    router.e_score_correction_bias.zero_()
    assert not torch.equal(router(x).index.sort(1).values, whole)


def test_a_closed_group_stays_closed_where_scores_are_negative():
    """A constant in the correction changes no choice, also where it makes all scores negative."""
    x = random_tensor(TOKENS, HIDDEN)
    router = router_of(HIDDEN, EXPERTS, 3, **SIGMOID)
    before = router(x).index
    router.e_score_correction_bias -= 4
    assert torch.equal(router(x).index, before)


@torch.no_grad()
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_formula(scoring, renormalize):
    router = router_of(
        HIDDEN, EXPERTS, 3, scoring=scoring, renormalize=renormalize, bias=True, scale=1.5
    ).double()
    x = random_tensor(2, TOKENS, HIDDEN, dtype=torch.float64)
    routing = router(x)
    assert routing.load is None and routing.index.dtype == torch.int64
    for i in range(2):
        for t in range(TOKENS):
            logits = [float(router.weight[e] @ x[i, t] + router.bias[e]) for e in range(EXPERTS)]
            if scoring == "softmax":
                total = sum(math.exp(z) for z in logits)
                scores = [math.exp(z) / total for z in logits]
            else:
                scores = [1 / (1 + math.exp(-z)) for z in logits]
            best = sorted(range(EXPERTS), key=lambda e: -scores[e])[:3]
            chosen = [scores[e] for e in best]
            weights = [1.5 * s / (sum(chosen) if renormalize else 1) for s in chosen]
            assert routing.index[i, t].tolist() == best
            assert_near(routing.weight[i, t], torch.tensor(weights, dtype=torch.float64), 1e-12)
            assert_near(routing.logits[i, t], torch.tensor(logits, dtype=torch.float64), 1e-12)
            probs = torch.tensor(scores, dtype=torch.float64)
            assert_near(routing.probs[i, t], probs / probs.sum(), 1e-12)


@pytest.mark.parametrize("options", [{}, {"scoring": "sigmoid", **GROUPS}, {"noise": True}, {"jitter": 0.3}])
def test_gradients(options):
    router = router_of(HIDDEN, EXPERTS, 3, **options).double()
    x = random_tensor(4, HIDDEN, dtype=torch.float64).requires_grad_()
    parameters = dict(router.named_parameters())

    def outputs(x, *values):
        torch.manual_seed(3)
        routing = torch.func.functional_call(router, dict(zip(parameters, values, strict=True)), (x,))
        return tuple(value for value in routing if value is not None and value.is_floating_point())

    assert torch.autograd.gradcheck(outputs, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype):
    router = router_of(HIDDEN, EXPERTS, 2).to(dtype)
    x = random_tensor(TOKENS, HIDDEN, dtype=dtype)
    wide = router(x)
    assert wide.weight.dtype == wide.logits.dtype == torch.float32
    assert_near(wide.logits, x.float() @ router.weight.float().T)
    with torch.autocast("cpu", dtype):
        assert torch.equal(router.float()(x.float()).logits, wide.logits)


@pytest.mark.parametrize("shape", [(0, HIDDEN), (HIDDEN,), (2, 0, HIDDEN), (2, 3, 4, HIDDEN)])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("top_k", [1, EXPERTS])
def test_any_leading_shape(shape, noise, top_k):
    routing = router_of(HIDDEN, EXPERTS, top_k, noise=noise)(random_tensor(*shape))
    assert routing.index.shape == routing.weight.shape == (*shape[:-1], top_k)
    assert routing.logits.shape == routing.probs.shape == (*shape[:-1], EXPERTS)
    assert (routing.load is not None) == noise and (not noise or routing.load.shape == (EXPERTS,))


def test_sigmoids_that_are_all_zero_give_finite_weights():
    router = TopKRouter(1, 4, 2, scoring="sigmoid")
    torch.nn.init.constant_(router.weight, -200.0)
    routing = router(torch.ones(1, 1))
    assert routing.weight.isfinite().all() and routing.probs.isfinite().all()


def noisy_parts(router: TopKRouter, x: Tensor, seed: int = 5):
    """A noisy router's result, and logits, noisy logits and standard deviations of the paper's equation 4."""
    torch.manual_seed(seed)
    routing = router(x)
    torch.manual_seed(seed)
    normal = torch.randn(*x.shape[:-1], router.num_experts, dtype=x.dtype)
    logits = x @ router.weight.T
    deviation = torch.log1p(torch.exp(x @ router.noise_weight.T)) + 1e-2
    return routing, logits, logits + normal * deviation, deviation


@torch.no_grad()
def test_noisy_top_k_is_shazeers():
    router = router_of(HIDDEN, EXPERTS, 3, noise=True).double()
    x = random_tensor(TOKENS, HIDDEN, dtype=torch.float64)
    routing, logits, noisy, deviation = noisy_parts(router, x)
    kept = torch.full_like(noisy, -math.inf).scatter(1, noisy.topk(3).indices, noisy.topk(3).values)
    assert torch.equal(routing.index, noisy.topk(3).indices)
    assert_near(routing.weight, kept.softmax(1).gather(1, routing.index), 1e-12)
    load = torch.zeros(EXPERTS, dtype=torch.float64)
    normal = statistics.NormalDist()
    for t in range(TOKENS):
        for e in range(EXPERTS):
            others = sorted((float(noisy[t, o]) for o in range(EXPERTS) if o != e), reverse=True)
            load[e] += normal.cdf(float((logits[t, e] - others[2]) / deviation[t, e]))
    assert_near(routing.load, load, 1e-12)


def test_noise_with_all_experts_loads_each_with_every_token():
    routing = router_of(HIDDEN, EXPERTS, EXPERTS, noise=True)(random_tensor(TOKENS, HIDDEN))
    assert routing.load.tolist() == [TOKENS] * EXPERTS


def test_noise_and_jitter_are_for_training():
    x = random_tensor(TOKENS, HIDDEN)
    for options in ({"noise": True}, {"jitter": 0.4}):
        router = router_of(HIDDEN, EXPERTS, 2, **options)
        plain = router_of(HIDDEN, EXPERTS, 2)
        plain.weight = router.weight
        assert not torch.equal(router(x).weight, plain(x).weight)
        quiet = router.eval()(x)
        assert quiet.load is None and all(map(torch.equal, quiet[:4], plain(x)[:4]))


def test_jitter_multiplies_the_routers_input():
    router = router_of(HIDDEN, EXPERTS, 2, jitter=0.25)
    x = random_tensor(200, HIDDEN)
    before = x.clone()
    torch.manual_seed(1)
    logits = router(x).logits
    torch.manual_seed(1)
    factor = torch.empty_like(x).uniform_(0.75, 1.25)
    assert_near(logits, (x * factor) @ router.weight.T)
    assert torch.equal(x, before)


def test_update_correction_moves_towards_even_use():
    router = TopKRouter(HIDDEN, 4, 2, scoring="sigmoid", correction_bias=True)
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [4, 4]])  # counts 3 2 1 0, of 1.5 on average; 4 is dropped
    router.update_correction(index, rate=0.5)
    assert router.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5]
    router.update_correction(torch.arange(4)[:, None])
    assert router.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="correction_bias"):
        TopKRouter(HIDDEN, 4, 2).update_correction(index)


def test_load_balance_is_switchs():
    theirs = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    probs = random_tensor(3, TOKENS, EXPERTS).softmax(-1)
    index = probs.argmax(-1)
    expected = theirs.load_balancing_loss_func(probs, index)
    # theirs takes each sequence by itself; so one sequence
    one = theirs.load_balancing_loss_func(probs.flatten(0, 1)[None], index.flatten()[None])
    assert_near(load_balance_loss(probs, index[..., None]), one)
    separate = torch.stack([load_balance_loss(p, i[:, None]) for p, i in zip(probs, index, strict=True)])
    assert_near(separate.mean(), expected)


def test_load_balance_is_mixtrals():
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = random_tensor(TOKENS, EXPERTS)
    probs = logits.softmax(-1)
    expected = theirs.load_balancing_loss_func((logits,), EXPERTS, top_k=3)
    assert_near(3 * load_balance_loss(probs, probs.topk(3).indices), expected)


def test_load_balance_formula():
    probs = random_tensor(TOKENS, EXPERTS, dtype=torch.float64).softmax(-1)
    index = torch.randint(0, EXPERTS + 1, (TOKENS, 2))
    pairs = index.flatten().tolist()
    expected = sum(pairs.count(e) / len(pairs) * float(probs[:, e].mean()) for e in range(EXPERTS)) * EXPERTS
    assert_near(load_balance_loss(probs, index), torch.tensor(expected, dtype=torch.float64), 1e-12)
    even = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    assert_near(load_balance_loss(even, torch.arange(EXPERTS)[:, None]), torch.tensor(1.0).double(), 1e-12)


def test_importance_and_load_formulas():
    index, weight = torch.randint(0, EXPERTS + 1, (TOKENS, 3)), torch.rand(TOKENS, 3, dtype=torch.float64)
    sums = [0.0] * (EXPERTS + 1)
    for t in range(TOKENS):
        for k in range(3):
            sums[index[t, k]] += float(weight[t, k])
    expected = statistics.pvariance(sums[:EXPERTS]) / statistics.mean(sums[:EXPERTS]) ** 2
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_near(importance_loss(weight, index, EXPERTS), expected, 1e-9)
    assert_near(load_loss(torch.tensor(sums[:EXPERTS], dtype=torch.float64)), expected, 1e-9)


def test_z_loss_formula():
    theirs = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    logits = random_tensor(2, TOKENS, EXPERTS, dtype=torch.float64)
    total = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.flatten(0, 1).tolist())
    assert_near(z_loss(logits), torch.tensor(total / (2 * TOKENS), dtype=torch.float64), 1e-12)
    assert_near(z_loss(logits), theirs.router_z_loss_func(logits), 1e-12)


def test_losses_of_no_token_are_zero():
    index, weight = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    values = (
        load_balance_loss(torch.zeros(0, 5), index), importance_loss(weight, index, 5), load_loss(torch.zeros(5)),
        z_loss(torch.zeros(0, 5)),
    )  # fmt: skip
    assert all(float(value) == 0 for value in values)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"hidden": 0}, "hidden"),
        ({"num_experts": 2.5}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": EXPERTS + 1}, "top_k"),
        ({"scoring": "tanh"}, "scoring"),
        ({"jitter": 1.0}, "jitter"),
        ({"groups": 3}, "groups"),
        ({"groups": 4, "top_groups": 5}, "top_groups"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "top_groups"),
        ({"groups": 4, "top_groups": 2, "group_topk": 3}, "group_topk"),
        ({"noise": True, "correction_bias": True}, "noise"),
        ({"noise": True, "groups": 4, "top_groups": 2}, "noise"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected "):
        TopKRouter(**{"hidden": HIDDEN, "num_experts": EXPERTS, "top_k": 2} | options)


def test_bad_inputs_are_named():
    router = TopKRouter(HIDDEN, EXPERTS, 2)
    with pytest.raises(ValueError, match=r"x: expected \[..., 12\], got shape \(3, 11\)"):
        router(torch.rand(3, 11))
    with pytest.raises(TypeError, match=r"x: expected a floating tensor, got torch\.int64"):
        router(torch.zeros(3, HIDDEN, dtype=torch.int64))


def test_bad_arguments_of_losses_are_named():
    probs, index, weight = torch.rand(4, 5), torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"^index: expected shape \[4, C\], got \(3, 2\)"):
        load_balance_loss(probs, index[:3])
    with pytest.raises(ValueError, match=r"^index: expected weight's \(4, 2\), got \(4, 1\)"):
        importance_loss(weight, index[:, :1], 5)
    with pytest.raises(TypeError, match=r"^load: expected a tensor, got NoneType"):
        load_loss(None)
    with pytest.raises(ValueError, match=r"^logits: expected shape \[..., C\], got \(\)"):
        z_loss(torch.tensor(1.0))
