"""transformers' models with ``experts_implementation="dynops"``: equal to their own experts, gradients included."""

import functools
import sys

import pytest
import torch
from torch import nn

import dynops
from dynops.testing import random_tensor

pytest.importorskip("transformers", minversion="5.7")

import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers_cases import experts_classes, initialise, relative_error

from dynops.integrations import transformers_experts


@pytest.fixture(autouse=True)
def registered():
    dynops.integrations.transformers.register()


@pytest.fixture
def used(monkeypatch):
    """The activations that experts_mlp was called with."""
    calls, run = [], transformers_experts.experts_mlp

    def record(*arguments, **options):
        calls.append(options["activation"])
        return run(*arguments, **options)

    monkeypatch.setattr(transformers_experts, "experts_mlp", record)
    return calls


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
    if name == "AriaText" and "AriaExperts" not in experts_classes():
        pytest.skip(f"transformers {transformers.__version__} computes Aria's experts its own way alone")
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


def test_a_compiled_model():
    model = make_model("GptOss")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 5):
        with torch.no_grad():
            expected = run_with(model, "eager", lambda m: m(TOKENS[:, :length]).logits)  # noqa: B023
            model.set_experts_implementation("dynops")
            actual = compiled(TOKENS[:, :length]).logits
        assert relative_error(actual, expected) < 1e-4


def test_generate():
    model = make_model("Qwen3Moe")
    run = functools.partial(type(model).generate, inputs=TOKENS[:1, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(run_with(model, "dynops", run), run_with(model, "eager", run))


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
