"""What the examples share: the data, a training loop, the measurement and its row.

An example is a module with ``STEPS``, ``build()``, ``train(model, data, length)`` and three ways to run its model on ``x``
``[N, 1, S, S]``, which return logits ``[N, 10]``:

- ``full(model, x)``: the static network, every gate open and no gate computed. It is what time and MACs are compared with.
- ``dense(model, x)``: the dense-masked form. Everything is computed, then the gates multiply it.
- ``dynamic(model, x)``: dynops' layers, which compute what the gates ask for. The result is that of ``dense``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Budget, compare
from dynops.budget import MacCounter

BATCH = 64  # of training
BOOST = 3  # of the learning rate of gates


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits: images float32 ``[N, 1, size, size]``, labels int64 ``[N]``.

    A third part, ``valid``, is for thresholds: they are fitted on neither training nor test images.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, size: int = 16) -> Digits:
        """The images, bilinearly enlarged from 8x8, in a fixed stratified split of 1197, 240 and 360."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        y = torch.tensor(data.target, dtype=torch.int64)
        rest, test = train_test_split(range(len(y)), test_size=360, stratify=y, random_state=0)
        train, valid = train_test_split(rest, test_size=240, stratify=y[rest], random_state=0)
        return cls(*((x[part], y[part]) for part in (train, valid, test)))


@dataclass(frozen=True)
class Length:
    """How long to train: a number of steps, or of seconds (then results depend on the machine's speed)."""

    steps: int
    seconds: float | None = None

    def part(self, share: float) -> Length:
        """A share of it, for a training in phases."""
        seconds = None if self.seconds is None else share * self.seconds
        return Length(max(1, round(share * self.steps)), seconds)

    def progress(self) -> Iterator[float]:
        """For each step the share of training that is done."""
        start, done = time.perf_counter(), 0.0
        step = 0
        while done < 1:
            yield done
            step += 1
            if self.seconds is None:
                done = step / self.steps
            else:
                done = (time.perf_counter() - start) / self.seconds


def fit(
    model: nn.Module,
    part: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor, float], Tensor],
    length: Length,
    *,
    rate: float = 3e-3,
    parameters: Iterable[nn.Parameter] | None = None,
    gates: Iterable[nn.Parameter] = (),
) -> None:
    """Trains ``model`` with AdamW and a cosine schedule, then puts it into eval mode.

    Args:
        part: images and labels.
        loss: called as ``loss(x, y, progress)`` for each batch, progress in [0, 1).
        rate: the learning rate after its rise over the first tenth.
        parameters: what is trained; None: all.
        gates: those of them that learn three times as fast: a gate that starts open has far to go in a few hundred steps.
    """
    images, labels = part
    parameters, gates = list(model.parameters() if parameters is None else parameters), list(gates)
    fast = set(map(id, gates))
    groups = [([p for p in parameters if id(p) not in fast], rate), (gates, BOOST * rate)]
    optimizer = torch.optim.AdamW(({"params": p, "peak": r} for p, r in groups if p), weight_decay=1e-2)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for progress in length.progress():
        if len(order) < BATCH:
            order = torch.randperm(len(labels))
        index, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, 10 * progress + 0.1) * (1 + math.cos(math.pi * progress)) / 2
        optimizer.zero_grad()
        loss(images[index].to(memory_format=torch.channels_last), labels[index], progress).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
    model.eval()


@dataclass(frozen=True)
class Result:
    """A row: what one run measured. MACs are those of a sample, milliseconds those of a batch."""

    example: str
    accuracy: float  # of the dynamic form on the test images
    macs_dense: float  # of the static network
    macs_dynamic: float  # what is computed, gates included
    batch: int
    dense_ms: float  # the faster of NCHW and channels_last, eager
    dynamic_ms: float
    training_s: float

    @property
    def theory(self) -> float:
        return self.macs_dense / self.macs_dynamic

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.dynamic_ms

    @property
    def realised(self) -> float:
        return self.speedup / self.theory

    def row(self) -> dict[str, str | float]:
        """The fields and what follows from them."""
        derived = {"theory": self.theory, "speedup": self.speedup, "realised": self.realised}
        return asdict(self) | derived

    def __str__(self) -> str:
        return (
            f"{self.example}: accuracy {100 * self.accuracy:.1f} %, kMACs {self.macs_dense / 1e3:.0f} dense, "
            f"{self.macs_dynamic / 1e3:.0f} dynamic, theory {self.theory:.2f}x, "
            f"ms {self.dense_ms:.2f} dense, {self.dynamic_ms:.2f} dynamic (batch {self.batch}), "
            f"speed-up {self.speedup:.2f}x, realised {self.realised:.2f}"
        )


def accuracy(run: Callable, model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """The share of right answers of ``run(model, x)``."""
    with torch.inference_mode():
        logits = run(model, part[0].to(memory_format=torch.channels_last))
    return (logits.argmax(1) == part[1]).float().mean().item()


def full_macs(run: Callable, model: nn.Module, x: Tensor) -> float:
    """MACs of a sample in ``run(model, x)``, which uses PyTorch's operators only: half of PyTorch's own count of FLOPs.

    Without oneDNN, whose LSTM is one operator that this count does not know; on 8 samples, as all cost the same.
    """
    x = x[:8]
    with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counted:
        warnings.simplefilter("ignore")  # setting one of oneDNN's flags makes PyTorch look at all of them
        with torch.backends.mkldnn.flags(enabled=False):
            run(model, x)
    return counted.get_total_flops() / 2 / len(x)


def dynamic_macs(run: Callable, model: nn.Module, x: Tensor) -> float:
    """MACs of a sample in ``run(model, x)``, the mean over the batch, as ``dynops.budget`` counts them."""
    with torch.no_grad(), MacCounter(model) as counted:
        run(model, x)
    return counted.per_sample.mean().item()


def report(
    example: ModuleType, model: nn.Module, data: Digits, training_s: float, budget: Budget | None = None
) -> Result:
    """Accuracy, MACs and interleaved times of a trained model on the test images, one batch of 360; prints and returns them."""
    x = data.test[0]
    last = x.to(memory_format=torch.channels_last)
    in_nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        times = compare(
            {
                "NCHW": lambda: example.full(in_nchw, x.contiguous()),
                "channels_last": lambda: example.full(model, last),
            },
            {"dynamic": lambda: example.dynamic(model, last)},
            x.device,
            budget or Budget(seconds=2.0, max_rounds=200),
        )
    result = Result(
        example=name_of(example),
        accuracy=accuracy(example.dynamic, model, data.test),
        macs_dense=full_macs(example.full, model, last),
        macs_dynamic=dynamic_macs(example.dynamic, model, last),
        batch=len(x),
        dense_ms=times.dense_ms,
        dynamic_ms=times.ours["dynamic"],
        training_s=training_s,
    )
    print(result, flush=True)
    return result


def run(example: ModuleType, seconds: float | None = None, seed: int = 0) -> Result:
    """Builds and trains an example, and reports it.

    Args:
        seconds: the time to train for; None: the example's number of steps.
        seed: of the weights, the batches and the gates' noise.
    """
    torch.manual_seed(seed)
    data = Digits.load(example.SIZE)
    model = example.build().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    example.train(model, data, Length(example.STEPS, seconds))
    return report(example, model, data, time.perf_counter() - start)


def name_of(example: ModuleType) -> str:
    """The last part of the module's name; of the file's, where it is the program that runs."""
    return Path(example.__file__).stem


def main(name: str) -> None:
    """The command line of the example ``name``."""
    example = sys.modules[name]
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name_of(example)}", description=example.__doc__
    )
    parser.add_argument("--seconds", type=float, help="train for so long instead of a fixed number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the row there too")
    arguments = parser.parse_args()
    result = run(example, arguments.seconds, arguments.seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.row(), indent=1) + "\n")
