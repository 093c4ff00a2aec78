"""The contests of samples: a dense network against ours on several decisions, in one interleaved run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..harness.compare import compare
from ..harness.contenders import formats_of
from ..harness.rows import Row
from ..harness.setting import Setting


@dataclass(frozen=True)
class Contest:
    """A row to be: one decision, and every way to call ours with it."""

    group: str
    case: str
    mask: str
    density: float  # the share of the samples (blocks, steps) that is computed
    macs: float  # that must be computed, those of gates and heads included
    ours: dict[str, Callable]  # {version: call}
    variant: str = "plain"
    gates: dict[str, Callable] | None = None  # {version: the gate by itself}, inside ``ours`` or not
    saves: bool = True  # False: measured to see what it costs; in no summary
    values: float = 0.0  # that must move: weights, inputs, outputs; 0 where they are not counted
    replay: Callable | None = None  # the call that a CUDA graph can capture


def contested(
    setting: Setting,
    dense: dict[str, Callable],
    dense_macs: float,
    contests: list[Contest],
    p99: bool = False,
) -> list[Row]:
    """The rows of ``contests``; of ours, as of the dense network, the fastest version counts.

    Args:
        dense: ``{version: call}``.
        dense_macs: of a dense call.
        p99: also the 99th percentiles.
    """
    ours = {i: contest.ours for i, contest in enumerate(contests)}
    gates = {i: contest.gates for i, contest in enumerate(contests) if contest.gates}
    replays = {i: contest.replay for i, contest in enumerate(contests) if contest.replay}
    # a network has more kinds of blocks, in two formats, than the eight versions of a function that are kept
    many = torch._dynamo.config.patch(recompile_limit=64)
    with many, torch.inference_mode(not setting.backward):
        times = compare(dense, ours, setting, replays=replays, gates=gates, p99=p99)
    return [
        times.row(
            i,
            megabytes=contest.values * setting.dtype.itemsize / 1e6,
            suite="samples",
            group=contest.group,
            case=contest.case,
            mask=contest.mask,
            density=contest.density,
            variant=contest.variant,
            gmacs=dense_macs / 1e9,
            computed_gmacs=contest.macs / 1e9,
            break_even_only=not contest.saves,
        )
        for i, contest in enumerate(contests)
    ]


def our_versions(x: Tensor, setting: Setting) -> Iterator[tuple[str, Tensor, Callable, Callable]]:
    """Each version of ours: its name, ``x`` in its memory format, and two functions that prepare a module.

    The first copies a module into the format. The second compiles it for any batch, or leaves it as it is.
    """
    for name, form in formats_of(x).items():

        def copied(module: nn.Module, form: torch.memory_format = form) -> nn.Module:
            return copy.deepcopy(module).to(memory_format=form)

        own = x.contiguous(memory_format=form)
        yield f"{name} eager".strip(), own, copied, lambda module: module
        if setting.compiles(name) and not setting.backward:
            yield f"{name} compiled".strip(), own, copied, lambda module: torch.compile(module, dynamic=True)


class TokenMLP(nn.Module):
    """A transformer's feed-forward layer with its norm and shortcut, ``[..., C] -> [..., C]``."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def random_keep(samples: int, share: float, generator: torch.Generator) -> Tensor:
    """bool ``[N]``: exactly ``round(share * N)`` random samples."""
    keep = torch.zeros(samples, dtype=torch.bool)
    keep[torch.randperm(samples, generator=generator)[: round(share * samples)]] = True
    return keep
