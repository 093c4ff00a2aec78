"""The measurement of an example and its row.

An example is a module with ``SIZE``, ``STEPS``, ``build()``, ``train(model, data, length)`` and ``run(model, x, mode)``, which
returns logits ``[N, 10]`` of ``x`` ``[N, 1, SIZE, SIZE]``. The modes:

- "full": the static network, every gate open and no gate computed. Time and MACs are compared with it.
- "dense": the dense-masked form. Everything is computed, then the gates multiply it.
- "dynamic": dynops' layers, which compute what the gates ask for. The result is that of "dense".
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.compare import DENSE, compare
from benchmarks.harness.setting import Budget, Setting
from dynops.budget import MacCounter

from .common import Digits, Length


@dataclass(frozen=True)
class Result:
    """The row of one run. MACs are those of a sample, milliseconds those of a batch."""

    example: str
    accuracy: float  # of the dynamic form on the test images
    macs_dense: float  # of the static network
    macs_dynamic: float  # that are computed, gates included
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
        """The fields and the ratios that follow from them."""
        return asdict(self) | {name: getattr(self, name) for name in ("theory", "speedup", "realised")}

    def cells(self) -> list[str]:
        """The cells of the table, as ``HEADER`` names them."""
        macs = (f"{n / 1e3:.0f}" for n in (self.macs_dense, self.macs_dynamic))
        times = (f"{ms:.2f}" for ms in (self.dense_ms, self.dynamic_ms))
        ratios = (f"{self.theory:.2f}x", *times, f"{self.speedup:.2f}x", f"{self.realised:.2f}")
        return [f"`{self.example}`", f"{100 * self.accuracy:.1f} %", *macs, *ratios]

    def __str__(self) -> str:
        return ", ".join(f"{name} {cell}" for name, cell in zip(HEADER, self.cells(), strict=True))


HEADER = [
    "example",
    "accuracy",
    "kMACs dense",
    "dynamic",
    "theory",
    "dense ms",
    "dynamic ms",
    "speed-up",
    "realised",
]


# ------------------------------------------------------------------------------------- one example


def accuracy(run: Callable, part: tuple[Tensor, Tensor]) -> float:
    """The share of right answers of ``run(x)``."""
    with torch.inference_mode():
        logits = run(part[0].to(memory_format=torch.channels_last))
    return (logits.argmax(1) == part[1]).float().mean().item()


def full_macs(run: Callable, x: Tensor) -> float:
    """MACs of a sample in ``run(x)``, which uses PyTorch's operators only: half of PyTorch's own count of FLOPs.

    Without oneDNN, whose LSTM is one operator that this count does not know; on 8 samples, as all cost the same.
    """
    x = x[:8]
    with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counted:
        warnings.simplefilter("ignore")  # setting one of oneDNN's flags makes PyTorch look at all of them
        with torch.backends.mkldnn.flags(enabled=False):
            run(x)
    return counted.get_total_flops() / 2 / len(x)


def dynamic_macs(run: Callable, model: nn.Module, x: Tensor) -> float:
    """MACs of a sample in ``run(x)``, the mean over the batch, as ``dynops.budget`` counts them."""
    with torch.no_grad(), MacCounter(model) as counted:
        run(x)
    return counted.per_sample.mean().item()


def report(
    example: ModuleType, model: nn.Module, data: Digits, training_s: float, budget: Budget | None = None
) -> Result:
    """Accuracy, MACs and interleaved times of a trained model on the test images, one batch of 360; prints and returns them."""
    x = data.test[0]
    last = x.to(memory_format=torch.channels_last)
    in_nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    full, dynamic = (partial(example.run, model, mode=mode) for mode in ("full", "dynamic"))
    dense = {
        "NCHW": partial(example.run, in_nchw, x.contiguous(), "full"),
        "channels_last": partial(full, last),
    }
    setting = Setting(x.device, x.dtype, budget=budget or Budget(seconds=2.0, max_rounds=200))
    with torch.inference_mode():
        times = compare(dense, {"dynamic": partial(dynamic, last)}, setting)
    result = Result(
        example=Path(example.__file__).stem,
        accuracy=accuracy(dynamic, data.test),
        macs_dense=full_macs(full, last),
        macs_dynamic=dynamic_macs(dynamic, model, last),
        batch=len(x),
        dense_ms=min(times.medians(DENSE).values()),
        dynamic_ms=min(times.medians("dynamic").values()),
        training_s=training_s,
    )
    print(result, flush=True)
    return result


def train_and_report(example: ModuleType, arguments: argparse.Namespace) -> Result:
    """Builds and trains an example, and reports it; ``arguments`` as :func:`options` has them."""
    torch.manual_seed(arguments.seed)
    data = Digits.load(example.SIZE)
    model = example.build().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    example.train(model, data, Length(example.STEPS, arguments.seconds))
    return report(example, model, data, time.perf_counter() - start)


# --------------------------------------------------------------------------- files, the command line


def write(results: list[Result], path: Path) -> None:
    """Writes CSV, JSON or Markdown, by the end of the path's name."""
    rows = [result.row() for result in results]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n")
    else:
        lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *(result.cells() for result in results)]
        path.write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines))


def output(name: str) -> Path:
    """The path of a file that :func:`write` knows."""
    path = Path(name)
    if path.suffix not in (".csv", ".json", ".md"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .csv, .json or .md, got {name}")
    return path


def options(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--seconds", type=float, help="train for so long instead of a fixed number of steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the noise of gates")
    parser.add_argument(
        "--out", type=output, action="append", default=[], help="a .csv, .json or .md; repeatable"
    )
    return parser


def main(name: str) -> None:
    """The command line of the example that is the module ``name``."""
    example = sys.modules[name]
    arguments = options(Path(example.__file__).stem, example.__doc__).parse_args()
    result = train_and_report(example, arguments)
    for path in arguments.out:
        write([result], path)
