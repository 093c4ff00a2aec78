"""The search for tiles: candidates take turns with the best so far, and a wrong or spilling one never wins.

While a problem runs, its launchers ask ``kernels.configs`` for the tiles of its products. The search answers one of
these requests with a candidate after another. Nothing here knows a kernel's arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dynops.kernels import configs
from dynops.kernels.triton import tiling
from dynops.kernels.triton.tiling import Tile
from dynops.testing import assert_within_budget

from .problems import Call, Problem

LEAST_GAIN = 1.02  # over the tile before: less is noise
DUEL_ROUNDS, FINAL_ROUNDS = 9, 31
MOST_SPILLED = 2  # registers: the 8 bytes of stack that ptxas takes to stay at 80, 96 or 168 registers


class Request(NamedTuple):
    """The arguments of ``configs.Config.tile``."""

    family: str
    kind: str
    most: int
    indirect: bool
    rows: int
    n: int
    k: int
    batch: int


class Trial(configs.Config):
    """Notes what is asked, and answers ``request`` with ``candidate``; the built-in choice holds for all else."""

    def __init__(self):
        super().__init__({}, [], [])
        self.asked: dict[Request, None] = {}
        self.request: Request | None = None
        self.candidate: Tile | None = None
        self.answers = 0

    def tile(self, *arguments) -> dict | None:
        request = Request(*arguments)
        self.asked[request] = None
        if request != self.request or self.candidate is None:
            return None
        self.answers += 1
        return self.candidate._asdict()


# --------------------------------------------------------------------------------- candidates


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 227 * 1024  # sm_90's, for a dry run
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def limits_of(request: Request) -> tiling.Limits:
    """The limits within which a launcher takes a tile for this product."""
    tallest = max(16, 1 << configs.bucket(request.rows)) if request.family == "experts" else 256
    widest = max(16, 1 << configs.bucket(request.n))
    return tiling.Limits(request.most, widest, tallest, request.family == "pixels")


def may_fit(tile: Tile, kind: str, shared: int) -> bool:
    """True where a tile may have room: its accumulators in registers, its blocks in ``shared`` bytes.

    An eighth of the bytes is left to forms of the kernel that are not measured. Spills are seen once it is compiled.
    """
    accumulators = tile.m * tile.n / (32 * tile.warps)  # for each thread
    blocks = (tile.m + tile.n) * tile.k * tile.stages * (2 if kind == "half" else 4)
    registers = (
        tile.maxnreg is None or accumulators + 48 <= tile.maxnreg
    )  # fewest for all else that was compiled
    return 4 <= accumulators <= 128 and blocks <= shared * 7 / 8 and registers


def neighbours(tile: Tile) -> Iterator[Tile]:
    """The tiles that differ in one thing."""
    for stages in (tile.stages + 1, tile.stages - 1):
        if 2 <= stages <= 6:
            yield tile._replace(stages=stages)
    for k in (tile.k * 2, tile.k // 2):
        if 16 <= k <= 128:
            yield tile._replace(k=k)
    for warps in (tile.warps * 2, tile.warps // 2):
        if 4 <= warps <= 8:
            yield tile._replace(warps=warps)
    for m, n in ((2, 1), (1, 2), (0.5, 1), (1, 0.5)):
        m, n = int(tile.m * m), int(tile.n * n)
        if min(32, tile.m) <= m <= 256 and 16 <= n <= 256:
            yield tile._replace(m=m, n=n)
    for programs in (1, 2, 3):  # of an SM, which has 64 K registers
        maxnreg = None if programs == 1 else 65536 // (32 * tile.warps * programs) // 8 * 8
        if maxnreg != tile.maxnreg and (maxnreg or 0) <= 255:
            yield tile._replace(maxnreg=maxnreg)


# ------------------------------------------------------------------------------------- search


class Rejected(Exception):
    """A candidate that may not win, and why."""


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list]:
    """The compiled kernels that are launched within, which know their spills."""
    from triton.runtime.jit import JITFunction

    launched, run = [], JITFunction.run

    def logged(self, *args, **kwargs):
        compiled = run(self, *args, **kwargs)
        launched.append(compiled)
        return compiled

    JITFunction.run = logged
    try:
        yield launched
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it ``torch.empty`` is full of NaN: a value that a kernel does not write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Search:
    """One problem: its call with our kernels, and the right result.

    Args:
        clock: :meth:`now` in seconds, and :meth:`medians` {name: milliseconds} of calls that take turns.
        log: takes a line of text.
    """

    def __init__(self, problem: Problem, device: torch.device, clock, log: Callable[[str], None]):
        self.problem, self.device, self.clock, self.log = problem, device, clock, log
        call = problem.make(device)
        self.ours: Call = call(problem.dtype, "triton")
        self.exact: Tensor = call(torch.float64, "reference")()
        self.dense: Tensor = call(problem.dtype, "reference")()
        self.trial = Trial()

    def run(self, until: float) -> list[dict]:
        """An entry for each product of the problem that was reached by ``until``, and for the first one anyway."""
        with configs.use(configs.architecture(self.device), self.trial):
            self._right()
            asked = [request for request in self.trial.asked if request.family == self.problem.family]
            entries = [self._entry(request, until) for request in asked[:1]]
            return entries + [
                self._entry(request, until) for request in asked[1:] if self.clock.now() < until
            ]

    def _entry(self, request: Request, until: float) -> dict:
        """The tile that won, None where it is the built-in choice, and both times."""
        limits = limits_of(request)
        start = tiling.built_in(self.device, request.family, request.kind, limits, *request[4:])
        best = self._best(request, limits, start, until)
        times = self._duel(request, start, best, rounds=FINAL_ROUNDS)
        if times[start] < LEAST_GAIN * times[best]:
            best = start
        tile = None if best == start else best._asdict()
        self.log(
            f"{self.problem.name}: {describe(best)}, {times[start] / times[best]:.2f}x the built-in {describe(start)}"
        )
        measured = {"problem": self.problem.name, "ms": times[best], "built_in_ms": times[start]}
        return {**request._asdict(), "tile": tile, **measured}

    def _best(self, request: Request, limits: tiling.Limits, start: Tile, until: float) -> Tile:
        """The fastest tile of the built-in table, then of the neighbours of the best one, as long as it gets faster.

        One rival is tried even where the time is up: without any, nothing would have been measured.
        """
        arch, shared = tiling.device_facts(self.device)[0], shared_limit(self.device)
        deepest = max(16, 1 << configs.bucket(request.k))  # a launcher takes no deeper block
        best, tried, duels = start, {start}, 0
        queue = [*tiling.table(arch, request.kind, request.family), *neighbours(start)]
        while queue and (duels == 0 or self.clock.now() < until):
            tile = queue.pop(0)
            tile = tile._replace(k=min(tile.k, max(deepest, start.k)))
            if tile in tried or not limits.allow(tile) or not may_fit(tile, request.kind, shared):
                continue
            tried.add(tile)
            try:
                self._check(request, tile)
            except Rejected as reason:
                self.log(f"{self.problem.name}: {describe(tile)} rejected: {reason}")
                continue
            times, duels = self._duel(request, best, tile, rounds=DUEL_ROUNDS), duels + 1
            if times[tile] * LEAST_GAIN < times[best]:
                best = tile
                queue += neighbours(best)
        return best

    def _duel(self, request: Request, *tiles: Tile, rounds: int) -> dict[Tile, float]:
        """{tile: milliseconds}."""

        def call(tile):
            self.trial.request, self.trial.candidate = request, tile
            return self.ours()

        return self.clock.medians({tile: partial(call, tile) for tile in tiles}, rounds)

    def _check(self, request: Request, tile: Tile) -> None:
        """Raises Rejected for a tile that does not compile, spills, is not taken, or gives a wrong result."""
        self.trial.request, self.trial.candidate, self.trial.answers = request, tile, 0
        try:
            with compiled_kernels() as launched:
                self._right()
        except AssertionError as error:
            raise Rejected(f"WRONG RESULT, {error}") from error
        except Exception as error:  # of any compiler, or of a launch that is too large
            raise Rejected(f"{type(error).__name__}: {first_line(error)}") from error
        if not self.trial.answers:
            raise Rejected("the launcher does not ask for it again")
        spills = max((getattr(kernel, "n_spills", 0) or 0 for kernel in launched), default=0)
        if spills > MOST_SPILLED:
            raise Rejected(f"{spills} registers spill")

    def _right(self) -> None:
        with poisoned_memory():
            assert_within_budget(self.ours(), self.exact, self.dense, self.problem.name)


def describe(tile: Tile) -> str:
    most = "" if tile.maxnreg is None else f", {tile.maxnreg} registers"
    return f"{tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages{most}"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def search_all(found: list[Problem], device: torch.device, clock, seconds: float, log) -> Iterator[dict]:
    """The entries of a config's tiles, each as soon as it is there; a problem gets at most twice an even share of the time."""
    end = clock.now() + seconds
    for i, problem in enumerate(found):
        left = end - clock.now()
        if left <= 0:
            log(f"not reached: {len(found) - i} of {len(found)} problems, {problem.name} the first")
            break
        try:
            yield from Search(problem, device, clock, log).run(clock.now() + 2 * left / (len(found) - i))
        except AssertionError as error:  # of the built-in choice: nothing is measured against a wrong result
            log(f"{problem.name}: WRONG RESULT of the built-in tile, {error}")
        except RuntimeError as error:  # out of memory, or no kernel for the reference
            log(f"{problem.name}: not measured, {first_line(error)}")
