"""The benchmark of a whole mixture-of-experts model: what it counts, times and refuses."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.7")

from benchmark_cases import BRIEF, SETTING, briefly  # noqa: F401

from benchmarks.experts import model as models_experts
from benchmarks.experts import tables

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
}


def build(dtype: torch.dtype) -> nn.Module:
    return models_experts.build_olmoe(dtype, **SIZES)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(models_experts, "BUDGETS", dict.fromkeys(models_experts.BUDGETS, BRIEF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run(dtype):
    rows = models_experts.measure("tiny", dataclasses.replace(SETTING, dtype=dtype), build)
    assert [(row.case, row.tokens) for row in rows] == [("tiny, decode", 1), ("tiny, prefill", 512)]
    for row in rows:
        assert row.group == "model" and row.dense_all.keys() == {"eager", "grouped_mm"} and row.ours_ms > 0
    header, decode, _ = tables.tables(rows)[0].splitlines()
    assert "ours tokens/s" in header
    assert f"{1e3 / rows[0].ours_ms:.1f}" in decode and f"{rows[0].speedup:.2f}x" in decode


@pytest.mark.parametrize("tokens", [1, 5])
def test_macs_are_those_of_the_linear_layers(tokens):
    model, counted = build(torch.float32), []

    def count(module, inputs, out):
        counted.append(out.numel() * module.in_features)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.arange(tokens)[None], logits_to_keep=1)
    layers, experts = model.model.layers, 0
    for layer in layers:
        router, mlp = layer.mlp.gate.weight, layer.mlp.experts
        experts += tokens * (router.numel() + 2 * (mlp.gate_up_proj[0].numel() + mlp.down_proj[0].numel()))
    assert models_experts.gmacs(model.config, tokens) == pytest.approx((sum(counted) + experts) / 1e9)


def test_decoding_keeps_the_length_of_the_cache(monkeypatch):
    lengths, model = [], build(torch.float32)
    forward = type(model).forward

    def record(self, ids, past_key_values=None, **options):
        lengths.append((ids.shape[1], past_key_values.get_seq_length()))
        return forward(self, ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(type(model), "forward", record)
    call = models_experts.call_of(model, 1, "dynops")
    with torch.no_grad():
        logits = [call() for _ in range(3)]
    assert lengths == [(models_experts.CONTEXT, 0)] + [(1, models_experts.CONTEXT)] * 3
    assert not torch.equal(logits[0], logits[1])


def test_other_logits_than_eagers_are_refused():
    logits = {kind: torch.ones(1, 1, 40) for kind in models_experts.IMPLEMENTATIONS}
    models_experts.check(logits)
    for wrong in (torch.full((1, 1, 40), 1.001), torch.full((1, 1, 40), float("nan"))):
        with pytest.raises(AssertionError, match="dynops: expected eager's logits"):
            models_experts.check({**logits, "dynops": wrong})
