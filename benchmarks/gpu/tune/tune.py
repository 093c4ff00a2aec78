"""``python -m benchmarks.gpu tune``: measures on a GPU the config that ships for its architecture.

First the tiles (``tiles``) of the problems in ``problems``, then, with the tiles that won, the break-even
densities (``break_even``). ``dynops/kernels/configs/<architecture>.json`` is written again after each.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path

import torch

from dynops.kernels import configs

from ...harness import replay
from ...harness.setting import Budget
from ...harness.timing import interleaved
from ..check.facts import nvidia_smi

TILES_SHARE = 0.6  # of the time; break-even densities have the rest
# bytes read before each call: more than any L2, and longer than the host takes to launch the call
FLUSHED = 1 << 30


class Clock:
    """Times calls that take turns, each with a cold second-level cache.

    Reading past the cache lasts longer than the host needs to launch a call, whose launches are then not part of its
    time. On a CPU, for a dry run, every call is timed once: the time of a tile in the interpreter means nothing.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.flush = replay.flush(device, FLUSHED) if self.on_gpu else int

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def medians(self, calls: dict[Hashable, Callable], rounds: int) -> dict[Hashable, float]:
        """``{name: milliseconds}``."""
        rounds = rounds if self.on_gpu else 1
        budget = Budget(0.0, rounds, rounds, warmup=int(self.on_gpu), calls=1)
        return interleaved(calls, self.device, budget, self.flush)


def facts(device: torch.device) -> dict:
    """The GPU, versions and day that the measurements depend on."""
    import triton

    gpu = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "none: a dry run, not a measurement"
    )
    return {
        "gpu": gpu,
        "driver": nvidia_smi(("driver_version",)).get("driver_version") if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def tune(
    device: torch.device, clock, seconds: float, log, found: list, layers: list
) -> Iterator[configs.Config]:
    """The config for a device, again after every problem and layer.

    Args:
        clock: as :class:`Clock`.
        found, layers: what ``problems`` and ``break_even`` list, or a part of it. Without layers the tiles have all the time.
    """
    from . import break_even, tiles

    name, known = configs.architecture(device), facts(device)
    found_tiles, shares = [], []
    yield configs.Config(known, found_tiles, shares)
    for entry in tiles.search_all(found, device, clock, seconds * (TILES_SHARE if layers else 1.0), log):
        found_tiles.append(entry)
        yield configs.Config(known, found_tiles, shares)
    with configs.use(name, configs.Config({}, found_tiles, [])):
        for entry in break_even.measure_all(layers, device, clock, (1 - TILES_SHARE) * seconds, log):
            shares.append(entry)
            yield configs.Config(known, found_tiles, shares)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu tune", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="the time to spend (default 240)")
    parser.add_argument(
        "--problems", type=int, metavar="N", help="the tiles of the first N problems, and no densities"
    )
    parser.add_argument("--out", type=Path, help="the folder to write to (default dynops/kernels/configs)")
    parser.add_argument(
        "--dry-run", action="store_true", help="a few small problems in Triton's interpreter; needs --out"
    )
    options = parser.parse_args(arguments)
    if options.problems is not None and options.problems < 1:
        parser.error(f"--problems: expected a number from 1 on, got {options.problems}")
    if options.dry_run and options.out is None:
        parser.error("--dry-run: expected --out, as what it writes is no measurement")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("expected a GPU (--dry-run needs none)")
    return options


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before any is imported
    from . import break_even, problems

    device = torch.device("cpu" if options.dry_run else f"cuda:{torch.cuda.current_device()}")
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # what a float32 problem is measured in
    clock = Clock(device)
    if options.dry_run:
        found, layers = problems.small_problems(), break_even.small_layers()
    else:
        found, layers = problems.every_problem(), break_even.layers()
    if options.problems is not None:
        found, layers = found[: options.problems], []
    folder = options.out or configs.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{configs.architecture(device)}.json"
    log = partial(print, flush=True)
    for config in tune(device, clock, options.seconds, log, found, layers):
        if config.tiles or config.break_even:  # an empty one would take the place of the file that ships
            file.write_text(config.as_json())
    print(f"{len(config.tiles)} tiles and {len(config.break_even)} break-even densities written to {file}")
