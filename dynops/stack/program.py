"""A traced module under ``with dynops.active(mask):``."""

from __future__ import annotations

from torch import Tensor, nn

from ..context import active
from .graph import stack_of
from .policy import Masked
from .run_rows import run_rows
from .trace import Trace

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NOT_CALLED = (
    "conv",
    "norm",
    "pool",
    "layer",
    "act",
    "dropout",
)  # kinds of steps whose modules no call reaches


class Program:
    """A trace bound to one module. In a copy (deepcopy, pickle) it is None, until the copy binds its own."""

    def __init__(self, trace: Trace, module: nn.Module):
        self.module, self.stack = module, stack_of(trace, module)
        self.links, self.hooks = _watch(trace, module)

    def __reduce__(self):
        return _unbound, ()

    def holds(self) -> bool:
        """True where the modules are those that were traced, and have no hooks."""
        for modules, name, module in self.links:
            if modules.get(name) is not module:
                return False
        return not any(self.hooks)

    def run(self, x: Tensor, active: active) -> Tensor:
        """``module.forward(x)`` under the mask of ``active``."""
        return run_rows(self.stack, x, Masked(active))


def _unbound() -> None:
    return None


def _watch(trace: Trace, module: nn.Module) -> tuple[tuple, tuple]:
    """The places of the modules that the steps stand for, and the hooks of those that are not called."""
    links, hooks = {}, []
    for step in trace.steps:
        if step.kind in _NOT_CALLED and step.args != ("function",):
            paths = [step.target] + ([step.norm] if step.norm else [])
        else:
            paths = [step.target.rpartition(".")[0]] if step.kind == "module" else []
        for path in paths:
            parent = module
            for name in path.split(".") if path else ():
                child = parent._modules[name]
                if (id(parent), name) not in links:
                    links[id(parent), name] = (parent._modules, name, child)
                    hooks.extend(getattr(child, kind) for kind in _HOOKS)
                parent = child
    return tuple(links.values()), tuple(hooks)
