"""Checks and measures dynops on the GPU that is there, in so many seconds and with nothing to download.

    python -m benchmarks.gpu check [--seconds 460] [--out DIR] [--only STAGE ...] [--suite NAME ...] [--no-compile] [--dry-run]

Stages, each a process of its own with a limit, so that neither a failure nor a hang in one stops the next:

    facts      the GPU, its clocks under load, versions, and if the binary that is there runs on it
    build      where it does not: in place, for this GPU alone
    values     of every op against float64 on the CPU
    headline   one contest of each suite
    compiled   the model against its compiled dense version
    second     the other contests, the suites in turns
    training   CUDA graphs, gradients and autocast of the layers

DIR (build/gpu-check) has the report, JSON and a table, written again after every contest, and logs.zip, after every stage.
``--dry-run`` goes through all of it on a CPU, with sizes that measure nothing. Where torch has a GPU, contests run there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import BEGUN, contests, junit, outcome
from .facts import NO_GPU
from .stages import FAILED, NOT_RUN, PASSED, Clock, Finished, Stage, run

ROOT = Path(__file__).parents[3]
SECONDS = 460.0  # with the start of a machine it ends within ten minutes
LIMITS = {"facts": 60.0, "build": 90.0}
# Of the time that is left, a stage has its share among those that are still to come.
SHARES = {"values": 90.0, "headline": 150.0, "compiled": 75.0, "second": 90.0, "training": 80.0}
START = 15.0  # seconds (or a third) that a process needs before its first contest, and that none begins before its end
LEAST = 5.0  # seconds for which a process is worth its start
REPORT = 2.0  # seconds for the last report
TESTS_AT_A_TIME = 12  # processes: Triton compiles a form on the host for a second or two, others use the GPU
# {file of tests/gpu: (-k, the parts of it that are processes)}
VALUES = {
    "ops": ("values", 3),
    "pixels": ("convolutions", 2),
    "channels": ("convolutions", 3),
    "experts": ("grouped_linear or mlp", 2),
    "blocks": ("tiles", 1),
    "samples": ("scattered", 1),
}
TRAINING = {"graphs": ("replays or waits or training", 4), "layers": ("gradients or autocast", 8)}
DRY_PARTS = 40  # of the first file, of which a dry run has one
NO_TIME = "no time was left"


@dataclass
class Check:
    """One run: the request, the time that is left, and what was found so far."""

    dry: bool
    clock: Clock
    out: Path  # for the report
    work: Path  # logs, and rows as they come
    suites: tuple[str, ...] = contests.SUITES
    facts: dict = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    coming: list[str] = field(default_factory=list)  # the stages from the present one on
    measured: outcome.Measured = field(default_factory=outcome.Measured)

    def limit(self) -> float:
        """Seconds for the stage that begins."""
        left = max(self.clock.left - REPORT, 0.0)
        if self.coming[0] in LIMITS:
            return min(LIMITS[self.coming[0]], left)
        return left * SHARES[self.coming[0]] / sum(SHARES[name] for name in self.coming)

    def python(
        self, arguments: list[str], seconds: float, log: str, watch=int, **environment: str
    ) -> Finished:
        """This interpreter from the root of the sources, whose programs (ninja) go before the system's."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # what one stage compiles the next finds, and the run after it too
        options = {"PATH": path, "PYTHONPATH": modules, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}
        if self.dry:
            options["OMP_NUM_THREADS"] = "1"  # tiny sizes, often beside other work
        command = [sys.executable, *arguments]
        return run(command, seconds, self.work / f"{log}.log", ROOT, watch, **options, **environment)

    def report(self) -> None:
        """Writes what there is so far; a fault of the report stops nothing that is measured."""
        try:
            outcome.write(self.facts, self.stages, self.measured, self.out, self.dry)
        except Exception:
            traceback.print_exc()

    def save_logs(self) -> None:
        """Writes one file, which is easy to copy from a remote machine."""
        shutil.move(
            shutil.make_archive(str(self.work.with_name("logs")), "zip", self.work), self.out / "logs.zip"
        )


# ------------------------------------------------------------------------------------------- stages


def facts(check: Check) -> tuple[str, str, dict]:
    file, limit = check.work / "facts.json", check.limit()
    arguments = ["-m", "benchmarks.gpu.check.facts", "--out", str(file), *(["--cpu"] if check.dry else [])]
    done = check.python(arguments, limit, "facts")
    if done.code == NO_GPU:
        raise SystemExit("there is no GPU that torch can use: --dry-run goes through the check on a CPU")
    if not done.ok:
        return FAILED, done.why(limit), {}
    check.facts = json.loads(file.read_text())
    return PASSED, outcome.facts_line(check.facts), {}


def build(check: Check) -> tuple[str, str, dict]:
    """Builds where no binary was carried here."""
    problem = check.facts.get("binary_problem", "the stage facts failed")
    if not problem:
        return PASSED, "the binary that is there", {}
    if check.dry:
        return NOT_RUN, f"dry run: {problem}", {}
    capability = check.facts.get("capability")
    if not capability:
        return FAILED, "the compute capability is not known: the stage facts failed", {}
    limit = check.limit()
    arguments = ["setup.py", "-q", "build_ext", "--force", "--inplace", "--build-temp", "build/gpu"]
    done = check.python(arguments, limit, "build", FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=capability)
    return (
        (PASSED if done.ok else FAILED),
        f"{problem}; " + (f"built for {capability}" if done.ok else done.why(limit)),
        {},
    )


def tests(check: Check, files: dict[str, tuple[str, int]]) -> tuple[str, str, dict]:
    """Runs tests of ``tests/gpu``, parts of the files side by side."""
    jobs = [
        (name, match, f"{part}/{parts}") for name, (match, parts) in files.items() for part in range(parts)
    ]
    if check.dry:
        jobs = [(*jobs[0][:2], f"0/{DRY_PARTS}")]
    limit = check.limit()

    def one(job: tuple[str, str, str]) -> junit.Counts:
        file, match, part = job
        name = f"{file}-{part.replace('/', '-of-')}"
        results = check.work / f"{name}.xml"
        results.unlink(missing_ok=True)
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        pytest += [f"tests/gpu/test_{file}.py", "-k", match, f"--part={part}"]
        return junit.read(results, name, check.python(pytest, limit, name), limit)

    with ThreadPoolExecutor(TESTS_AT_A_TIME) as pool:
        counts = junit.total(list(pool.map(one, jobs)))
    return PASSED if counts.passed and not counts.problems else FAILED, str(counts), counts.as_dict()


def contest(check: Check, name: str) -> tuple[str, str, dict]:
    """Runs a round in one process. Where a contest ends that process, a new one goes on after the contest."""
    clock, found = Clock(check.limit()), check.measured
    titles = [own.title for own in contests.of_round(name, check.suites, check.dry)]
    tried = 0
    while tried < len(titles) and clock.left > LEAST:
        file, limit = check.work / f"{name}-{tried}.jsonl", clock.left
        file.unlink(missing_ok=True)
        arguments = ["-m", "benchmarks.gpu.check.contests", "--round", name, "--out", str(file)]
        arguments += [f"--skip={tried}", f"--seconds={limit - min(START, limit / 3):.0f}"]
        arguments += ["--suite", *check.suites, *(["--tiny"] if check.dry else [])]

        def watch(file: Path = file) -> None:
            if found.read(file):
                check.report()

        done = check.python(arguments, limit, f"{name}-{tried}", watch)
        found.read(file)
        for title in found.begun - found.ended:
            found.failed.setdefault(title, done.why(limit))
        before, tried = tried, sum(title in found.begun for title in titles)
        if done.ok or done.timed_out:
            break
        if tried == before:
            found.failed[name] = done.why(limit)
            break
    left = titles[tried:]
    found.left += left
    failed = [title for title in (*titles, name) if title in found.failed]
    measured = max(tried - len(failed), 0)
    detail = f"{measured} of {len(titles)} contests measured, {len(failed)} failed, {len(left)} not run"
    result = FAILED if failed and len(failed) >= tried else PASSED if tried else NOT_RUN
    return result, detail, {}


STAGES = {
    "facts": facts,
    "build": build,
    "values": lambda check: tests(check, VALUES),
    **{name: lambda check, name=name: contest(check, name) for name in contests.ROUNDS},
    "training": lambda check: tests(check, TRAINING),
}


def perform(check: Check, names: list[str]) -> None:
    """Runs the stages in order, and writes the report and the logs after each. An exception of a stage is its failure."""
    for i, name in enumerate(names):
        print(f"-- {name}", flush=True)
        begun, check.coming = time.monotonic(), names[i:]
        try:
            result = STAGES[name](check) if check.limit() > 1 else (NOT_RUN, NO_TIME, {})
        except Exception as error:  # of the check itself: the others still run
            result = FAILED, f"{type(error).__name__}: {error}", {}
        check.stages.append(Stage(name, result[0], time.monotonic() - begun, *result[1:]))
        print(check.stages[-1], flush=True)
        check.report()
        check.save_logs()


def exit_code(stages: list[Stage], dry: bool) -> int:
    """1 where a stage failed, or the build or the values did not pass."""
    needed = ("values",) if dry else ("build", "values")
    bad = [s for s in stages if s.outcome == FAILED or (s.name in needed and s.outcome != PASSED)]
    return 1 if bad else 0


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.out is None:
        args.out = (
            Path(tempfile.mkdtemp(prefix="dynops-dry-run-")) if args.dry_run else ROOT / "build" / "gpu-check"
        )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        for made in (work, args.out):
            made.mkdir(parents=True, exist_ok=True)
        check = Check(args.dry_run, Clock(args.seconds, BEGUN), args.out, work, tuple(args.suite))
        perform(check, _names(args))
    print("", outcome.text(check.stages, check.measured, check.dry), sep="\n")
    print(f"wrote {args.out}")
    return exit_code(check.stages, check.dry)


def _names(args: argparse.Namespace) -> list[str]:
    """The stages that are asked for; the first two always are."""
    wanted = {"facts", "build", *(args.only or STAGES)} - ({"compiled"} if args.no_compile else set())
    return [name for name in STAGES if name in wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together (460)")
    parser.add_argument("--out", type=Path, help="folder for the report and the logs (build/gpu-check)")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=contests.SUITES,
        default=contests.SUITES,
        metavar="NAME",
        help=f"contests of {', '.join(contests.SUITES)} (all)",
    )
    parser.add_argument("--no-compile", action="store_true", help="without the stage compiled")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; measures nothing")
    return parser
