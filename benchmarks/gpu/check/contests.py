"""The contests on a GPU: the benchmarks of ``benchmarks/`` on cases that a GPU is for.

    python -m benchmarks.gpu.check.contests --round headline --out results.jsonl [--seconds 150] [--skip N]

Three rounds: "headline" has one contest of each suite, "compiled" the model against its compiled dense version, and "second"
all others, the suites in turns. A process of its own writes every row as soon as it has it, so that a crash or a time limit
leaves the rows before it. Only the model is compiled, which takes a minute; of a lone convolution it is the same cuDNN call.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import gc
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
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
SUITES = ("pixels", "experts", "channels", "samples", "blocks", "models")
ROUNDS = ("headline", "compiled", "second")
TOKENS = (1, 16, 512, 8192)
SHARES = (1.0, 0.75, 0.5, 0.25)
DEVICE_LOST = 3  # exit code
LEAST = 20.0  # seconds that a contest may take at least: its kernels and cuDNN's choices come first


@dataclass(frozen=True)
class Contest:
    """Some rows from one interleaved run, or one after another."""

    suite: str
    name: str
    run: Callable[[Setting], Iterable[Row]]
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.name}"


def of_round(name: str, suites: Iterable[str] = SUITES, tiny: bool = False) -> list[Contest]:
    """The contests of a round; ``tiny``: of a size for a dry run on a CPU, and of the second round the first alone."""
    makers = {
        "pixels": _pixels,
        "experts": _experts,
        "channels": _channels,
        "samples": _samples,
        "blocks": _blocks,
        "models": _models,
    }
    found = [list(makers[suite](tiny)) for suite in SUITES if suite in suites]
    if tiny:  # many CPUs have no instructions for bfloat16
        found = [[dataclasses.replace(c, dtype=torch.float32) for c in own] for own in found]
    headline = [own[0] for own in found]
    if name == "headline":
        return headline
    if name == "compiled":  # in a dry run it is not: the compiler takes longer than all the rest
        models = (c for c in headline if c.suite == "models")
        return [dataclasses.replace(c, name=f"{c.name}, compiled", compiled=not tiny) for c in models]
    turns = itertools.zip_longest(*(own[1:] for own in found))
    second = [contest for turn in turns for contest in turn if contest is not None]
    return second[:1] if tiny else second


def _conv(n: int, c: int, h: int, w: int, tiny: bool) -> layers.Case:
    n, c, h, w = (min(n, 2), 16, 12, 12) if tiny else (n, c, h, w)
    return layers.Case(BATCH_1 if n == 1 else "3x3", n, c, c, h, w, 3)


def _pixels(tiny: bool) -> Iterator[Contest]:
    """3x3 layers of 56x56 maps, and of a street scene's, (H, W)."""
    shapes = [(32, c, 56, 56) for c in (256, 64, 128, 512)]
    shapes += [(1, 64, 400, 700), (1, 256, 200, 350), (256, 64, 56, 56)]
    for n, c, h, w in shapes:
        case = _conv(n, c, h, w, tiny)
        yield Contest("pixels", case.name, functools.partial(layers.measure, case))


def _channels(tiny: bool) -> Iterator[Contest]:
    kinds = {"half in, half out": {}, "half out": {"sides": "out"}, "widths of samples": {"kind": "widths"}}
    for group, options in kinds.items():
        for n, c, h in ((32, 128, 56), (32, 256, 28), (64, 64, 56)):
            case = channels.Case(group, dataclasses.replace(_conv(n, c, h, h, tiny), group=""), **options)
            name = f"{case.group}, {case.name}"
            yield Contest("channels", name, functools.partial(channels.measure, case))


def _samples(tiny: bool) -> Iterator[Contest]:
    for mode, n, c, h in (("replace", 64, 256, 56), ("residual", 256, 64, 56), ("residual", 64, 512, 28)):
        size, shares = ((4, 8, 8), SHARES[::2]) if tiny else ((n, c, h), SHARES)
        case = samples.Case(mode, *size, shares, ("plain",))
        yield Contest("samples", case.name, functools.partial(samples.measure, case))


def _blocks(tiny: bool) -> Iterator[Contest]:
    """SBNet's layers and blocks at its sizes, and a stack of two convolutions at a batch."""
    shapes = (
        ("SBNet 3x3", "3x3", stacks.conv3x3, 64, 400, 700, 1),
        ("SBNet 3x3", "3x3", stacks.conv3x3, 256, 100, 175, 1),
        ("SBNet bottleneck", "bottleneck", stacks.bottleneck, 512, 200, 350, 1),
        ("3x3, 3x3", "3x3, 3x3", stacks.chain, 128, 56, 56, 32),
    )
    for shape in shapes:
        case = stacks.Case(*shape, densities=(0.5, 0.25, 0.1))
        if tiny:
            case = dataclasses.replace(case, channels=8, h=32, w=32, block=8)
        yield Contest("blocks", case.name, functools.partial(stacks.measure, case))


def _models(tiny: bool) -> Iterator[Contest]:
    size, n = ((32, 32), 2) if tiny else ((224, 224), 64)

    def run(setting: Setting) -> list[Row]:
        setting = dataclasses.replace(setting, densities=(0.25,))
        return model.measure(size, setting, ("photo, 32x32 cells",), n)

    yield Contest("models", f"ResNet-50, batch {n}", run)


def _experts(tiny: bool) -> Iterator[Contest]:
    for layer in (experts.Layer(64, 32, 4, 2),) if tiny else experts.LAYERS:
        run = functools.partial(experts.plain_rows, layer, (1, 16) if tiny else TOKENS)
        yield Contest("experts", layer.name, run)
    yield Contest("experts", "one GEMM", functools.partial(experts.gemm_rows, TOKENS[2:]))


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
        break_even=False,
        variants=False,
        budget=Budget(0.3, 5, 30, 1, 1) if on_gpu else Budget(0.0, 2, 2, 1, 1),
        mask_kinds=("random", "square", "photo") if masks.has_photograph() else ("random", "square"),
        graph=on_gpu,
        roofline=_roofline(device, contest.dtype),
    )


def measure(
    contests: list[Contest], device: torch.device, seconds: float, write: Callable[[dict], None]
) -> int:
    """Runs contests while there is time, and writes ``{"begun"}``, ``{"row"}``, ``{"failed", "error"}``, ``{"done"}``
    and ``{"note", "of"}``. Returns the exit code: 0, or DEVICE_LOST.

    A contest may take twice an even share of the time that is left. One that hangs ends the process.
    """
    end = time.monotonic() + seconds
    for i, contest in enumerate(contests):
        left = end - time.monotonic()
        if left <= 0:
            break
        faulthandler.dump_traceback_later(max(2 * left / (len(contests) - i), LEAST), exit=True)
        _run(contest, device, write)
        faulthandler.cancel_dump_traceback_later()
        if not _settled(device):
            return DEVICE_LOST
    return 0


def _run(contest: Contest, device: torch.device, write: Callable[[dict], None]) -> None:
    write({"begun": contest.title})
    try:
        for row in contest.run(setting_of(contest, device)):
            write({"row": row.as_dict()})
        write({"note": str(_roofline(device, contest.dtype)), "of": str(contest.dtype)})
    except Exception as error:  # too little memory, a gap of a library, a bug of ours: the others still run
        traceback.print_exc()
        write({"failed": contest.title, "error": first_line(error)})
    write({"done": contest.title})


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
    parser.add_argument("--round", choices=ROUNDS, required=True)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=SUITES, help="only these")
    parser.add_argument("--seconds", type=float, default=600, help="no contest begins after these")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first ones")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, without a GPU on a CPU: a dry run, not a measurement"
    )
    args = parser.parse_args(arguments)
    on_cpu = args.tiny and not torch.cuda.device_count()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # the best dense is cuDNN's fastest algorithm, not its first guess
    contests = of_round(args.round, args.suite, args.tiny)[args.skip :]
    with args.out.open("a") as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        return measure(contests, device, args.seconds, write)


if __name__ == "__main__":
    raise SystemExit(main())
