"""The MACs of experts and routers that hold their weights themselves and call functions, as transformers' do."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .dense_rules import Cost

_ROUTER = re.compile(r"(Router|Gate|Gating)(?![a-z])")


def matrices_of(module: nn.Module) -> list[Tensor]:
    """The weights of all experts of a module, or [] where it is none.

    ``[E, …, …]`` each, in a class that is called Experts (Mixtral's and its kin, Llama 4, JetMoe), or matrices of all
    experts one upon the other, in a module that gets the choices (DBRX).
    """
    kind = type(module)
    if not kind.__name__.endswith("Experts") or kind.__module__.startswith("dynops."):
        return []
    # these are called, and counted (Switch, NLLB)
    if any(isinstance(each, nn.Linear) for each in module.modules()):
        return []
    found = [p for p in module.parameters() if p.dim() == 3]
    if not found and hasattr(module, "num_experts"):
        found = [p for name, p in module.named_parameters() if p.dim() == 2 and not name.endswith("bias")]
    return found


def _choices(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
    """The rows, and int ``[T, K]``, the experts of each, whatever the argument is called."""
    x, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    ints = (t for t in others[:1] if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool)
    return x, next(ints, None)


def called_experts(module: nn.Module, args: tuple, kwargs: dict, out) -> Cost:
    """The chosen experts of each row; where no choices come (Llama 4, JetMoe) a row is one expert's."""
    matrices = matrices_of(module)
    x, index = _choices(args, kwargs)
    total = float(sum(weight.numel() for weight in matrices))
    if index is None:
        return Cost(x.shape[0], total / matrices[0].shape[0])
    experts = matrices[0].shape[0] if matrices[0].dim() == 3 else module.num_experts
    each = total / experts
    chosen = ((index >= 0) & (index < experts)).reshape(x.shape[0], -1).sum(1).double()
    return Cost(x.shape[0], each, chosen, each * experts * x.shape[1:-1].numel())


def is_router(module: nn.Module) -> bool:
    """True if a module multiplies its input by a matrix of its own, as transformers' routers do."""
    weight = module._parameters.get("weight")
    is_known = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__module__.startswith(
        ("torch.", "dynops.")
    )
    return (
        weight is not None
        and weight.dim() == 2
        and not is_known
        and bool(_ROUTER.search(type(module).__name__))
    )


def called_router(module: nn.Module, args: tuple, kwargs: dict, out) -> Cost | None:
    x, _ = _choices(args, kwargs)
    if x.shape[-1:] != module.weight.shape[-1:]:  # what it does with its matrix nobody can tell
        return None
    rows = x.shape[0] if x.dim() > 1 else 1
    return Cost(rows, float(x.shape[1:-1].numel() * module.weight.numel()))
