"""Mixtures: buffers that casts leave alone, padding in the losses, counts of MACs, and errors that name the caller's argument."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dynops
from dynops.budget import MacCounter
from dynops.gates import Threshold
from dynops.nn import (
    ChannelConv2d,
    ChannelLinear,
    ConvExperts,
    Experts,
    GroupedDynamicConv2d,
    MaskedBatchNorm2d,
    MaxSoftmax,
    MoE,
    Skip,
    SparseBlocks,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseSequential,
    TopKRouter,
    importance_loss,
    load_balance_loss,
    z_loss,
)
from dynops.nn.steps.cells import compacted_cell
from dynops.testing import random_tensor

E, K, T, H = 4, 2, 10, 8
NAN = float("nan")


def _router():
    router = TopKRouter(H, E, K, scoring="sigmoid", correction_bias=True)
    router.e_score_correction_bias.copy_(torch.tensor([1.0001, -0.3, 257.001, 0.1]))
    return router


def _dynamic():
    layer = GroupedDynamicConv2d(600, 8, 3, heads=2)
    layer.inactive_channels = 257
    return layer


EXACT = {
    "router": (_router, "e_score_correction_bias"),
    "criterion": (lambda: MaxSoftmax(0.999, 1.001), "threshold"),
    "temperature": (lambda: MaxSoftmax(0.999, 1.001), "temperature"),
    "scales": (lambda: Experts(E, H, 6).quantized(), "down_proj_scale"),
    "gate": (lambda: Threshold(0.301, learned=False), "threshold"),
    "count": (_dynamic, "_inactive_channels"),
}


@pytest.mark.parametrize("name", EXACT)
def test_casts_leave_exact_buffers_alone(name):
    make, buffer = EXACT[name]
    module, value = make(), getattr(make(), buffer).clone()
    value = getattr(module, buffer).clone()
    casts = (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: nn.Sequential(m).to(dtype=torch.float16)[0],
        lambda m: copy.deepcopy(m.bfloat16()),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("meta", torch.bfloat16),
    )
    for cast in casts:
        made = getattr(cast(copy.deepcopy(module)), buffer)
        assert made.dtype == value.dtype
        assert made.is_meta or torch.equal(made, value)
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    for assign in (False, True):
        other = make()
        other.load_state_dict(narrow, assign=assign)
        assert getattr(other, buffer).dtype == value.dtype
        other.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(getattr(other, buffer), value)


@pytest.mark.parametrize("name", ["router", "count", "gate"])
def test_the_default_dtype_makes_no_narrow_buffers(name):
    make, buffer = EXACT[name]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert getattr(make(), buffer).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_small_steps_of_a_correction_add_up_in_bfloat16():
    router = TopKRouter(H, E, K, correction_bias=True).bfloat16()
    for _ in range(1500):
        router.update_correction(torch.zeros(8, K, dtype=torch.long))
    assert abs(float(router.e_score_correction_bias[0]) + 1.5) < 1e-3
    assert router(random_tensor(3, H).bfloat16()).weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [(T,), (2, 5)])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_counts_in_no_loss(shape, kind):
    logits = random_tensor(*shape, E).requires_grad_()
    mask = torch.ones(shape, dtype=kind)
    mask.view(-1)[[0, 3, 9]] = 0
    real = mask.flatten().bool()
    probs = logits.softmax(-1)
    weight, index = probs.topk(K)
    cut = [t.flatten(0, -2)[real] for t in (logits, probs, weight, index)]
    pairs = [
        (load_balance_loss(probs, index, mask), load_balance_loss(cut[1], cut[3])),
        (load_balance_loss(probs, index, mask.flatten()), load_balance_loss(cut[1], cut[3])),
        (
            load_balance_loss(probs, index.masked_fill(mask[..., None] == 0, E)),
            load_balance_loss(cut[1], cut[3]),
        ),
        (importance_loss(weight, index, E, mask), importance_loss(cut[2], cut[3], E)),
        (z_loss(logits, mask), z_loss(cut[0])),
    ]
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact)
        for grads in zip(
            *(torch.autograd.grad(t, logits, retain_graph=True) for t in (ours, exact)), strict=True
        ):
            torch.testing.assert_close(*grads)
    poisoned = logits.detach().masked_fill(mask[..., None] == 0, NAN).requires_grad_()
    torch.testing.assert_close(z_loss(poisoned, mask), pairs[-1][0])
    assert torch.isfinite(torch.autograd.grad(z_loss(poisoned, mask), poisoned)[0]).all()
    none = torch.zeros(shape)
    assert load_balance_loss(probs, index, none) == 0 == z_loss(logits, none)


def test_a_mixture_passes_the_mask_on():
    moe = MoE.from_sizes(H, 6, E, K, losses={"load_balance": 1.0, "importance": 1.0, "z": 1.0})
    x, mask = random_tensor(2, 5, H), torch.ones(2, 5)
    mask[0, :3] = 0
    whole, cut = moe(x, mask), moe(x[mask.bool()])
    torch.testing.assert_close(whole.losses, cut.losses)
    torch.testing.assert_close(whole.output[mask == 1], cut.output)
    assert (whole.output[mask == 0] == 0).all()
    router = TopKRouter(H, E, K, noise=True)
    noisy = MoE(router, Experts(E, H, 6), losses={"load": 1.0})
    torch.manual_seed(1)
    exact = router(x)
    torch.manual_seed(1)
    load = noisy(x, mask).routing.load
    torch.manual_seed(1)
    swapped = x.clone()
    swapped[0, :3] = 100.0
    assert not torch.equal(load, exact.load)
    torch.testing.assert_close(router(swapped, mask).load, load)  # whatever lies in the padding
    compiled = torch.compile(moe.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask).output, moe(x, mask).output)
    every = TopKRouter(H, E, E, noise=True)(x, mask).load
    assert every.tolist() == [7.0] * E
    with pytest.raises(
        ValueError, match=r"^attention_mask: expected one number for each of 10 tokens, got shape \(5,\)"
    ):
        moe(x, torch.ones(5))


def test_padding_takes_no_place_in_an_expert():
    moe = MoE.from_sizes(H, 6, E, 1, capacity_factor=1.0).eval()
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(E, H))
    x = torch.zeros(4, H)
    x[:, 0] = 1 + torch.arange(4.0)  # all choose the first expert, which takes one
    out = moe(x, torch.tensor([0, 0, 0, 1])).output
    assert (out[:3] == 0).all() and (out[3] != 0).any()


def total(module, *args):
    with torch.no_grad(), MacCounter(module) as macs:
        module(*args)
    return float(macs.total), macs.dense


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "output_padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": 3, "dilation": 2},
        {"kernel_size": 2, "stride": 4},
        {"kernel_size": 3, "groups": 3},
    ],
)
def test_transposed_convolutions_count_every_tap_of_every_input(options):
    for dims, kind in enumerate(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, SparseConvTranspose2d), 1
    ):
        dims = min(dims, 3) if kind is not SparseConvTranspose2d else 2
        layer, x = kind(3, 6, **options), torch.randn(2, 3, *(5, 4, 6)[:dims])
        exact = (
            x[0, 0].numel() * layer.weight.numel() * 2
        )  # each weight meets each input pixel of its group once
        assert total(layer, x) == (exact, exact)
        if kind is SparseConvTranspose2d:
            full = torch.ones(2, *layer(x).shape[2:])
            assert total(layer, x, full) == (pytest.approx(exact), exact)
    block = nn.Sequential(nn.ConvTranspose2d(3, 3, 2, 2), nn.ConvTranspose2d(3, 3, 3, padding=1)).eval()
    x = torch.randn(1, 3, 4, 4)
    exact = 16 * 9 * 4 + 64 * 9 * 9
    blocks = SparseBlocks(block, 8, path="rows")
    assert total(blocks, x, torch.ones(1, 8, 8)) == (exact, exact)


def brute_force(module, *args):
    """Products that ``nn.functional.linear``, matmul and bmm make."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        module(*args)
    return flops.get_total_flops() / 2


def _mixtures():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    qwen = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
    for name, options in {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": qwen,
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "Phimoe": {"num_local_experts": 4},
        "Llama4Text": {"num_local_experts": 4, "intermediate_size_mlp": 24, "head_dim": 8},
    }.items():
        kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
        yield name, kind(getattr(transformers, f"{name}Config")(**sizes, **options)).eval()


def test_experts_and_routers_of_transformers_count():
    for name, model in _mixtures():
        layer = model.model.layers[0]
        block = getattr(layer, "mlp", None) or layer.feed_forward
        x = torch.randn(2, 5, 16)
        made = {}
        for implementation in ("eager",) if name == "Llama4Text" else ("eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            made[implementation] = total(block, x)
        assert len(set(made.values())) == 1
        model.set_experts_implementation("eager")
        count, dense = made["eager"]
        assert count == brute_force(block, x), name
        with MacCounter(block) as macs, torch.no_grad():
            block(x)
        assert float(macs.per_sample[0]) == count / 2 and dense >= count


def _bad(shape):
    mask = torch.ones(shape)
    mask.view(-1)[0] = NAN
    return mask


X = torch.randn(4, 4, 8, 8)
CONV = nn.Conv2d(4, 4, 3, padding=1)
ROWS = torch.randn(T, H)
ERRORS = {
    "gate": [
        lambda: Skip(CONV)(X, _bad(4)),
        lambda: Skip(CONV, dense=True)(X, _bad(4)),
        lambda: Skip(CONV, max_fraction=0.5)(X, _bad(4)),
        lambda: Skip(CONV)(X, _bad(4).requires_grad_()),
        lambda: Skip(CONV)(X, torch.ones(5)),
        lambda: Skip(CONV).plan(torch.ones(4, 2)),
    ],
    "keep": [
        lambda: dynops.SamplePlan.from_mask(_bad(4)),
        lambda: dynops.SamplePlan.from_mask(_bad(4), 2),
        lambda: dynops.SamplePlan.full(4).shrink(_bad(4)),
    ],
    "mask_or_plan": [
        lambda layer=layer, mask=mask: layer(X, mask)
        for layer in (
            SparseConv2d(4, 4, 3, padding=1),
            SparseConvTranspose2d(4, 4, 3, padding=1),
            SparseSequential(CONV),
            SparseBlocks(CONV, 4),
        )
        for mask in (
            _bad((4, 8, 8)),
            torch.ones(4, 7, 8),
            torch.ones(4, 8),
            torch.ones(4, 8, 8).cfloat(),
            "a",
        )
    ]
    + [lambda: MaskedBatchNorm2d(4)(X, _bad((4, 8, 8)))],
    "in_plan": [
        lambda: ChannelConv2d(4, 4, 3)(X, _bad((4, 4))),
        lambda: ChannelConv2d(4, 4, 3)(X, torch.ones(4, 4, 2, 2)),
        lambda: ChannelLinear(H, H)(ROWS, _bad((T, H))),
    ],
    "out_plan": [
        lambda: ChannelConv2d(4, 4, 3)(X, None, _bad((4, 4))),
        lambda: ChannelLinear(H, H)(ROWS, None, _bad((T, H))),
    ],
    "topk_index": [
        lambda: Experts(E, H, 6)(ROWS, torch.full((T, K), E + 1)),
        lambda: Experts(E, H, 6)(ROWS, torch.full((T, K), -1)),
        lambda: Experts(E, H, 6)(ROWS, torch.ones(T, K)),
        lambda: Experts(E, H, 6)(ROWS, torch.zeros(T, 0).long()),
        lambda: ConvExperts([CONV, CONV])(X, torch.full((4,), 3)),
        lambda: ConvExperts([CONV, CONV])(X, torch.ones(4)),
    ],
    "index": [
        lambda: load_balance_loss(torch.rand(T, E), torch.full((T, K), E + 1)),
        lambda: load_balance_loss(torch.rand(T, E), torch.rand(T, K)),
        lambda: importance_loss(torch.rand(T, K), torch.full((T, K), -1), E),
        lambda: TopKRouter(H, E, K, correction_bias=True).update_correction(torch.rand(T, K)),
        lambda: TopKRouter(H, E, K, correction_bias=True).update_correction(torch.full((T, K), -1)),
    ],
    "attention_mask": [
        lambda: z_loss(torch.rand(T, E), torch.ones(3)),
        lambda: load_balance_loss(torch.rand(T, E), torch.zeros(T, K).long(), [1] * T),
    ],
    "update": [lambda: compacted_cell(nn.GRUCell(H, H), ROWS, ROWS, _bad(T))],
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_of_who_was_called(name):
    for call in ERRORS[name]:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
            call()


@pytest.mark.parametrize("name", ["Llama4", "SwitchTransformers", "Llama", "Mixtral"])
def test_a_model_that_cannot_use_the_experts_says_so(name):
    transformers = pytest.importorskip("transformers")
    dynops.integrations.transformers.register()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 20, "head_dim": 8, "num_local_experts": 4}
    coder = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "vocab_size": 20, "num_experts": 4}
    kind, made, options = {
        "Llama4": ("Llama4ForCausalLM", "Llama4TextConfig", sizes | {"intermediate_size_mlp": 24}),
        "SwitchTransformers": (
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            coder | {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1},
        ),
        "Llama": ("LlamaForCausalLM", "LlamaConfig", sizes),
        "Mixtral": ("MixtralForCausalLM", "MixtralConfig", sizes),
    }[name]
    kind, config = getattr(transformers, kind), lambda: getattr(transformers, made)(**options)
    model = kind(config())

    def warned(call):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return [
            str(w.message)
            for w in caught
            if "experts_implementation='dynops' changes nothing" in str(w.message)
        ]

    messages = warned(lambda: model.set_experts_implementation("dynops"))
    if name == "Mixtral":
        assert messages == [] and model.config._experts_implementation == "dynops"
    else:
        assert len(messages) == 1 and messages[0].startswith(kind.__name__)
        reason = "it has no experts" if name == "Llama" else "Experts does not use transformers' interface"
        assert reason in messages[0]
    assert warned(lambda: model.set_experts_implementation("eager")) == []
    other = config()
    other._experts_implementation = "dynops"
    assert bool(warned(lambda: kind(other))) == (name not in ("Llama", "Mixtral"))
