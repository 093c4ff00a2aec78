"""convert_ and revert_: a model's convolutions become sparse in place, its residual blocks run on packed rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import incremental
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
from .nn.pixels.masked import MaskedSyncBatchNorm
from .stack import converted
from .stack.activations import is_norm_act
from .stack.trace import Trace, Untraceable, trace
from .stack.tracing import outputs

# The dense layers, what each becomes, and the kind of its step in a trace.
_LAYERS = (
    (nn.Conv2d, SparseConv2d, "conv"),
    (nn.ConvTranspose2d, SparseConvTranspose2d, "conv"),
    (nn.BatchNorm2d, MaskedBatchNorm2d, "norm"),
    (nn.SyncBatchNorm, MaskedSyncBatchNorm, "norm"),
    (nn.MaxPool2d, MaskedMaxPool2d, "pool"),
    (nn.AvgPool2d, MaskedAvgPool2d, "pool"),
    (nn.GroupNorm, MaskedGroupNorm, "layer"),
    (nn.InstanceNorm2d, MaskedInstanceNorm2d, "layer"),
    (nn.Upsample, MaskedUpsample, "layer"),
    (nn.PixelShuffle, MaskedPixelShuffle, "layer"),
    (nn.ZeroPad2d, MaskedZeroPad2d, "layer"),
)
_SPARSE = {dense: sparse for dense, sparse, _ in _LAYERS}
_DENSE = {sparse: dense for dense, sparse, _ in _LAYERS}
_KINDS = {sparse: kind for _, sparse, kind in _LAYERS}
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
# run dense; what they make is masked
_DENSE_POOLS_AND_NORMS = (
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
    nn.MaxUnpool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_NOT_ON_MAPS = (
    *(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm3d, nn.MaxPool1d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool3d),
)
_MASKABLE = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.ZeroPad2d,
)
_ELSEWHERE = "it does not work on [N, C, H, W]"
_MASKED_AFTER = "it has no sparse form: it runs dense, and what it makes is masked"
_CHOSEN = ("already sparse", "filter_fn", _ELSEWHERE, _MASKED_AFTER)  # reasons that need no warning
_CONVERTED = "_dynops_converted"


@dataclass
class Report:
    """A record of what :func:`convert_` did, by module name ("" is the model itself).

    Attributes:
        replaced: each converted layer and its new class.
        skipped: each convolution, norm and pool that stayed dense, and why.
        fused: each outermost module that runs as a whole, and its convolutions, other steps (norms, pools, activations and
            sums that joined no convolution) and calls of functions and modules. Calls run on rows too, if they can.
        unfused: each module that holds converted convolutions but runs its own forward, and why. Under a mask
            ``torch.compile`` leaves its graph there, and ``torch.export`` takes it with ``strict=False`` only.
        sparse_share: converted convolutions' share of all convolutions' weights. It is no share of the
            multiply-accumulates: these depend on the sizes of maps, and ``convert_`` has no input.
            :class:`dynops.budget.MacCounter` counts them for an input.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    sparse_share: float = 0.0

    def __str__(self) -> str:
        """The share, ``replaced`` as the number of layers of each class, and every entry of the others."""
        lines = [
            f"sparse: {self.sparse_share:.0%} of the convolutions' weights",
            f"replaced: {len(self.replaced)}",
        ]
        lines += [f"  {count} {kind}" for kind, count in Counter(self.replaced.values()).items()]
        for title in ("fused", "unfused", "skipped"):
            entries = getattr(self, title)
            lines.append(f"{title}: {len(entries)}")
            lines += [f"  {name or '(the model)'}: {what}" for name, what in entries.items()]
        return "\n".join(lines)


def convert_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Makes a model's convolutions sparse, in place; ``with dynops.use_mask(mask):`` gives them their mask.

    Every parameter, buffer, ``state_dict`` key and hook stays where it is. Only classes change: ``nn.Conv2d`` to
    ``SparseConv2d``, likewise ConvTranspose2d, BatchNorm2d, SyncBatchNorm, GroupNorm, MaxPool2d, AvgPool2d, Upsample,
    PixelShuffle, ZeroPad2d and InstanceNorm2d without running statistics. Subclasses and parametrisations of these
    change too, and any FrozenBatchNorm2d. Outside the context the model is the dense one, bit for bit.

    Inside the context a map exists at the active pixels of its own resolution and is zero elsewhere, after every layer
    and every function. A sum, product, cat or activation of a map is masked too, even if the function of zero is not
    zero. The model's input, and functions of it alone, are read whole; other maps are zero where no pixel is active. A mean
    over all pixels, as squeeze-excite and classifiers take it, is over the mask. Norms take their statistics from active
    pixels only (:class:`dynops.nn.MaskedBatchNorm2d` in training mode, :class:`dynops.nn.MaskedGroupNorm` in both).
    Attention and other functions that mix pixels have the dense result, on maps that are zero outside the mask.

    A module runs as a whole if torch.fx can trace its forward: convolution, norm, residual sum and activation are one
    call on packed rows. Any other module runs its own forward, on tensors that hold rows, and the report has the reason.
    Reasons are ``no_grad``, ``autocast`` or checkpointing inside a forward, random numbers, attributes or lists that it
    writes, control flow that depends on data. A forward set on an instance, hooks and parametrisations are reasons too.
    A traced module runs its own forward after a change: an inner module was replaced or hooked, or an attribute
    changed that a forward read. Both ways have the same result. A new layer in the place of a converted one is
    converted at the next masked call.

    ``torch.compile`` leaves its graph at a forward without a trace. With ``fullgraph=True``, and in ``torch.export`` with
    ``strict=True``, that is an error. Such a forward calls functions itself. Under transforms of ``torch.func``, and in
    the graph of a module that was changed since, these run on dense tensors: there a sum of a map and a tensor without a
    mask is not masked.

    Args:
        model: any module; a convolution itself too.
        filter_fn: called as ``filter_fn(module, name)`` for each convolution, norm and pool that
            could be converted; False leaves it dense.

    Returns:
        A :class:`Report`; ``print`` shows it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is incremental (:func:`dynops.incremental_`), or has no convolution, norm or pool of maps, nor a
            parameter that one of its own could convolve with.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if any(map(incremental.is_incremental, model.modules())):
        raise ValueError("model: expected one without incremental_; dynops.revert_(model) undoes it")
    _check_works_on_maps(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function (module, name) -> bool, got {filter_fn!r}")
    report = Report()
    for name, module in model.named_modules():
        _convert_layer(name, module, filter_fn, report)
    kinds = {m: kind for m in model.modules() if _CONVERTED in m.__dict__ and (kind := _kind_of(m))}
    traces: dict[nn.Module, Trace | None] = {}
    untraceable: set[nn.Module] = set()
    untraced: list[nn.Module] = []
    for name, module in reversed(list(model.named_modules())):  # what is inside first
        if isinstance(module, torch.jit.ScriptModule):
            continue
        is_list = type(module).forward is nn.Module.forward  # as a ModuleList, which is never called
        if module in kinds or is_list or converted.is_whole(module) or not _holds_conv(module, kinds):
            continue
        try:
            traces[module] = trace(module, kinds, known=untraceable)
        except Untraceable as reason:
            report.unfused[name] = str(reason)
            untraced.append(module)
            if reason.of_forward:
                untraceable.add(module)
    for name, module in model.named_modules():
        if module not in traces:
            continue
        for path in traces[module].called:
            report.unfused.setdefault(f"{name}.{path}".lstrip("."), "it has hooks, or a forward of its own")
        if not any(_is_inside(name, outer) for outer in report.fused):
            report.fused[name] = _summary(traces[module])
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.unfused = dict(sorted(report.unfused.items(), key=lambda entry: order.get(entry[0], len(order))))
    if model not in kinds and _CONVERTED not in model.__dict__ and not converted.is_whole(model):
        untraced.append(model)
    for module in untraced:  # these run their own forward on maps
        traces.setdefault(module, None)
    dense = [model.get_submodule(name) for name, reason in report.skipped.items() if reason == "filter_fn"]
    converted.make_whole(model, traces, _converts, _notice(report), dense)
    report.sparse_share = _share(model)
    return report


def revert_(model: nn.Module) -> None:
    """Undoes :func:`convert_` and :func:`dynops.incremental_`: every module gets back the class that it had."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if module.__dict__.pop(_CONVERTED, False):
            sparse = next(
                kind for kind in type(module).__mro__ if kind in _DENSE or "_dynops_base" in vars(kind)
            )
            dense = _DENSE.get(sparse) or vars(sparse)["_dynops_base"]
            module.__class__ = converted.rebased(type(module), sparse, dense)
        converted.unmake_whole(module)
        incremental.undo(module)


def _check_works_on_maps(model: nn.Module) -> None:
    of_maps = any(isinstance(m, _MASKABLE) or _is_frozen_norm(m) for m in model.modules())
    if of_maps or any(is_lazy(p) or p.dim() == 4 for p in model.parameters()):
        return
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _NOT_ON_MAPS)})
    found = f" ({', '.join(others)} inside do not work on them)" if others else ""
    raise ValueError(
        f"model: expected a module with a convolution of maps [N, C, H, W], got {type(model).__name__} without one"
        f"{found}: pass the part of the network that convolves"
    )


def _convert_layer(name: str, module: nn.Module, filter_fn, report: Report) -> None:
    if isinstance(module, _DENSE_POOLS_AND_NORMS):
        if getattr(module, "output_size", None) not in (1, (1, 1), [1, 1]):
            report.skipped[name] = _MASKED_AFTER
        return
    if not isinstance(module, _RELATIVES) and not _is_frozen_norm(module):
        return
    kind = type(module)
    own = kind.__bases__[0] if parametrize.is_parametrized(module) else kind
    reason = None
    if own in _DENSE or _CONVERTED in module.__dict__:
        reason = "already sparse"
    elif isinstance(module, _NOT_ON_MAPS):
        reason = _ELSEWHERE
    elif getattr(module, "return_indices", False):
        reason = "it returns indices"
    elif getattr(module, "track_running_stats", False) and kind is nn.InstanceNorm2d:
        reason = "it has running statistics"
    elif filter_fn is not None and not filter_fn(module, name):
        reason = "filter_fn"
    elif own not in _SPARSE and not _is_maskable(module):
        reason = f"{kind.__name__} is not exactly one of {', '.join(k.__name__ for k in _SPARSE)}"
    if reason:
        report.skipped[name] = reason
        return
    sparse = _SPARSE[own] if own in _SPARSE else converted.masked_class(own)
    module.__class__ = converted.rebased(kind, own, sparse)
    module.__dict__[_CONVERTED] = True
    report.replaced[name] = type(module).__name__


def _is_maskable(module: nn.Module) -> bool:
    """True for a layer that is not torch's own and whose output can be masked."""
    of_others = not type(module).__module__.startswith("dynops.") and not isinstance(module, LazyModuleMixin)
    return _is_frozen_norm(module) or (of_others and isinstance(module, _MASKABLE))


def _kind_of(module: nn.Module) -> str | None:
    """The kind of a converted layer's step in a trace; None for one that is called."""
    if kind := _KINDS.get(type(module)):
        return kind
    if is_norm_act(module):
        return "norm"
    return "call" if isinstance(module, nn.Conv2d) else None  # a subclass, by its own forward


def _converts(module: nn.Module) -> str | None:
    """Converts a layer that took the place of a converted one; the reason, if it stays dense."""
    report = Report()
    _convert_layer("", module, None, report)
    return _notice(report).get("")


def _is_frozen_norm(module: nn.Module) -> bool:
    """True for one of the many FrozenBatchNorm2d: torchvision's, detectron2's, DETR's."""
    named = any(kind.__name__ == "FrozenBatchNorm2d" for kind in type(module).__mro__)
    return named and {"running_mean", "running_var"} <= module._buffers.keys()


def _notice(report: Report) -> dict[str, str]:
    """The layers that stayed dense though nobody asked for it, with the reasons."""
    return {name: reason for name, reason in report.skipped.items() if reason not in _CHOSEN}


def _share(model: nn.Module) -> float:
    """The share of the convolutions' weights that is converted."""
    convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    made = tuple(_DENSE)
    sizes = [
        (0 if is_lazy(w := m.weight) else w.numel(), isinstance(m, made) or _CONVERTED in vars(m))
        for m in convs
    ]
    whole = sum(size for size, _ in sizes)
    return sum(size for size, sparse in sizes if sparse) / whole if whole else 0.0


def _holds_conv(module: nn.Module, kinds: dict[nn.Module, str]) -> bool:
    return any(kinds.get(m) in ("conv", "call") for m in module.modules())


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _summary(steps: Trace) -> str:
    kinds = [step.kind for step in steps.steps if step.target != outputs.NAME]
    convs, calls = kinds.count("conv"), sum(kind in ("module", "function", "method") for kind in kinds)
    counts = (convs, "convolution"), (len(kinds) - convs - calls, "other step"), (calls, "call")
    text = ", ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts if count)
    return f"{text}, in eval mode" if steps.only_eval else text
