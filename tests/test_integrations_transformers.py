"""transformers' models with ``experts_implementation="dynops"``: equal to their own experts, gradients included."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops.testing import assert_within_budget, random_tensor

pytest.importorskip("transformers", minversion="5.7")

import transformers
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from dynops.integrations import transformers_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def registered():
    dynops.integrations.transformers.register()


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are done sooner by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def used(monkeypatch):
    """The activations that experts_mlp was called with."""
    calls, run = [], transformers_experts.experts_mlp

    def record(*arguments, **options):
        calls.append(options["activation"])
        return run(*arguments, **options)

    monkeypatch.setattr(transformers_experts, "experts_mlp", record)
    return calls


def relative_error(actual, expected) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def initialise(module: nn.Module, transposed: bool = False) -> nn.Module:
    """Weights for which unit-scale inputs give unit-scale outputs: their own are 0.02 * randn or empty."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_()
            elif parameter.dim() > 1:
                inputs = -2 if transposed and parameter.dim() == 3 else -1
                parameter.normal_(0, parameter.shape[inputs] ** -0.5)
    return module


# ---------------------------------------------------------------------------------- whole models

VOCABULARY, TOPK = 97, "num_experts_per_tok"
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "n_routed_experts": 6,
    "moe_shared_expert_intermediate_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 4,
    "head_dim": 8,
}
SHARED = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}
MODELS = {  # the class's stem: (options of its configuration, the activation that is fused)
    "Mixtral": ({"intermediate_size": 24, "num_local_experts": 5}, "silu"),
    "Qwen3Moe": ({"moe_intermediate_size": 20, "num_experts": 7, "head_dim": 8}, "silu"),
    "Olmoe": ({"intermediate_size": 20, "num_experts": 8}, "silu"),
    "Qwen2Moe": ({**SHARED, "num_experts": 6}, "silu"),
    "GptOss": (
        {"intermediate_size": 20, "num_local_experts": 6, "head_dim": 8, "swiglu_limit": 1.0},
        "clamped_swiglu",
    ),
    "AriaText": ({"intermediate_size": 20, "moe_num_experts": 6, "moe_num_shared_experts": 1}, "silu"),
    "GraniteMoe": ({"intermediate_size": 20, "num_local_experts": 6}, "silu"),
    "NemotronH": ({"moe_intermediate_size": 20, **NEMOTRON}, "relu2"),
}
TOKENS = torch.arange(18).view(2, 9) * 5 % VOCABULARY


def make_model(name: str, dtype=torch.float32) -> nn.Module:
    options = {**COMMON, **MODELS[name][0], "moe_topk" if name == "AriaText" else TOPK: 3}
    if "layers_block_type" in options:
        del options["num_hidden_layers"]
    config = getattr(transformers, f"{name}Config")(**options, dtype=dtype, experts_implementation="dynops")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return initialise(model.to(dtype).eval(), transposed=name in ("GptOss", "AriaText"))


def run_with(model: nn.Module, implementation: str, run):
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    return run(model)


def decode(model: nn.Module) -> list[torch.Tensor]:
    """Logits of six tokens at once, then of one more at a time with the cache of those before."""
    with torch.no_grad():
        out = model(TOKENS[:, :6], use_cache=True)
        logits = [out.logits]
        for i in range(6, TOKENS.shape[1]):
            out = model(TOKENS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(TOKENS).logits
    logits.backward(random_tensor(*logits.shape, generator=torch.Generator().manual_seed(1)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_prefill_and_decode(name, used):
    model = make_model(name)
    expected = run_with(model, "eager", decode)
    assert not used
    for actual, right in zip(run_with(model, "dynops", decode), expected, strict=True):
        assert right.std() > 0.1
        assert relative_error(actual, right) < 1e-4
    assert len(used) == 2 * len(expected) and set(used) == {MODELS[name][1]}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter(name):
    model = make_model(name)
    expected = run_with(model, "eager", gradients)
    actual = run_with(model, "dynops", gradients)
    assert actual.keys() == expected.keys() and any("experts" in key for key in actual)
    for key, right in expected.items():
        assert relative_error(actual[key], right) < 1e-4, key


def test_a_whole_model_in_bfloat16(used):
    """Close to its own eager run; the layer has the error budget below."""
    model = make_model("Mixtral", torch.bfloat16)
    expected, actual = run_with(model, "eager", decode)[0], run_with(model, "dynops", decode)[0]
    assert actual.dtype == torch.bfloat16 and used
    assert relative_error(actual.float(), expected.float()) < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_compiled_model(name, used):
    model = make_model(name)
    with torch.no_grad():
        expected = run_with(model, "eager", lambda m: m(TOKENS).logits)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = run_with(model, "dynops", lambda _: compiled(TOKENS).logits)
    assert relative_error(actual, expected) < 1e-4


def test_a_compiled_models_gradients():
    model = make_model("Olmoe")
    expected = run_with(model, "eager", gradients)
    model.set_experts_implementation("dynops")
    model.zero_grad()
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).logits
    logits.backward(random_tensor(*logits.shape, generator=torch.Generator().manual_seed(1)))
    for key, right in expected.items():
        assert relative_error(model.get_parameter(key).grad, right) < 1e-4, key


def test_generate():
    model = make_model("Qwen3Moe")
    run = functools.partial(type(model).generate, inputs=TOKENS[:1, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(run_with(model, "dynops", run), run_with(model, "eager", run))


# ------------------------------------------------------------------------- every class of experts


class Config:
    """Has what any class of experts reads of its configuration."""

    hidden_act = hidden_activation = mlp_hidden_act = "silu"
    num_experts = num_local_experts = n_routed_experts = moe_num_experts = 5
    hidden_size = moe_hidden_size = moe_latent_size = 16
    intermediate_size = moe_intermediate_size = expert_intermediate_size = 12
    swiglu_alpha, swiglu_limit = 1.702, 0.75
    mlp_gate_softcap = mlp_up_softcap = 1.5
    post_norm_eps = 1e-5

    def __init__(self, hidden_act: str = "silu"):
        self.hidden_act = hidden_act
        self._experts_implementation = "dynops"


def experts_classes() -> dict[str, type[nn.Module]]:
    """Every class of experts of transformers' models, by its name."""
    found = {}
    for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found |= {
                name: value
                for name, value in vars(module).items()
                if inspect.isclass(value) and value.__module__ == module.__name__ and hasattr(value, "_apply_gate")
            }  # fmt: skip
    return found


CALLED = {"DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts", "Inkling2Experts"}


def choices(tokens: int, topk: int = 2, experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, experts).topk(topk).indices, torch.rand(tokens, topk) + 0.1


def both(experts: nn.Module, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(eager, dynops)"""
    results = []
    for name in ("eager", "dynops"):
        experts.config._experts_implementation = name
        results.append(experts(*inputs))
    return tuple(results)


def test_every_class_of_experts():
    """Equal to eager; fused, but where the gate is one that dynops has no formula for."""
    classes = experts_classes()
    assert len(classes) > 30 and {"MixtralExperts", "GptOssExperts", "NemotronHExperts"} <= classes.keys()
    called = set()
    for name, kind in classes.items():
        experts = initialise(kind(Config()))
        with torch.no_grad():
            expected, actual = both(experts, torch.randn(9, 16), *choices(9))
        assert relative_error(actual, expected) < 1e-5, name
        if callable(transformers_experts._middle(experts).activation):
            called.add(name)
    assert called == CALLED & classes.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "AriaExperts", "NemotronHExperts"])
def test_error_budget(name, dtype, poisoned):
    experts = initialise(experts_classes()[name](Config()), name in ("GptOssExperts", "AriaExperts"))
    experts.to(dtype)
    x, (index, weights) = random_tensor(33, 16, dtype=dtype), choices(33)
    with torch.no_grad():
        eager, actual = both(experts, x, index, weights.to(dtype))
        exact, _ = both(copy.deepcopy(experts).double(), x.double(), index, weights.to(dtype).double())
    assert_within_budget(actual, exact, eager)


@pytest.mark.parametrize("grad", [False, True])
def test_an_index_of_the_number_of_experts_is_dropped(grad):
    experts = initialise(experts_classes()["MixtralExperts"](Config()))
    x, (index, weights) = random_tensor(9, 16).requires_grad_(grad), choices(9)
    index[::2, 0], index[3] = 5, 5
    results = both(experts, x, index, weights)
    assert relative_error(results[1], results[0]) < 1e-6 and not results[1][3].any()
    if grad:
        inputs, dy = (x, *experts.parameters()), random_tensor(9, 16)
        for right, actual in zip(*(torch.autograd.grad(y, inputs, dy) for y in results), strict=True):
            assert relative_error(actual, right) < 1e-5
    assert not both(experts, x, torch.full_like(index, 5), weights)[1].any()


@pytest.mark.parametrize("topk", [1, 5])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_sizes(tokens, topk):
    experts = initialise(experts_classes()["MixtralExperts"](Config()))
    index, weights = choices(tokens, topk)
    with torch.no_grad():
        expected, actual = both(experts, random_tensor(tokens, 16), index, weights)
    assert actual.shape == (tokens, 16) and (actual - expected).norm() <= 1e-6 * expected.norm()


def test_out_of_range_index():
    experts = initialise(experts_classes()["MixtralExperts"](Config()))
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 5\], got 0 to 6"):
        experts(random_tensor(2, 16), torch.tensor([[0, 1], [6, 2]]), torch.ones(2, 2))


def test_autocast():
    """float32 hidden states, as a norm leaves them, and bfloat16 weights."""
    experts = initialise(experts_classes()["MixtralExperts"](Config())).bfloat16()
    inputs = random_tensor(9, 16), *choices(9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = both(experts, *inputs)
    assert actual.dtype == expected.dtype == torch.float32
    assert relative_error(actual, expected) < 4 * torch.finfo(torch.bfloat16).eps


# ----------------------------------------------------------------------------- flags and gates


class Layer(nn.Module):
    """A class of experts as a model could write it; what ``use_experts_implementation`` is told varies."""

    def __init__(self, config, flags: dict):
        super().__init__()
        self.flags, self.act_fn = flags, activations.ACT2FN[config.hidden_act]
        outputs = 24 if flags["has_gate"] else 12
        name = "gate_up_proj" if flags["has_gate"] else "up_proj"
        shapes = ((5, outputs, 16), (5, 16, 12))
        for key, shape in zip((name, "down_proj"), shapes, strict=True):
            o, i = shape[1:]
            stored = (5, i, o) if flags["is_transposed"] else shape
            setattr(self, key, nn.Parameter(torch.randn(stored) * i**-0.5))
            if flags["has_bias"]:
                setattr(self, f"{key}_bias", nn.Parameter(torch.randn(5, o)))
        if flags["has_post_expert_norm"]:
            self.post_expert_norm = nn.RMSNorm(16)
            nn.init.normal_(self.post_expert_norm.weight)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """Every token through its experts, one by one."""
        first = "gate_up_proj" if self.flags["has_gate"] else "up_proj"
        out = torch.zeros_like(hidden_states)
        for t, k in ((t, k) for t in range(len(top_k_index)) for k in range(top_k_index.shape[1])):
            e = int(top_k_index[t, k])
            if e < 5:
                h = self._between(self._linear(first, e, hidden_states[t : t + 1]))
                y = self._linear("down_proj", e, h)
                y = self.post_expert_norm(y) if self.flags["has_post_expert_norm"] else y
                out = out.index_add(0, torch.tensor([t]), y * top_k_weights[t, k])
        return out

    def _linear(self, name, e, row):
        weight = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.flags["has_bias"] else None
        return F.linear(row, weight.mT if self.flags["is_transposed"] else weight, bias)

    def _between(self, row):
        if not self.flags["has_gate"]:
            return self.act_fn(row)
        gate, up = row.chunk(2, 1) if self.flags["is_concatenated"] else (row[:, ::2], row[:, 1::2])
        return self.act_fn(gate) * up


class OwnGateLayer(Layer):
    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, 1)
        return torch.tanh(gate) * (up + 2)

    def _between(self, row):
        return self._apply_gate(row)


FLAGS = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}
NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


def make_layer(hidden_act: str = "silu", base: type = Layer, **changed) -> nn.Module:
    flags = {**FLAGS, **changed}
    known = flags if NORM else {k: v for k, v in flags.items() if k != "has_post_expert_norm"}
    kind = use_experts_implementation(type("Kind", (base,), {}), **known)
    return kind(Config(hidden_act), flags)


def fused(experts: nn.Module) -> bool:
    return isinstance(transformers_experts._middle(experts).activation, str)


def assert_same(experts: nn.Module) -> None:
    """Values and all gradients of both, with dropped pairs."""
    index, weights = choices(7, 3)
    index[0, 1], index[5] = 5, 5
    inputs = random_tensor(7, 16).requires_grad_(), weights.requires_grad_(), *experts.parameters()
    expected, actual = both(experts, inputs[0], index, weights)
    assert relative_error(actual, expected) < 1e-6
    dy = random_tensor(7, 16)
    grads = (torch.autograd.grad(y, inputs, dy) for y in (expected, actual))
    for right, grad in zip(*grads, strict=True):
        assert relative_error(grad, right) < 1e-5
    with torch.no_grad():
        assert relative_error(both(experts, inputs[0], index, weights)[1], expected) < 1e-6


@pytest.mark.parametrize("hidden_act", ["silu", "mish"])
@pytest.mark.parametrize("has_post_expert_norm", [False, True] if NORM else [False])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("gate", ["none", "concatenated", "interleaved", "own"])
def test_flags(gate, is_transposed, has_bias, has_post_expert_norm, hidden_act):
    experts = make_layer(
        hidden_act,
        OwnGateLayer if gate == "own" else Layer,
        has_gate=gate != "none",
        is_concatenated=gate != "interleaved",
        is_transposed=is_transposed,
        has_bias=has_bias,
        has_post_expert_norm=has_post_expert_norm,
    )
    assert fused(experts) == (hidden_act == "silu" and gate != "own")
    assert_same(experts)


FUSED = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "silu": "silu",
    "swish": "silu",
}


def test_activations():
    """The names are those of the formulas, in float64; the rest is called."""
    x = torch.linspace(-9, 9, 999, dtype=torch.float64)[:, None]
    known = {}
    for key in activations.ACT2FN:
        module = activations.ACT2FN[key]
        name = transformers_experts._known_activation(module)
        if name is not None:
            known[key] = name
            actual = dynops.ops.expert_activation(x, name, gated=False)
            assert relative_error(actual, module(x)) < 1e-12, key
    assert known == FUSED


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu, nn.GELU(), nn.GELU("tanh"), torch.tanh])
def test_other_activations(function):
    experts = make_layer()
    del experts.act_fn
    experts.act_fn = function
    assert fused(experts) == (function is not torch.tanh)
    assert_same(experts)


def test_a_hook_on_the_activation_is_called():
    experts, seen = make_layer(), []
    experts.act_fn.register_forward_hook(lambda module, inputs, out: seen.append(out))
    assert_same(experts)
    assert seen and not fused(experts)


def test_a_gate_set_on_a_module_is_called():
    """Also where it wraps the known one, whose name it then has."""
    experts = initialise(experts_classes()["GptOssExperts"](Config()), transposed=True)
    known, x, chosen = experts._apply_gate, random_tensor(9, 16), choices(9)
    with torch.no_grad():
        before = experts(x, *chosen)
        experts._apply_gate = types.MethodType(
            functools.wraps(type(experts)._apply_gate)(lambda self, rows: known(rows) * 2), experts
        )
        assert not fused(experts)
        expected, actual = both(experts, x, *chosen)
    assert relative_error(actual, expected) < 1e-6 and relative_error(actual, before) > 0.1


def test_a_gate_of_a_subclass_is_called():
    parent = experts_classes()["MixtralExperts"]

    class Halved(parent):
        def _apply_gate(self, rows):
            return super()._apply_gate(rows) / 2

    experts = initialise(Halved(Config()))
    x, chosen = random_tensor(9, 16), choices(9)
    with torch.no_grad():
        whole, half = both(experts, x, *chosen)  # Mixtral's own forward knows no _apply_gate
    assert relative_error(half * 2, whole) < 1e-6


# ------------------------------------------------------------------------------------- register


def test_register_twice_and_by_another_name():
    dynops.integrations.transformers.register()
    dynops.integrations.transformers.register("other")
    assert ALL_EXPERTS_FUNCTIONS["dynops"] is ALL_EXPERTS_FUNCTIONS["other"]
    del type(ALL_EXPERTS_FUNCTIONS)._global_mapping["other"]


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_a_name_that_is_taken(name):
    before = ALL_EXPERTS_FUNCTIONS.get(name)
    with pytest.raises(ValueError, match=f"name: expected one that no other .*got '{name}'"):
        dynops.integrations.transformers.register(name)
    assert ALL_EXPERTS_FUNCTIONS.get(name) is before


@pytest.mark.parametrize("version", ["4.57.6", "5.6.1"])
def test_an_older_transformers(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"expected transformers >= 5.7, got {version}"):
        dynops.integrations.transformers.register()


@pytest.mark.parametrize("version", ["5.7.0.dev0", "5.100.0", "6.0.0"])
def test_a_newer_transformers(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    dynops.integrations.transformers.register()


def test_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="not installed"):
        dynops.integrations.transformers.register()
