"""One model under a mask: values against the meaning of the mask, how it ran, and the speed-up."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dynops
from dynops.testing import MaskedPolicy

from ..harness.setting import Budget
from ..harness.timing import all_times
from . import zoo
from .macs import CountedPolicy
from .rows_read import RowsRead

_ERROR = 1e-5  # relative L2; above it float64 decides
_FORMATS = (torch.contiguous_format, torch.channels_last)


@dataclass
class Trial:
    """A row of the table; errors are relative L2 norms over all outputs.

    Attributes:
        convs: calls of a convolution in a forward. from_rows: the share that read packed rows.
        dense_ms, ours_ms, full_ms: medians of the faster memory format each; full_ms: ours with a full mask.
        compiled_ms: of the dense model by ``torch.compile``; 0: not measured.
        error: against the meaning of the mask in plain PyTorch, on the dense model.
        full_error: with a full mask, against the dense model.
        hooked_error: with a hook on each module, so that all run layer by layer, against without.
        outside: without a mask the result is the dense one bit for bit.
        fault: why it failed; "" if it did not.
    """

    model: str
    batch: int
    convs: int = 0
    from_rows: float = 0.0
    theory: float = 0.0
    dense_ms: float = 0.0
    ours_ms: float = 0.0
    full_ms: float = 0.0
    compiled_ms: float = 0.0
    error: float = 0.0
    full_error: float = 0.0
    hooked_error: float = 0.0
    outside: bool = False
    fault: str = ""

    @property
    def speedup(self) -> float:
        """Over the fastest dense version that was measured."""
        return min(self.dense_ms, self.compiled_ms or math.inf) / self.ours_ms if self.ours_ms else 0.0

    @property
    def full(self) -> float:
        """The time with a full mask, as a share of the dense time."""
        return self.full_ms / self.dense_ms if self.dense_ms else 0.0

    @property
    def realised(self) -> float:
        return self.speedup / self.theory if self.theory else 0.0

    def record(self) -> dict:
        """The row as plain data."""
        return asdict(self) | {"speedup": self.speedup, "realised": self.realised, "full": self.full}


COLUMNS = [field.name for field in fields(Trial)] + ["speedup", "realised", "full"]


def run(entry: zoo.Entry, batch: int, seconds: float, compiles: bool = False) -> Trial:
    """The trial of a model; ``seconds`` is the time for its timing. ``compiles``: the dense model is compiled too."""
    trial = Trial(entry.name, batch)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _run(trial, entry, batch, seconds, compiles)
    except Exception as error:  # a model may raise anything, and the others go on
        trial.fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return trial


def _run(trial: Trial, entry: zoo.Entry, batch: int, seconds: float, compiles: bool) -> None:
    torch.manual_seed(0)
    model, inputs = _randomised(entry.make().eval()), entry.inputs(batch)
    mask = _mask(entry, batch)
    expected = model(*inputs)
    converted = copy.deepcopy(model)
    dynops.convert_(converted)
    trial.outside = _difference(converted(*inputs), expected) == 0
    with dynops.use_mask(torch.ones_like(mask)):
        trial.full_error = _difference(converted(*inputs), expected)
    with dynops.use_mask(mask), RowsRead() as read:
        converted(*inputs)
    with dynops.use_mask(mask) as active:
        ours = converted(*inputs)
    masks = None if entry.padded else active.masks()
    with CountedPolicy(mask, masks) as policy:
        meant = model(*inputs)
    trial.convs, trial.theory = policy.calls, policy.dense / policy.computed
    trial.from_rows, trial.error = read.share, _difference(ours, meant)
    times = _times(model, converted, inputs, mask, seconds, compiles)
    trial.dense_ms, trial.ours_ms, trial.full_ms = times["dense"], times["ours"], times["full"]
    trial.compiled_ms = times.get("compiled", 0.0)
    trial.hooked_error = _difference(_hooked(converted, inputs, mask), ours)
    trial.fault = _fault(trial, model, converted, inputs, mask, masks)


def _mask(entry: zoo.Entry, batch: int) -> Tensor:
    cells = entry.cells**2
    active = cells * zoo.ACTIVE // zoo.CELLS**2
    order = torch.stack([torch.randperm(cells) for _ in range(batch)])
    return (order < active).view(batch, entry.cells, entry.cells)


def _randomised(model: nn.Module) -> nn.Module:
    """The model with norms that do something, and maps that stay well scaled."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def _tensors(out) -> list[Tensor]:
    return [x.detach().double() for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]


def _difference(a, b) -> float:
    """The largest relative L2 norm over the outputs."""
    pairs = list(zip(_tensors(a), _tensors(b), strict=True))
    return max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in pairs)


def _hooked(converted: nn.Module, inputs: tuple, mask: Tensor):
    handles = [m.register_forward_hook(lambda *_: None) for m in converted.modules()]
    with dynops.use_mask(mask):
        out = converted(*inputs)
    for handle in handles:
        handle.remove()
    return out


def _in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The model with its weights ``[O, C, kh, kw]`` in a memory format: ``nn.Module.to`` refuses those of conv3d."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return model


def _times(
    dense: nn.Module, converted: nn.Module, inputs: tuple, mask: Tensor, seconds: float, compiles: bool
) -> dict[str, float]:
    """Medians in ms of the faster memory format each, all taken in turn."""

    def ours(x: tuple, mask: Tensor):
        with dynops.use_mask(mask):
            return converted(*x)

    calls = {}
    for memory_format in _FORMATS:
        x = tuple(t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in inputs)
        own = _in_format(copy.deepcopy(dense), memory_format)
        calls["dense", memory_format] = partial(own, *x)
        calls["ours", memory_format] = partial(ours, x, mask)
        calls["full", memory_format] = partial(ours, x, torch.ones_like(mask))
        if compiles:
            calls["compiled", memory_format] = partial(torch.compile(own), *x)
    times = all_times(calls, inputs[0].device, Budget(seconds, 5, 60, calls=1))
    best: dict[str, float] = {}
    for (who, _), values in times.items():
        best[who] = min(best.get(who, math.inf), statistics.median(values))
    return best


def _fault(
    trial: Trial, model: nn.Module, converted: nn.Module, inputs: tuple, mask: Tensor, masks: dict | None
) -> str:
    """What is wrong with a row, or ""."""
    if not trial.outside:
        return "without a mask it is not the dense model"
    errors = trial.full_error, trial.hooked_error, trial.error
    if any(map(math.isnan, errors)):
        return "its result is NaN"
    if max(errors) < _ERROR:
        return ""
    # a random network may amplify every rounding: then float64 is the judge
    exact_model, exact_inputs = copy.deepcopy(model).double(), tuple(x.double() for x in inputs)
    exact_ours = copy.deepcopy(converted).double()
    with MaskedPolicy(mask, masks):
        exact, single = exact_model(*exact_inputs), model(*inputs)
    with dynops.use_mask(mask):
        ours, ours_single = exact_ours(*exact_inputs), converted(*inputs)
    if _difference(ours, exact) > 1e-7:
        return f"in float64 it differs from the meaning of the mask by {_difference(ours, exact):.1e}"
    # both are samples of an error that the network amplifies 10^5 times
    error, budget = _difference(ours_single, exact), 10 * _difference(single, exact)
    return "" if error <= budget else f"its error is {error:.1e}, of {budget:.1e} allowed"
