"""convert_ and revert_: a model's convolutions become sparse in place, its residual blocks run on packed rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from . import context
from .nn import (
    MaskedAvgPool2d,
    MaskedBatchNorm2d,
    MaskedGroupNorm,
    MaskedInstanceNorm2d,
    MaskedMaxPool2d,
    MaskedPixelShuffle,
    MaskedUpsample,
    MaskedZeroPad2d,
    SparseConv2d,
    SparseConvTranspose2d,
)
from .stack.program import Program
from .stack.trace import Trace, Untraceable, trace

_SPARSE = {
    nn.Conv2d: SparseConv2d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
    nn.BatchNorm2d: MaskedBatchNorm2d,
    nn.MaxPool2d: MaskedMaxPool2d,
    nn.AvgPool2d: MaskedAvgPool2d,
    nn.GroupNorm: MaskedGroupNorm,
    nn.InstanceNorm2d: MaskedInstanceNorm2d,
    nn.Upsample: MaskedUpsample,
    nn.PixelShuffle: MaskedPixelShuffle,
    nn.ZeroPad2d: MaskedZeroPad2d,
}
_DENSE = {sparse: dense for dense, sparse in _SPARSE.items()}
_KINDS = {
    SparseConv2d: "conv",
    SparseConvTranspose2d: "conv",
    MaskedBatchNorm2d: "norm",
    MaskedMaxPool2d: "pool",
    MaskedAvgPool2d: "pool",
    MaskedGroupNorm: "layer",
    MaskedInstanceNorm2d: "layer",
    MaskedUpsample: "layer",
    MaskedPixelShuffle: "layer",
    MaskedZeroPad2d: "layer",
}
_RELATIVES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.GroupNorm,
    nn.Upsample,
    nn.PixelShuffle,
    nn.ZeroPad2d,
)
_CONVERTED, _TRACE, _PROGRAM = "_dynops_converted", "_dynops_trace", "_dynops_program"


@dataclass
class Report:
    """What :func:`convert_` did, by module name ("" is the model itself).

    Attributes:
        replaced: each converted layer and its new class.
        skipped: each convolution, norm and pool that stayed dense, and why.
        fused: each outermost module that runs on packed rows, and in how many steps.
        unfused: each module that holds converted convolutions but could not be traced, and why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title in ("replaced", "fused", "unfused", "skipped"):
            entries = getattr(self, title)
            lines.append(f"{title}: {len(entries)}")
            lines += [f"  {name or '(the model)'}: {what}" for name, what in entries.items()]
        return "\n".join(lines)


def convert_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Makes a model's convolutions sparse, in place; ``with dynops.active(mask):`` gives them their mask.

    Every parameter, buffer, ``state_dict`` key and hook stays where it is: only classes change
    (``nn.Conv2d`` to ``SparseConv2d``, likewise ConvTranspose2d, BatchNorm2d, MaxPool2d, AvgPool2d;
    exact types only). Outside the context the model is the dense one, bit for bit.

    Inside the context every converted layer's output exists at the active pixels of its own
    resolution and is zero elsewhere, after every layer: convolutions read what the layer before
    them left (the model's input is read whole), norms and pools are masked too, and in training mode
    norms take their statistics from active pixels only (:class:`dynops.nn.MaskedBatchNorm2d`).
    Layers that were not converted run dense on those maps.

    A module whose forward torch.fx can trace runs as a whole: convolution, norm, residual sum and
    activation are one call on packed rows, and dense maps are made only for layers that need them.
    This changes the speed and not the result, but for one thing: where a traced module adds a tensor
    that is not masked (its own input, say) to a masked one, the sum is masked too. The trace is
    taken once: after changing what a forward does, revert and convert again. Where a hook is set on
    an inner module, or one is replaced, the module around it runs layer by layer.

    Args:
        model: any module; a convolution itself too.
        filter_fn: called as ``filter_fn(module, name)`` for each convolution, norm and pool that
            could be converted; False leaves it dense.

    Returns:
        A :class:`Report`; ``print`` shows it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        _convert_layer(name, module, filter_fn, report)
    kinds = {m: _KINDS[type(m)] for m in model.modules() if _CONVERTED in m.__dict__ and type(m) in _KINDS}
    traces = {}
    for name, module in model.named_modules():
        if module not in kinds and _TRACE not in module.__dict__ and _holds_conv(module, kinds):
            try:
                traces[name, module] = trace(module, kinds)
            except Untraceable as reason:
                report.unfused[name] = str(reason)
    for (name, module), steps in traces.items():
        if not any(_is_inside(name, outer) for outer in report.fused):
            report.fused[name] = _summary(steps)
        module.__dict__[_TRACE] = steps
        module.__dict__[_PROGRAM] = Program(steps, module)
        module.__class__ = _fused_class(type(module))
    return report


def revert_(model: nn.Module) -> None:
    """Undoes :func:`convert_`: every module gets back the class that it had."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if module.__dict__.pop(_CONVERTED, False):
            module.__class__ = _DENSE[type(module)]
        if module.__dict__.pop(_TRACE, None) is not None:
            module.__dict__.pop(_PROGRAM, None)
            module.__class__ = type(module)._dynops_base


def _convert_layer(name: str, module: nn.Module, filter_fn, report: Report) -> None:
    kind = type(module)
    if not isinstance(module, _RELATIVES):
        return
    reason = None
    if kind in _DENSE:
        reason = "already sparse"
    elif kind not in _SPARSE:
        reason = f"{kind.__name__} is not exactly one of {', '.join(k.__name__ for k in _SPARSE)}"
    elif getattr(module, "return_indices", False):
        reason = "it returns indices"
    elif getattr(module, "track_running_stats", False) and kind is nn.InstanceNorm2d:
        reason = "it has running statistics"
    elif filter_fn is not None and not filter_fn(module, name):
        reason = "filter_fn"
    if reason:
        report.skipped[name] = reason
        return
    module.__class__ = _SPARSE[kind]
    module.__dict__[_CONVERTED] = True
    report.replaced[name] = _SPARSE[kind].__name__


def _holds_conv(module: nn.Module, kinds: dict[nn.Module, str]) -> bool:
    return any(kinds.get(m) == "conv" for m in module.modules())


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _summary(steps: Trace) -> str:
    convs = sum(step.kind == "conv" for step in steps.steps)
    dense = sum(step.kind in ("module", "function", "method", "pool") for step in steps.steps)
    return f"{convs} convolutions on packed rows, {len(steps.steps) - convs - dense} other steps, {dense} dense calls"


# ---------------------------------------------------------------------------- fused modules


@functools.cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``base`` whose forward runs the module's program inside the context."""

    def forward(self, *args, **kwargs):
        active = context.current()
        if active is not None and _TRACE in self.__dict__:  # a slice of a converted nn.Sequential has none
            x = _only_tensor(self, args, kwargs)
            if x is not None:
                program = self.__dict__[_PROGRAM]
                if program.module is not self:  # a shallow copy of the module that was converted
                    program = self.__dict__[_PROGRAM] = Program(self.__dict__[_TRACE], self)
                if program.holds():
                    return program.run(x, active)
        return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, _, *state = base.__reduce_ex__(self, protocol)
        return _new, (base,), *state

    def __setstate__(self, state):
        base.__setstate__(self, state)
        self.__dict__[_PROGRAM] = Program(self.__dict__[_TRACE], self)

    members = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_dynops_base": base,
    }
    return type(f"Sparse{base.__name__}", (base,), members)


def _only_tensor(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The input of a call with one (batched) tensor and nothing else, or None."""
    if len(args) == 1 and not kwargs:
        x = args[0]
    elif not args and len(kwargs) == 1:
        x = kwargs.get(module.__dict__[_TRACE].input_name)
    else:
        return None
    return x if isinstance(x, Tensor) and x.dim() != 3 else None  # [C, H, W] goes layer by layer


def _new(base: type[nn.Module]) -> nn.Module:
    """An empty module of the fused class, for pickle and deepcopy to fill."""
    cls = _fused_class(base)
    return cls.__new__(cls)
