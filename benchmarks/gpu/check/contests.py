"""The contests on a GPU: the benchmarks of ``benchmarks/`` on cases that a GPU is for, in the order of their weight.

    python -m benchmarks.gpu.check.contests --out results.jsonl [--seconds 240] [--skip N]

Runs as a process of its own that writes every row as soon as it has it, so that a crash or a time limit leaves the rows
before it. Lone convolutions have no compiled dense version, since a compiled one is the same cuDNN call; stacks, blocks and
models have one in channels_last, the layout that the compiler chooses for convolutions by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...blocks import stacks
from ...channels import layers as channels
from ...experts import layers as experts
from ...harness import masks
from ...harness.replay import first_line
from ...harness.roofline import Roofline
from ...harness.rows import Row
from ...harness.setting import Budget, Setting
from ...pixels import layers, model
from ...samples import blocks as samples

BATCH_1 = "batch 1"  # the group of pixels' layers on large maps
TOKENS = (1, 128, 2048, 8192)
SHARES = (1.0, 0.75, 0.5, 0.25)
DEVICE_LOST = 3  # exit code
LONGEST = 90.0  # seconds of one contest, or its suite's share where that is more: compilers may take a minute


@dataclass(frozen=True)
class Contest:
    """Some rows from one interleaved run."""

    suite: str
    name: str
    run: Callable[[Setting], list[Row]]
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.name}"


# suite: its share of the benchmark's time. Those that come last are left out first.
SUITES = {
    "pixels": 4,
    "experts": 2,
    "channels": 2,
    "samples": 3,
    "blocks": 3,
    "models": 5,
    "pixels, large": 3,
    "pixels, tf32": 1,
}


def in_order(tiny: bool = False) -> list[Contest]:
    """Every contest, suite after suite; ``tiny``: the first of each, of a size for a dry run on a CPU."""
    found = [
        *_pixels(tiny),
        *_experts(tiny),
        *_channels(tiny),
        *_samples(tiny),
        *_blocks(tiny),
        *_models(tiny),
    ]
    if tiny:  # many CPUs have no instructions for bfloat16, and the compiler takes longer than the run
        first = {contest.suite: contest for contest in reversed(found)}
        found = [dataclasses.replace(c, dtype=torch.float32, compiled=False) for c in first.values()]
    return [contest for suite in SUITES for contest in found if contest.suite == suite]


def _conv(n: int, c: int, h: int, w: int, tiny: bool) -> layers.Case:
    n, c, h, w = (min(n, 2), 16, 12, 12) if tiny else (n, c, h, w)
    return layers.Case(BATCH_1 if n == 1 else "3x3", n, c, c, h, w, 3)


def _pixels(tiny: bool) -> Iterator[Contest]:
    """3x3 layers of 56x56 maps, and of a street scene's, (H, W)."""
    large = [(1, 64, 400, 700), (64, 64, 56, 56), (256, 256, 56, 56), (1, 256, 200, 350), (256, 64, 56, 56)]
    sizes = {
        "pixels": [(32, c, 56, 56) for c in (64, 256, 128, 512)],
        "pixels, large": large,
        "pixels, tf32": [(32, 64, 56, 56), (32, 256, 56, 56)],
    }
    for suite, shapes in sizes.items():
        for shape in shapes:
            case = _conv(*shape, tiny)
            dtype = torch.float32 if suite.endswith("tf32") else torch.bfloat16
            yield Contest(suite, case.name, functools.partial(layers.measure, case), dtype)


def _channels(tiny: bool) -> Iterator[Contest]:
    kinds = {"half in, half out": {}, "half out": {"sides": "out"}, "widths of samples": {"kind": "widths"}}
    for n, c, h in ((32, 128, 56), (32, 256, 28), (64, 64, 56)):
        for group, options in kinds.items():
            case = channels.Case(group, dataclasses.replace(_conv(n, c, h, h, tiny), group=""), **options)
            name = f"{case.group}, {case.name}"
            yield Contest("channels", name, functools.partial(channels.measure, case))


def _samples(tiny: bool) -> Iterator[Contest]:
    for mode, n, c, h in (("residual", 256, 64, 56), ("replace", 64, 256, 56), ("residual", 64, 512, 28)):
        size, shares = ((4, 8, 8), SHARES[::2]) if tiny else ((n, c, h), SHARES)
        case = samples.Case(mode, *size, shares, ("plain",))
        run = functools.partial(samples.measure, case)
        yield Contest("samples", case.name, run, compiled=True)


def _blocks(tiny: bool) -> Iterator[Contest]:
    """SBNet's layers and blocks at its sizes, and a stack of two convolutions at a batch."""
    shapes = (
        ("SBNet 3x3", "3x3", stacks.conv3x3, 64, 400, 700, 1),
        ("SBNet bottleneck", "bottleneck", stacks.bottleneck, 512, 200, 350, 1),
        ("3x3, 3x3", "3x3, 3x3", stacks.chain, 128, 56, 56, 32),
        ("SBNet 3x3", "3x3", stacks.conv3x3, 256, 100, 175, 1),
    )
    for shape in shapes:
        case = stacks.Case(*shape, densities=(0.5, 0.25, 0.1))
        if tiny:
            case = dataclasses.replace(case, channels=8, h=32, w=32, block=8)
        run = functools.partial(stacks.measure, case)
        yield Contest("blocks", case.name, run, compiled=case.kind != "3x3")


def _models(tiny: bool) -> Iterator[Contest]:
    size, n = ((32, 32), 2) if tiny else ((224, 224), 64)

    def run(setting: Setting) -> list[Row]:
        setting = dataclasses.replace(setting, densities=(0.25,))
        return model.measure(size, setting, ("photo, 32x32 cells",), n)

    yield Contest("models", f"ResNet-50, batch {n}", run, compiled=True)


def _experts(tiny: bool) -> Iterator[Contest]:
    for layer in (experts.Layer(64, 32, 4, 2),) if tiny else experts.LAYERS:
        run = functools.partial(experts.plain_rows, layer, (1, 16) if tiny else TOKENS)
        yield Contest("experts", layer.name, run)
    yield Contest("experts", "one GEMM", functools.partial(experts.gemm_rows, TOKENS[1:]))


@functools.cache
def _roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    return Roofline(device, dtype) if device.type == "cuda" else Roofline(device, dtype, 64, 16)


# ---------------------------------------------------------------------------------------- the worker


def setting_of(contest: Contest, device: torch.device) -> Setting:
    """The setting of a contest; on a CPU, a dry run, the briefest there is."""
    on_gpu = device.type == "cuda"
    return Setting(
        device,
        contest.dtype,
        compiled=contest.compiled,
        compiled_formats=("channels_last",),
        variants=False,
        budget=Budget(0.3, 5, 30, 1, 1) if on_gpu else Budget(0.0, 2, 2, 1, 1),
        mask_kinds=("random", "square", "photo") if masks.has_photograph() else ("random", "square"),
        graph=on_gpu,
        roofline=_roofline(device, contest.dtype),
    )


def measure(
    contests: list[Contest], device: torch.device, seconds: float, write: Callable[[dict], None]
) -> int:
    """Runs contests while there is time, and writes ``{"begun"}``, ``{"row"}``, ``{"failed", "error"}``,
    ``{"done", "seconds"}`` and ``{"note"}``. Returns the exit code: 0, or DEVICE_LOST.

    A suite has its share of the time that is left when it begins; a contest that hangs ends the process.
    """
    end = time.monotonic() + seconds
    suites = list(dict.fromkeys(contest.suite for contest in contests))
    ran: dict[torch.dtype, bool] = {}
    for i, suite in enumerate(suites):
        left = max(end - time.monotonic(), 0.0)
        share = left * SUITES[suite] / sum(SUITES[later] for later in suites[i:])
        suite_end = time.monotonic() + share
        for contest in (own for own in contests if own.suite == suite):
            if time.monotonic() > suite_end:
                break
            faulthandler.dump_traceback_later(max(share, LONGEST), exit=True)
            _run(contest, device, write)
            ran[contest.dtype] = True
            faulthandler.cancel_dump_traceback_later()
            if not _settled(device):
                return DEVICE_LOST
    for dtype in ran:
        write({"note": str(_roofline(device, dtype))})
    return 0


def _run(contest: Contest, device: torch.device, write: Callable[[dict], None]) -> None:
    begun = time.monotonic()
    write({"begun": contest.title})
    try:
        rows = contest.run(setting_of(contest, device))
    except Exception as error:  # too little memory, a gap of a library, a bug of ours: the others still run
        traceback.print_exc()
        write({"failed": contest.title, "error": first_line(error)})
        rows = []
    for row in rows:
        write({"row": row.as_dict()})
    write({"done": contest.title, "seconds": time.monotonic() - begun})


def _settled(device: torch.device) -> bool:
    """Frees what the last contest held; False where the device does not answer any more."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check.contests", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="rows are appended here, a JSON object a line"
    )
    parser.add_argument("--seconds", type=float, default=600, help="no contest begins after these")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first ones")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on a CPU: a dry run, not a measurement"
    )
    args = parser.parse_args(arguments)
    device = torch.device("cpu") if args.tiny else torch.device("cuda", 0)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # the best dense is cuDNN's fastest algorithm, not its first guess
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    contests = in_order(args.tiny)[args.skip :]
    with args.out.open("a") as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        return measure(contests, device, args.seconds, write)


if __name__ == "__main__":
    raise SystemExit(main())
