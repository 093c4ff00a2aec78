"""A whole mixture-of-experts model, OLMoE's shape with fewer layers: decode and prefill, one registered line changed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..harness.compare import compare
from ..harness.rows import Row
from ..harness.setting import Budget, Setting
from .layers import DYNOPS, MODEL

IMPLEMENTATIONS = ("eager", "grouped_mm", "dynops")
CASES = {"decode": 1, "prefill": 512}  # tokens a call
CONTEXT = 128  # tokens in the cache while decoding
BUDGETS = {1: Budget(seconds=6.0, min_rounds=10), 512: Budget(seconds=15.0, min_rounds=3, warmup=1, calls=1)}
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
}


def build_olmoe(dtype: torch.dtype, **sizes: int) -> nn.Module:
    """OLMoE-1B-7B (2024) with 4 of its 16 layers, 4096 of its 50304 words and random weights, in eval mode.

    1.8 GiB a layer in float32. Rows of the weights have unit gain, so that activations are neither tiny nor huge.
    """
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from dynops.integrations.transformers import register

    torch.manual_seed(0)
    register()
    config = OlmoeConfig(**{**SIZES, **sizes}, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config.initializer_range = config.hidden_size**-0.5
    return OlmoeForCausalLM._from_config(config, dtype=dtype).eval()


def gmacs(config, tokens: int) -> float:
    """Billions of MACs of the linear layers: ``tokens`` tokens with their top-k experts, the vocabulary for one token."""
    hidden, topk = config.hidden_size, config.num_experts_per_tok
    attention = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * hidden
    attention *= hidden // config.num_attention_heads
    experts = config.num_experts * hidden + 3 * topk * hidden * config.intermediate_size
    macs = tokens * config.num_hidden_layers * (attention + experts) + config.vocab_size * hidden
    return macs / 1e9


def call_of(model: nn.Module, tokens: int, implementation: str) -> Callable[[], torch.Tensor]:
    """A call that returns the last token's logits; every call has other tokens, so that other experts are read."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache(config=model.config) if tokens == 1 else None
    draw = functools.partial(torch.randint, model.config.vocab_size, generator=generator)

    def call():
        model.set_experts_implementation(implementation)
        if cache is not None and cache.get_seq_length() == 0:
            model(draw((1, CONTEXT)).to(model.device), past_key_values=cache)
        ids = draw((1, tokens)).to(model.device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if cache is not None:
            cache.crop(-tokens)
        return logits

    return call


def all_cases(quick: bool = False) -> list[str]:
    """The model's name; none without transformers, or where there is no time for 7 GiB of weights."""
    return [] if quick or importlib.util.find_spec("transformers") is None else ["OLMoE, 4 layers"]


def measure(name: str, setting: Setting, build: Callable = build_olmoe) -> list[Row]:
    """A row for decode (batch 1, the cache full of ``CONTEXT`` tokens) and one for prefill (no cache before)."""
    model = build(setting.dtype).to(setting.device)
    with torch.inference_mode():
        return [_row(model, name, case, tokens, setting) for case, tokens in CASES.items()]


def _row(model: nn.Module, name: str, case: str, tokens: int, setting: Setting) -> Row:
    calls = {kind: call_of(model, tokens, kind) for kind in IMPLEMENTATIONS}
    check({kind: call() for kind, call in calls.items()})
    ours = {DYNOPS: calls.pop(DYNOPS)}
    times = compare(calls, ours, replace(setting, budget=BUDGETS[tokens], graph=False))
    macs = gmacs(model.config, tokens)
    return times.row(
        DYNOPS,
        suite="experts",
        group=MODEL,
        case=f"{name}, {case}",
        mask="its own routing",
        density=model.config.num_experts_per_tok / model.config.num_experts,
        gmacs=macs,
        computed_gmacs=macs,
        tokens=tokens,
        weights=setting.dtype_name,
    )


def check(logits: dict[str, torch.Tensor]) -> None:
    """Compares the logits before anything is timed. In half precision a token may choose another expert.

    Raises:
        AssertionError: an implementation differs from eager.
    """
    expected = logits["eager"].float()
    limit = 1e-4 if logits["eager"].dtype == torch.float32 else 0.1
    for kind, value in logits.items():
        error = ((value.float() - expected).norm() / expected.norm()).item()
        if not error < limit:
            raise AssertionError(f"{kind}: expected eager's logits, got a relative error of {error:.2g}")
