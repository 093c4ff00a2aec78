"""A model and its stream, edit after edit, in turns with the dense model."""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dynops

from ..harness.contenders import FORMATS
from ..harness.setting import Budget
from ..harness.timing import all_times, interleaved
from .cases import EVERYTHING, NOTHING, Case, Variant
from .edits import Edits
from .trial import Trial, psnr, relative_error

CPU = torch.device("cpu")
WARM = 5  # calls of ours before those that are timed: the stream measures its choices in them
_FLUSH_BYTES = (
    32 << 20
)  # written before each timed call: past the caches, as a program that does other things does
_LONG_MS = 2000
DENSE, OURS, COMPILED = "dense", "ours", "compiled"


class Dense:
    """The dense model in one memory format."""

    def __init__(self, case: Case, model: nn.Module, memory_format: torch.memory_format):
        self.case, self.model, self.format = case, model, memory_format

    def on(self, image: Tensor) -> Tensor:
        return self.case.call(self.model, image.contiguous(memory_format=self.format))


class Session:
    """A stream over a model. Every call has an image of its own, which is made before the clock starts."""

    def __init__(self, case: Case, model: nn.Module, options: dict, image: Tensor):
        self.case, self.model, self.image, self.options = case, model, image, options
        self.generator = torch.Generator().manual_seed(1)
        self.told = None  # the mask of what changed, where the stream is told
        self.stream = dynops.Stream(**options)
        self.output = self()
        self._spoiled = torch.empty(_FLUSH_BYTES // 4)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        with self.stream if self.told is None else self.stream.changed(self.told):
            self.output = self.case.call(self.model, self.image)
        self._used = True
        return self.output

    def begin(self, edits: Edits, dense: Dense, told: bool) -> None:
        """From here on images are those of ``edits``, and ``dense`` takes turns. ``told``: nothing is compared."""
        self._edits, self._dense, self._seen, self._told = edits, dense, None, told
        self.theories: list[float] = []
        self.errors: list[tuple[float, float]] = []  # relative, and the PSNR

    def run_dense(self) -> Tensor:
        self._seen = self.image, self._dense.on(self.image)
        return self._seen[1]

    def prepare(self) -> None:
        """Before every timed call: what the last call of ours did is noted, and the next image is made."""
        if self._used:
            self.note()
            self.image, self._used = self._edits.next(), False
            self.told = self._edits.mask() if self._told else None
        self._spoiled.fill_(1.0)

    def note(self) -> None:
        """The theory of the last call, and its error where the dense model had the same image."""
        if not self._used:
            return
        self.theories.append(self.stream.report().theory)
        if self._seen is not None and self._seen[0] is self.image:
            expected = self._seen[1]
            self.errors.append((relative_error(self.output, expected), psnr(self.output, expected)))


def measure(case: Case, budget: Budget, compiles: bool = False) -> Iterator[Trial]:
    """The rows of a case, one after the other. ``compiles``: the dense model is compiled too (minutes)."""
    torch.manual_seed(0)
    first = case.first().contiguous(memory_format=torch.channels_last)
    model = case.make().eval().requires_grad_(False)
    versions = {name: Dense(case, _in_format(model, layout), layout) for name, layout in FORMATS.items()}
    ours = shared(versions["channels_last"].model)
    dynops.incremental_(ours)
    best = _best(versions, first)
    compiled = _compiled(case, versions["channels_last"].model) if compiles else None
    session, last = None, None
    for variant in case.variants:
        if session is None or session.options != variant.options:
            session = None  # frees what it kept
            gc.collect()
            session = Session(case, ours, variant.options, first)
        name = "channels_last" if variant.edit == EVERYTHING else best
        trial = _trial(case, variant, session, versions[name], compiled, budget)
        trial.dense_name = f"{name} eager"
        if not trial.dense_ms and last:
            trial.dense_ms, trial.compiled_ms = last.dense_ms, last.compiled_ms
        yield trial
        last = trial


@torch.inference_mode()
def _trial(
    case: Case, variant: Variant, session: Session, dense: Dense, compiled: Callable | None, budget: Budget
) -> Trial:
    """A row, without the name of the dense version."""
    edits = Edits(session.image, variant.edit, variant.share, session.generator)
    session.begin(edits, dense, variant.told)
    for i in range(2 if variant.edit == EVERYTHING else WARM):
        session.prepare()
        session()
        if i == 0:
            session.run_dense()
    calls = {DENSE: session.run_dense, OURS: session}
    if variant.edit == NOTHING:  # its time is so short that the dense one of the row before will do
        del calls[DENSE]
    elif compiled is not None:
        calls[COMPILED] = lambda: compiled(session.image)
    session.prepare()
    session.theories.clear()
    times = all_times(calls, CPU, budget, session.prepare)
    session.note()
    medians = {key: statistics.median(values) for key, values in times.items()}
    return Trial(
        case.title,
        variant.edit,
        edits.share,
        variant.told,
        **variant.options | {"spread": str(variant.options["spread"])},
        dense_ms=medians.get(DENSE, 0.0),
        compiled_ms=medians.get(COMPILED, 0.0),
        ours_ms=medians[OURS],
        theory=math.inf if variant.edit == NOTHING else statistics.median_low(session.theories),
        error=session.errors[0][0],
        last_error=session.errors[-1][0],
        psnr=session.errors[0][1],
        kept_mb=session.stream.bytes / 2**20,
    )


def shared(model: nn.Module) -> nn.Module:
    """A copy of the model with the same parameters: those of the largest take 3.4 GB."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _in_format(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=layout) if layout == torch.channels_last else model


@torch.inference_mode()
def _best(versions: dict[str, Dense], image: Tensor) -> str:
    """The faster memory format of the dense model."""
    calls = {name: (lambda own=dense: own.on(image)) for name, dense in versions.items()}
    times = {}
    for _ in range(2):  # the first calls also allocate memory, which decides nothing where they take seconds
        if not times or min(times.values()) < _LONG_MS:
            times = interleaved(calls, CPU, Budget(0.5, 1, 5, warmup=0, calls=1), flush=lambda: None)
    return min(times, key=times.get)


def _compiled(case: Case, model: nn.Module) -> Callable:
    torch._dynamo.reset()
    return torch.compile(lambda image: case.call(model, image), dynamic=False)
