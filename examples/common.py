"""The data and the training of the examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """The length of a training: a number of steps, or of seconds (then results depend on the machine's speed)."""

    steps: int
    seconds: float | None = None

    def part(self, share: float) -> Length:
        """A share of it, for a training in phases."""
        seconds = None if self.seconds is None else share * self.seconds
        return Length(max(1, round(share * self.steps)), seconds)

    def progress(self) -> Iterator[float]:
        """Yields for each step the share of training that is done."""
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
