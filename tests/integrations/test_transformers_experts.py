"""Every class of experts of transformers, every flag, activation and gate: equal to eager, gradients included."""

import copy
import functools
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops.testing import assert_within_budget, random_tensor

pytest.importorskip("transformers", minversion="5.7")

from transformers import activations
from transformers.integrations.moe import use_experts_implementation
from transformers_cases import Config, both, choices, experts_classes, initialise, relative_error, run

from dynops.integrations import transformers_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def registered():
    dynops.integrations.transformers.register()


# Gates of their own that no op of dynops has the formula of.
CALLED = {
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "HYV4Experts",
    "HYV4VLExperts",
    "Inkling2Experts",
    "Inkling2LoopExperts",
}


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
    if name not in experts_classes():
        pytest.skip("this transformers computes them its own way alone")
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
    # the eager experts of some versions raise for it: an index of weight 0 is the same
    kept = index.clamp(max=4), weights * (index < 5)
    results = run(experts, "eager", x, *kept), run(experts, "dynops", x, index, weights)
    assert relative_error(results[1], results[0]) < 1e-6 and not results[1][3].any()
    if grad:
        inputs, dy = (x, *experts.parameters()), random_tensor(9, 16)
        for right, actual in zip(*(torch.autograd.grad(y, inputs, dy) for y in results), strict=True):
            assert relative_error(actual, right) < 1e-5
    assert not run(experts, "dynops", x, torch.full_like(index, 5), weights).any()


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


def test_export():
    """For any number of tokens."""
    experts = initialise(experts_classes()["MixtralExperts"](Config()))
    tokens = {0: torch.export.Dim("tokens", min=2, max=512)}
    with torch.no_grad():
        program = torch.export.export(
            experts, (torch.randn(9, 16), *choices(9)), dynamic_shapes=(tokens, tokens, tokens)
        )
        inputs = torch.randn(17, 16), *choices(17)
        expected, _ = both(experts, *inputs)
        assert relative_error(program.module()(*inputs), expected) < 1e-6


def test_autocast():
    """float32 hidden states, as a norm leaves them, and bfloat16 weights."""
    experts = initialise(experts_classes()["MixtralExperts"](Config())).bfloat16()
    inputs = random_tensor(9, 16), *choices(9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = both(experts, *inputs)
    assert actual.dtype == expected.dtype == torch.float32
    assert relative_error(actual, expected) < 4 * torch.finfo(torch.bfloat16).eps


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
