"""What the benchmarks of samples share: one dense network against ours on several decisions, in one interleaved run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import replay
from .layers import Setting
from .models import dense_versions
from .report import Row
from .timing import Budget, all_times, best_dense, percentile

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KEPT = 2  # versions of ours that are left after the first look, as of the dense ones


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


def measure(
    setting: Setting,
    dense: dict[str, Callable],
    dense_macs: float,
    contests: list[Contest],
    p99: bool = False,
) -> list[Row]:
    """The rows of ``contests``; of ours, as of the dense network, the fastest version counts.

    A first look leaves the two fastest versions of each; those, and the gates, then take turns.

    Args:
        dense: ``{version: call}``.
        dense_macs: of a dense call.
        p99: also the 99th percentiles, of 24 calls for each round of the budget.
    """
    looks: dict = {}
    # a network has more kinds of blocks, in two formats, than the eight versions of a function that are kept
    many = torch._dynamo.config.patch(recompile_limit=64)
    with many, torch.inference_mode(not setting.backward):
        calls = _kept(setting, dense, contests, looks)
        budget = _for_percentiles(setting.budget) if p99 else setting.budget
        times = all_times(calls, setting.device, budget)
    return [_row(setting, contest, dense_macs, i, looks, times, p99) for i, contest in enumerate(contests)]


DENSE, GATE = "dense", "gate"


def _kept(setting: Setting, dense: dict, contests: list[Contest], looks: dict) -> dict[tuple, Callable]:
    """``{(who, version): call}`` of those that take part, who being DENSE, a contest's number or a gate; fills ``looks``,
    ``{who: {version: ms}}``.
    """
    if setting.graph:  # ours has no graph: the number of its samples is known on the host
        dense = replay.working(dense, {})
        dense = {name: replay.captured_or(call, name, {}) or call for name, call in dense.items()}
    looks[DENSE], kept = best_dense(dense, setting.device)
    calls = {(DENSE, name): call for name, call in kept.items()}
    budget = Budget(0.15 * setting.budget.seconds, min_rounds=2, max_rounds=10, warmup=1, calls=1)
    for i, contest in enumerate(contests):
        looks[i], kept = best_dense(contest.ours, setting.device, KEPT, budget)
        calls |= {(i, name): call for name, call in kept.items()}
        for name in kept if contest.gates else ():
            calls[_gate(contest), name] = contest.gates[name]
    return calls


def _gate(contest: Contest) -> tuple:
    return GATE, id(contest.gates)  # contests share them


def _for_percentiles(budget: Budget) -> Budget:
    rounds = 12 * budget.min_rounds  # of two calls
    return Budget(budget.seconds, rounds, max(rounds, budget.max_rounds), budget.warmup)


def _row(setting: Setting, contest: Contest, dense_macs: float, who: int, looks, times, p99: bool) -> Row:
    middle = {key: statistics.median(values) for key, values in times.items()}
    dense_all, ours_all = (
        looks[key] | {name: ms for (of, name), ms in middle.items() if of == key} for key in (DENSE, who)
    )
    dense, ours = (min(_names(middle, of), key=lambda name, of=of: middle[of, name]) for of in (DENSE, who))
    return Row(
        suite="samples",
        group=contest.group,
        case=contest.case,
        mask=contest.mask,
        density=contest.density,
        variant=contest.variant,
        mode=setting.mode,
        dtype=str(setting.dtype).removeprefix("torch."),
        gmacs=dense_macs / 1e9,
        computed_gmacs=contest.macs / 1e9,
        dense_ms=middle[DENSE, dense],
        dense_name=dense,
        ours_ms=middle[who, ours],
        dense_all=dense_all,
        break_even_only=not contest.saves,
        ours_name=ours,
        ours_all=ours_all,
        gate_ms=middle[_gate(contest), ours] if contest.gates else 0.0,
        dense_p99_ms=percentile(times[DENSE, dense], 0.99) if p99 else 0.0,
        ours_p99_ms=percentile(times[who, ours], 0.99) if p99 else 0.0,
    )


def _names(middle: dict, who) -> list[str]:
    return [name for of, name in middle if of == who]


def dense_calls(model: nn.Module, x: Tensor, setting: Setting) -> dict[str, Callable]:
    """Every dense version: {NCHW, channels_last} x {eager, torch.compile}; what is no map has one format."""
    if x.dim() == 4:
        return dense_versions(model, x, setting)
    calls = {"eager": bound(model, x)}
    if setting.compiled:
        torch._dynamo.reset()
        calls["compiled"] = bound(torch.compile(model, dynamic=False), x)
    return calls


def formats(x: Tensor) -> dict[str, Tensor]:
    """``x`` in each memory format; a tensor that is no map: as it is."""
    if x.dim() != 4:
        return {"eager": x}
    return {name: x.contiguous(memory_format=form) for name, form in FORMATS.items()}


class TokenMLP(nn.Module):
    """A transformer's feed-forward layer with its norm and shortcut, ``[..., C] -> [..., C]``."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def bound(function: Callable, *arguments, **options) -> Callable:
    return lambda: function(*arguments, **options)


def random_keep(samples: int, share: float, generator: torch.Generator) -> Tensor:
    """bool ``[N]``: exactly ``round(share * N)`` random samples."""
    keep = torch.zeros(samples, dtype=torch.bool)
    keep[torch.randperm(samples, generator=generator)[: round(share * samples)]] = True
    return keep
