"""Modules of libraries that are known by the names of their classes. What they compute is tried before it is believed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.epilogue import ACTIVATIONS
from ..activations import fused_name
from ..staleness import own_class


def norms_channels(inner: nn.Module | None) -> bool:
    """True for a LayerNorm over channels, a GlobalResponseNorm of timm and a GroupNormAct of timm, by their names.

    Of LayerNorms: torch's and timm's over the last dimension; the libraries' LayerNorm2d of ``[N, C, H, W]``.
    """
    name = type(inner).__name__
    if isinstance(inner, nn.GroupNorm) and own_class(type(inner)).__name__ == "GroupNormAct":
        drop, act = (getattr(inner, part, None) for part in ("drop", "act"))
        return type(drop) is nn.Identity and (type(act) is nn.Identity or fused_name(act) != "")
    if name == "GlobalResponseNorm":
        return (
            {"weight", "bias"} == inner._parameters.keys()
            and hasattr(inner, "channel_dim")
            and hasattr(inner, "eps")
        )
    return isinstance(inner, nn.LayerNorm) and name in ("LayerNorm", "LayerNorm2d")


def norms_last(inner: nn.Module) -> bool:
    """True for a LayerNorm or GlobalResponseNorm of maps ``[N, H, W, C]``."""
    return type(inner).__name__ == "LayerNorm" or getattr(inner, "channel_dim", 1) == -1


def is_standardised(inner: nn.Module | None) -> bool:
    """True for a converted subclass of nn.Conv2d, which may make its weight of its parameters."""
    return isinstance(inner, nn.Conv2d) and "_dynops_base" in vars(type(inner))


def permutes(inner: nn.Module | None) -> bool:
    """True for torchvision's module of a permute."""
    return type(inner).__name__ == "Permute" and hasattr(inner, "dims")


def computes_its_name(inner: nn.Module) -> bool:
    """True if the forward of a module of :func:`norms_channels` makes what its name says of a map and of its parameters.

    Runs it on a copy of the module with other parameters: those of a new module, ones and zeros, hide a difference.
    """
    if type(inner) is nn.LayerNorm:
        return True
    last, present = norms_last(inner), {k: p for k, p in inner._parameters.items() if p is not None}
    channels = _channels(inner)
    if channels is None or any(p.numel() != channels for p in present.values()):
        return False
    x = torch.arange(12.0 * channels, device="cpu").sin().view(2, channels, 2, 3)
    vectors = {k: torch.arange(channels, device="cpu").add(1.0 + i).cos() for i, k in enumerate(present)}
    copied = object.__new__(type(inner))
    copied.__dict__.update(vars(inner))
    parameters = {k: None if p is None else vectors[k].view(p.shape) for k, p in inner._parameters.items()}
    copied.__dict__["_parameters"] = parameters
    try:
        made = own_class(type(inner)).forward(copied, x.permute(0, 2, 3, 1) if last else x)
    except (AttributeError, RuntimeError, TypeError):  # another module of this name
        return False
    expected = _computed(inner, x, vectors.get("weight"), vectors.get("bias"))
    return torch.allclose(made.permute(0, 3, 1, 2) if last else made, expected, 1e-4, 1e-4)


def _channels(inner: nn.Module) -> int | None:
    if isinstance(inner, nn.GroupNorm):
        return inner.num_channels
    if isinstance(inner, nn.LayerNorm):
        return inner.normalized_shape[0] if len(inner.normalized_shape) == 1 else None
    return inner._parameters["weight"].numel()


def _computed(inner: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What the name says, of a map ``[N, C, H, W]``."""
    if isinstance(inner, nn.GroupNorm):
        return ACTIVATIONS[fused_name(inner.act)](F.group_norm(x, inner.num_groups, weight, bias, inner.eps))
    if isinstance(inner, nn.LayerNorm):
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, x.shape[1:2], weight, bias, inner.eps).permute(0, 3, 1, 2)
    size = x.norm(p=2, dim=(2, 3), keepdim=True)
    share = size / (size.mean(1, keepdim=True) + inner.eps)
    return x + torch.addcmul(bias.view(-1, 1, 1), weight.view(-1, 1, 1), x * share)
