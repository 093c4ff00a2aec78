"""A traced module under ``with dynops.use_mask(mask):``."""

from __future__ import annotations

from torch import Tensor, nn

from ..context import use_mask
from .graph import stack_of
from .maps import SparseMap, entered, inside, is_map, may_follow
from .policy import Masked
from .run_rows import run_rows
from .staleness import Watch
from .trace import Trace


class Program:
    """A trace bound to one module. In a copy (deepcopy, pickle) it is None, until the copy binds its own."""

    def __init__(self, trace: Trace, module: nn.Module):
        self.module, self.watch = module, Watch(module, trace)
        self.stack = stack_of(trace, module) if self.watch.valid else None

    def __reduce__(self):
        return _unbound, ()

    def holds(self) -> bool:
        """True where the stack is still what the module does."""
        return self.watch.holds()

    def run(self, inputs: tuple[Tensor, ...], active: use_mask, dense=()):
        """``module.forward(*inputs)`` under the mask of ``active``: maps inside of a module that runs on maps, else dense.

        Args:
            dense: modules that stay dense.
        """
        if not may_follow():
            return run_rows(self.stack, inputs, Masked(active))
        as_map = inside()
        inputs = [x.under(active) if type(x) is SparseMap else x for x in inputs]
        if not as_map:
            inputs[1:] = [SparseMap.of_input(x, active) if is_map(x) else x for x in inputs[1:]]
        with entered(dense):
            return run_rows(self.stack, inputs, Masked(active), maps=True, as_map=as_map)


def _unbound() -> None:
    return None
