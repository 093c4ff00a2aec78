"""Which modules a trace looks into."""

from __future__ import annotations

from torch import nn

from ..activations import ZERO_PRESERVING, activation_type
from .recording import Untraceable

DROPOUTS = (nn.Dropout, nn.Dropout2d)


def leaves_of(module: nn.Module, kinds: dict[nn.Module, str], whole: bool) -> set[str]:
    """The paths of modules that are not looked into."""
    leaves = set()
    for path, m in module.named_modules():
        if whole:
            if "forward" in m.__dict__:
                raise Untraceable("a forward of its own is set on it", path)
            torchs_own = m.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(
                m, nn.Sequential
            )
            leaf = m in kinds or torchs_own
        else:
            holds = any(inner in kinds for inner in m.modules())
            leaf = m in kinds or not (holds or _is_mlp(m) or _is_nothing(m))
        if leaf and path:
            leaves.add(path)
    return leaves


def _is_mlp(module: nn.Module) -> bool:
    """True for Linears with what may stand between them, as timm's Mlp: each runs on rows."""
    between = (nn.Identity, nn.LayerNorm, *DROPOUTS, *ZERO_PRESERVING)
    inner = [*module.children()]
    return (
        not module.__module__.startswith("torch.nn")
        and any(type(m) is nn.Linear for m in inner)
        and all(type(m) is nn.Linear or activation_type(m) in between for m in inner)
    )


def _is_nothing(module: nn.Module) -> bool:
    """True for a module that holds nn.Identity alone, as segmentation networks have where no attention was asked for."""
    inner = [m for m in module.modules() if not m._modules]
    return module not in inner and all(type(m) is nn.Identity for m in inner)


def outside_of(module: nn.Module, leaves: set[str]) -> list[str]:
    """The paths of the modules that are neither leaves nor inside of one."""
    inside = tuple(path + "." for path in leaves)
    paths = (path for path, _ in module.named_modules())
    return [path for path in paths if path not in leaves and not path.startswith(inside)]
