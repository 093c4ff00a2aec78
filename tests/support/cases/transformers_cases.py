"""Classes of experts of transformers' models, and both ways to run them."""

import importlib
import inspect
import pathlib

import torch
import transformers
from torch import nn


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


def choices(tokens: int, topk: int = 2, experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, experts).topk(topk).indices, torch.rand(tokens, topk) + 0.1


def both(experts: nn.Module, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(eager, dynops)"""
    return run(experts, "eager", *inputs), run(experts, "dynops", *inputs)


def run(experts: nn.Module, implementation: str, *inputs) -> torch.Tensor:
    experts.config._experts_implementation = implementation
    return experts(*inputs)
