"""The experts of transformers' models on dynops' ops; imported once transformers is known to be there.

A class of experts says by flags how its weights lie, and by ``_apply_gate`` and ``act_fn`` what stands between its two
linear layers. What dynops has is fused; anything else is called, on the rows of all experts at once.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from ..ops import combine_pairs, expert_activation, experts_mlp, grouped_linear
from ..plans import ExpertPlan, named

_ACTIVATIONS = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
    F.silu: "silu",
    F.relu: "relu",
    F.gelu: "gelu",
}


def _gates(known: dict[str, tuple]) -> dict[Callable, tuple]:
    """By the method itself: a subclass's or a wrapped one is another. Models that this transformers lacks are left out."""
    found = {}
    for name, value in known.items():
        model, kind = name.split(".")
        with contextlib.suppress(ImportError, AttributeError):
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
            found[getattr(module, kind)._apply_gate] = value
    return found


# Gates of the models' own whose formula dynops has; released checkpoints fix them. Those of clamped_swiglu, with the
# attributes of alpha and limit, and whether gate and up take turns:
_CLAMPED_GATES = _gates(
    {
        "gpt_oss.GptOssExperts": ("alpha", "limit", True),
        "openai_privacy_filter.OpenAIPrivacyFilterExperts": ("alpha", "limit", False),
        "minimax_m3_vl.MiniMaxM3VLExperts": ("swiglu_alpha", "swiglu_limit", False),
    }
)
# act_fn(gate) * up; Beam's in float32, as the kernels do it
_PLAIN_GATES = {_default_apply_gate, *_gates({"beam.BeamExperts": ()})}


class _Middle(NamedTuple):
    """Arguments of ``experts_mlp`` for what stands between the two GEMMs."""

    activation: str | Callable[[Tensor], Tensor]
    gated: bool
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    def __call__(self, rows: Tensor) -> Tensor:  # [P, 2 * I] or [P, I] -> [P, I]
        if callable(self.activation):
            return self.activation(rows)
        return expert_activation(rows, **self._asdict())


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,  # [T, H]
    top_k_index: Tensor,  # int [T, K] in [0, E]; E: dropped
    top_k_weights: Tensor,  # [T, K]
) -> Tensor:  # [T, H]
    """The ``forward`` of a module of experts, as transformers' ``ALL_EXPERTS_FUNCTIONS`` calls it.

    Pairs that expert parallelism keeps elsewhere come with the index E too, the number of this rank's experts.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down, transposed = getattr(self, up_name), self.down_proj, self.is_transposed
    up_bias = getattr(self, f"{up_name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    plan = named("top_k_index", "index", ExpertPlan.from_topk, top_k_index, up.shape[0])
    middle = _middle(self)
    if getattr(self, "has_post_expert_norm", False):  # newer than the other flags
        rows = middle(grouped_linear(hidden_states, up, plan, up_bias, transposed=transposed))
        rows = grouped_linear(rows, down, plan, down_bias, packed_in=True, transposed=transposed)
        return combine_pairs(self.post_expert_norm(rows), plan, top_k_weights).to(hidden_states.dtype)
    options = {"up_bias": up_bias, "down_bias": down_bias, "transposed": transposed, **middle._asdict()}
    return experts_mlp(hidden_states, up, down, plan, top_k_weights, **options).to(hidden_states.dtype)


def _middle(experts: nn.Module) -> _Middle:
    if not experts.has_gate:
        return _Middle(_known_activation(experts.act_fn) or experts.act_fn, False)
    gate = None if "_apply_gate" in vars(experts) else type(experts)._apply_gate
    if gate in _CLAMPED_GATES:
        alpha, limit, interleaved = _CLAMPED_GATES[gate]
        options = (interleaved, getattr(experts, alpha), getattr(experts, limit))
        return _Middle("clamped_swiglu", True, *options)
    if gate not in _PLAIN_GATES:
        return _Middle(experts._apply_gate, True)
    interleaved = not experts.is_concatenated
    name = _known_activation(experts.act_fn)
    if name is None:
        return _Middle(_gate_of(experts.act_fn, interleaved), True)
    return _Middle(name, True, interleaved)


def _known_activation(act_fn: nn.Module | Callable) -> str | None:
    """dynops' name of an activation, None where it has none or where calling the module does more."""
    if not isinstance(act_fn, nn.Module):
        return _ACTIVATIONS.get(act_fn)
    if act_fn._forward_hooks or act_fn._forward_pre_hooks or "forward" in vars(act_fn):
        return None
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(act_fn))


def _gate_of(act_fn: Callable, interleaved: bool) -> Callable[[Tensor], Tensor]:
    def apply(rows: Tensor) -> Tensor:  # [P, 2 * I] -> [P, I]
        gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, 1)
        return act_fn(gate) * up

    return apply
