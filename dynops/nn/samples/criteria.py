"""Criteria: which samples leave at an exit, and how sure their predictions are.

A criterion is a :class:`Criterion`, or any callable ``(logits, exit, state) -> bool [n]`` (or a
:class:`Verdict`): ``logits`` ``[n, ...]`` of the n samples that are still there, the number of the exit from
0, and the state that its head saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...geometry import is_int
from ..apart import apart, apart_as
from ..exact import ExactBuffers


class Verdict(NamedTuple):
    """The decision of a criterion at one exit.

    ``leave``: bool ``[n]``. ``confidence``: ``[n]``, higher is surer; it orders the samples where
    ``max_fraction`` makes some of them leave; None: the largest softmax probability does. ``memory``: what
    the criterion wants to be given at the next exit, a pytree of tensors ``[n, ...]``; it is compacted as the
    samples leave.
    """

    leave: Tensor
    confidence: Tensor | None = None
    memory: Any = None


class Criterion(ExactBuffers):
    """A confidence for each sample, and a threshold for each exit: a sample that reaches it leaves.

    A subclass has a method ``measure(logits, exit, state, memory) -> (confidence [n], memory)``. A confidence
    that is NaN
    reaches no threshold: such a sample never leaves before the last exit.

    Args:
        threshold: a number, or one for each exit but the last (a longer sequence is fine; the last exit takes
            who is left).
        temperature: logits are divided by it (Guo et al., ICML 2017; :func:`fit_temperature`); a number, or
            one for each exit.

    ``threshold`` and ``temperature`` are float64 buffers: checkpoints keep them, with the shape that they
    have there, and ``module.to(dtype)`` leaves them as they are, as 0.999 in bfloat16 is 1. Nothing here is
    read back from a GPU.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    threshold: Tensor
    temperature: Tensor

    def __init__(
        self,
        threshold: float | Sequence[float] | Tensor,
        temperature: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__()
        self.register_buffer("threshold", _numbers("threshold", threshold))
        self.register_buffer("temperature", _positive("temperature", temperature))

    def set_threshold(self, threshold: float | Sequence[float] | Tensor) -> None:
        """Replaces the thresholds, for example by those of :func:`fit_thresholds`."""
        self.threshold = _numbers("threshold", threshold).to(self.threshold.device)

    def set_temperature(self, temperature: float | Sequence[float] | Tensor) -> None:
        """Replaces the temperatures, for example by those of :func:`fit_temperature`."""
        self.temperature = _positive("temperature", temperature).to(self.temperature.device)

    def check_exits(self, num_exits: int) -> None:
        """Raises ValueError where this criterion cannot serve a model of so many exits."""
        for name, values in (("threshold", self.threshold), ("temperature", self.temperature)):
            if values.dim() == 1 and values.shape[0] < num_exits - 1:
                raise ValueError(
                    f"{name}: expected a number, or one for each of {num_exits} exits but the last, "
                    f"got {len(values)}"
                )

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        """The confidence ``[n]`` at an exit, and what to remember until the next one."""
        raise NotImplementedError(f"{type(self).__name__}.measure")

    def to_threshold(self, confidence: Tensor) -> Tensor:
        """The threshold, in this criterion's units, that samples of at least ``confidence`` reach."""
        return confidence

    def forward(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> Verdict:
        confidence, memory = self.measure(logits, exit, state, memory)
        least = self.to_threshold(at_exit(self.threshold, exit, "threshold"))  # its own inverse
        return Verdict(confidence >= least, confidence, memory)

    def scaled(self, logits: Tensor, exit: int) -> Tensor:
        """``logits / temperature`` at an exit, in float32 at least."""
        logits = _floating(logits)
        return logits / at_exit(self.temperature, exit, "temperature")

    def _exact(self):
        return ("threshold", "temperature")

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        for name in ("threshold", "temperature"):
            saved, kept = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != kept.shape:
                setattr(self, name, kept.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        text, temperature = f"threshold={_shown(self.threshold)}", _shown(self.temperature)
        return text if temperature == 1 else f"{text}, temperature={temperature}"


class MaxSoftmax(Criterion):
    """Leaves where the largest softmax probability is at least the threshold.

    Logits ``[n, C]``, or ``[n, C, ...]``, where the mean over the other positions counts.

    Papers: MSDNet (ICLR 2018), Shallow-Deep Networks (ICML 2019), RANet (CVPR 2020); with a temperature The
    Right Tool for the Job (ACL 2020).
    """

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        return max_probability(self.scaled(logits, exit)), None


class Entropy(Criterion):
    """Leaves where the entropy of the softmax, in nats, is at most the threshold.

    Logits ``[n, C]``, or ``[n, C, ...]``, where the mean over the other positions counts. The confidence is
    minus the entropy.

    Args:
        threshold, temperature: see :class:`Criterion`.
        normalize: divides the entropy by log(C), so that it lies in [0, 1] (FastBERT's uncertainty).

    Papers: BranchyNet (ICPR 2016), DeeBERT (ACL 2020), FastBERT (ACL 2020).
    """

    def __init__(
        self,
        threshold: float | Sequence[float] | Tensor,
        temperature: float | Sequence[float] | Tensor = 1.0,
        *,
        normalize: bool = False,
    ):
        super().__init__(threshold, temperature)
        self.normalize = normalize

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        log_p = torch.log_softmax(self.scaled(logits, exit), 1)
        # the clamp: 0 * -inf would be NaN where a class is masked with a logit of -inf
        minus = (log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)
        if self.normalize:
            _at_least_two(logits, "Entropy(normalize=True)")
            minus = minus / torch.log(minus.new_tensor(logits.shape[1]))
        return _mean_of_positions(minus), None

    def to_threshold(self, confidence: Tensor) -> Tensor:
        return -confidence


class Margin(Criterion):
    """Leaves where the two largest softmax probabilities differ by at least the threshold.

    Logits ``[n, C]``, or ``[n, C, ...]``, where the mean over the other positions counts; C is 2 at least.

    Paper: Park et al., Big/little deep neural network (CODES+ISSS 2015).
    """

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        _at_least_two(logits, "Margin")
        best = torch.softmax(self.scaled(logits, exit), 1).topk(2, 1).values
        return _mean_of_positions(best[:, 0] - best[:, 1]), None


class Patience(Criterion):
    """Lets a sample leave if its prediction has not changed for ``patience`` exits in a row.

    The confidence is the number of exits that agreed with the one before, from 0 at the first exit. A
    prediction with a NaN in it agrees with nothing.

    Args:
        patience: an int >= 1, or one for each exit; it is the buffer ``threshold``.
        tolerance: None: predictions are classes, the argmax over dim 1 of ``[n, C]`` or ``[n, C, ...]``, and
            all positions must agree. A number: predictions are values ``[n, ...]`` (regression). They agree if
            each moved by less than ``tolerance``.

    Paper: Zhou et al., BERT Loses Patience (NeurIPS 2020).
    """

    def __init__(self, patience: int | Sequence[int] | Tensor, tolerance: float | None = None):
        super().__init__(patience)
        if bool((self.threshold < 1).any()):
            raise ValueError(f"patience: expected 1 or more exits, got {patience!r}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance: expected a number > 0 or None, got {tolerance!r}")
        self.tolerance = tolerance

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        logits = _floating(logits).detach()
        now = logits.argmax(1) if self.tolerance is None else logits
        if memory is None:
            count = logits.new_zeros(logits.shape[0])
            return count, (now, count)
        before, count = memory
        same = now == before if self.tolerance is None else (now - before).abs() < self.tolerance
        same = same.flatten(1).all(1) if same.dim() > 1 else same
        known = logits.flatten(1).isnan().any(1) if logits.dim() > 1 else logits.isnan()
        count = torch.where(same & ~known, count + 1, 0)
        return count, (now, count)

    def extra_repr(self) -> str:
        text = f"patience={_shown(self.threshold)}"
        return text if self.tolerance is None else f"{text}, tolerance={self.tolerance}"


class LearnedExit(Criterion):
    """Leaves where a head's score says so: ``sigmoid(score / temperature)`` is at least the threshold.

    Args:
        heads: a module for each exit but the last, ``-> [n]`` or ``[n, 1]``.
        threshold, temperature: see :class:`Criterion`.
        reads: what a head is called with: "state", the state that the exit's own head saw (EENet, EPNet; in a
            :class:`Cascade` the input), or "logits" (IDK cascades, Bolukbasi et al.).

    Train the heads with :func:`learned_exit_loss` on the confidences of ``model(x, confidence=True)``; they
    have gradients.

    Papers: Bolukbasi et al., Adaptive neural networks for efficient inference (ICML 2017); IDK cascades (UAI
    2018); Demir, Early-exit convolutional neural networks (METU thesis 2019); EPNet (CIKM 2020).
    """

    def __init__(
        self,
        heads: Iterable[nn.Module],
        threshold: float | Sequence[float] | Tensor = 0.5,
        temperature: float | Sequence[float] | Tensor = 1.0,
        *,
        reads: str = "state",
    ):
        super().__init__(threshold, temperature)
        if reads not in ("state", "logits"):
            raise ValueError(f"reads: expected 'state' or 'logits', got {reads!r}")
        self.heads, self.reads = nn.ModuleList(heads), reads

    def check_exits(self, num_exits: int) -> None:
        super().check_exits(num_exits)
        if len(self.heads) < num_exits - 1:
            raise ValueError(
                f"heads: expected one for each of {num_exits} exits but the last, got {len(self.heads)}"
            )

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        if self.reads == "state" and state is None:
            raise ValueError(
                "state: expected the network's, as LearnedExit reads it, got None; take the confidences of "
                "model(x, confidence=True)"
            )
        score = apart(self.heads[exit], state if self.reads == "state" else logits)
        if score.numel() != logits.shape[0]:
            raise ValueError(
                f"heads: expected [{logits.shape[0]}] or [{logits.shape[0]}, 1] of head {exit}, "
                f"got {tuple(score.shape)}"
            )
        return torch.sigmoid(self.scaled(score.reshape(-1), exit)), None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reads={self.reads!r}"


class IDKClass(Criterion):
    """Leaves where the probability of a class "I don't know" is small: 1 minus it is at least the threshold.

    Logits ``[n, C + 1]`` of a classifier that was trained with that class. What leaves keeps all its logits.

    Args:
        index: the class, from 0; -1: the last one.
        threshold, temperature: see :class:`Criterion`.

    Paper: Wang et al., IDK cascades (UAI 2018).
    """

    def __init__(
        self,
        index: int = -1,
        threshold: float | Sequence[float] | Tensor = 0.5,
        temperature: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__(threshold, temperature)
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"index: expected an int, got {index!r}")
        self.index = index

    def measure(self, logits: Tensor, exit: int, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        unknown = torch.softmax(self.scaled(logits, exit), 1).select(1, self.index)
        return _mean_of_positions(1 - unknown), None

    def extra_repr(self) -> str:
        return f"index={self.index}, {super().extra_repr()}"


def max_probability(logits: Tensor) -> Tensor:
    """``[n]``: the largest softmax probability over dim 1, the mean over further positions; logits ``[n]``
    stand for themselves.
    """
    logits = _floating(logits)
    return logits if logits.dim() == 1 else _mean_of_positions(torch.softmax(logits, 1).amax(1))


def decide(criterion, logits: Tensor, exit: int, state: Any, memory: Any) -> Verdict:
    """A criterion's or a callable's verdict, checked."""
    last = (memory,) if isinstance(criterion, Criterion) else ()
    verdict = apart_as(criterion, lambda seen: criterion(seen[0], exit, seen[1], *last), (logits, state))
    if not isinstance(criterion, Criterion) and not isinstance(verdict, Verdict):
        verdict = Verdict(verdict)
    n = logits.shape[0]
    for name, value in (("leave", verdict.leave), ("confidence", verdict.confidence)):
        if value is None and name == "confidence":
            continue
        if not isinstance(value, Tensor) or (name == "leave" and value.dtype != torch.bool):
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"criterion: expected {name} as a {'bool ' * (name == 'leave')}tensor [{n}], got {what}"
            )
        if tuple(value.shape) != (n,):
            raise ValueError(
                f"criterion: expected {name} [{n}] at exit {exit}, got shape {tuple(value.shape)}"
            )
    return verdict


def at_exit(values: Tensor, exit: int, name: str) -> Tensor:
    """The value ``[]`` of an exit."""
    if values.dim() == 0:
        return values
    if exit >= values.shape[0]:
        raise ValueError(
            f"{name}: expected a number or one for each exit, got {values.shape[0]} at exit {exit}"
        )
    return values[exit]


def _shown(values: Tensor) -> float | list[float] | str:
    return "meta" if values.is_meta else values.tolist()


def _numbers(name: str, value) -> Tensor:
    """A number or a sequence of them as float64 ``[]`` or ``[E]``."""
    try:
        device = value.device if isinstance(value, Tensor) else "cpu"
        made = torch.as_tensor(value, dtype=torch.float64, device=device).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number or a sequence of them, got {value!r}") from None
    if made.dim() > 1 or made.numel() == 0 or bool(made.isnan().any()):
        raise ValueError(f"{name}: expected a number or one for each exit, got {value!r}")
    return made


def _positive(name: str, value) -> Tensor:
    made = _numbers(name, value)
    if bool((made <= 0).any()):
        raise ValueError(f"{name}: expected numbers > 0, got {value!r}")
    return made


def _floating(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating tensor, got {what}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_of_positions(values: Tensor) -> Tensor:
    """``[n, ...]`` to ``[n]``."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _at_least_two(logits: Tensor, name: str) -> None:
    if logits.dim() < 2 or not is_int(logits.shape[1], 2):
        raise ValueError(f"logits: expected [n, C] with C >= 2 for {name}, got shape {tuple(logits.shape)}")
