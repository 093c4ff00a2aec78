"""Builds, tests and measures dynops on the GPU that is there, in under ten minutes and with nothing to download.

    python -m benchmarks.gpu check [--out DIR] [--tune [SECONDS]] [--only STAGE ...] [--dry-run]

Stages, each a process of its own with a time limit, so that neither a failure nor a hang in one stops the next: facts, build
(in place, for this GPU alone), tests, sanitizer, tune (where asked for), benchmark. Then one table
of all rows, and a summary of each group. Logs lie in build/gpu-check. ``--dry-run`` goes through all of it on a CPU, with sizes that
measure nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import dynops

from . import contests, junit, outcome, sanitizer
from .stages import FAILED, NOT_RUN, PASSED, Clock, Finished, Stage, run

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 570.0  # of all stages but tune
FOR_THE_BENCHMARK = 200.0  # that no stage before it may use
LIMITS = {"facts": 60.0, "build": 150.0, "tests": 180.0, "sanitizer": 90.0}
TESTS_AT_A_TIME = 12  # processes: Triton compiles a form on the host for a second or two, others use the GPU
TEST_PARTS = 3  # of each file
DRY_TESTS = ("tests/plans/test_plans.py", "-k", "capacity")  # a handful
NO_TIME = "no time was left"


@dataclass
class Check:
    """One run: the request, the time that is left, and the facts and rows so far."""

    dry: bool
    clock: Clock
    work: Path  # logs and partial results
    tune_seconds: float = 0.0
    facts: dict = field(default_factory=dict)
    measured: outcome.Measured = field(default_factory=outcome.Measured)

    def limit(self, stage: str) -> float:
        return min(LIMITS[stage], max(self.clock.left - FOR_THE_BENCHMARK, 0.0))

    def python(self, arguments: list[str], seconds: float, log: str, **environment: str) -> Finished:
        """This interpreter from the root of the sources, whose programs (ninja) go before the system's."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        options = {"PATH": path, "PYTHONPATH": modules, **environment}
        if self.dry:
            options["OMP_NUM_THREADS"] = "1"  # tiny sizes, often beside other work
        return run([sys.executable, *arguments], seconds, self.work / f"{log}.log", ROOT, **options)


# ------------------------------------------------------------------------------------------- stages


def facts(check: Check) -> tuple[str, str, dict]:
    file = check.work / "facts.json"
    arguments = ["-m", "benchmarks.gpu.check.facts", "--out", str(file), *(["--cpu"] if check.dry else [])]
    done = check.python(arguments, LIMITS["facts"], "facts")
    if not done.ok:
        return FAILED, done.why(LIMITS["facts"]), {}
    check.facts = json.loads(file.read_text())
    return PASSED, outcome.facts_line(check.facts), {}


def build(check: Check) -> tuple[str, str, dict]:
    if check.dry:
        what = "the binary is there" if dynops.backends.has_binary() else "there is no binary"
        return NOT_RUN, f"dry run: {what}", {}
    capability = check.facts.get("capability")
    if not capability:
        return FAILED, "the compute capability is not known: the stage facts failed", {}
    limit = check.limit("build")
    arguments = ["setup.py", "-q", "build_ext", "--force", "--inplace", "--build-temp", "build/gpu"]
    done = check.python(arguments, limit, "build", FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=capability)
    return (PASSED, f"for {capability}", {}) if done.ok else (FAILED, done.why(limit), {})


def tests(check: Check) -> tuple[str, str, dict]:
    """Runs every test that is marked ``gpu``, parts of the files side by side."""
    if check.dry:
        jobs = {"dry": list(DRY_TESTS)}
    else:
        files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
        jobs = {
            f"{path.parent.name}-{path.stem}-{part}": [
                str(path.relative_to(ROOT)),
                "-m",
                "gpu",
                f"--part={part}/{TEST_PARTS}",
            ]
            for path in files
            for part in range(TEST_PARTS)
        }
    limit = check.limit("tests")

    def one(job: tuple[str, list[str]]) -> junit.Counts:
        name, arguments = job
        file = check.work / f"{name}.xml"
        file.unlink(missing_ok=True)
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *arguments]
        done = check.python(pytest, limit, f"tests-{name}")
        return junit.read(file, name, done, limit)

    with ThreadPoolExecutor(TESTS_AT_A_TIME) as pool:
        counts = junit.total(list(pool.map(one, jobs.items())))
    return PASSED if counts.passed and not counts.problems else FAILED, str(counts), counts.as_dict()


def sanitize(check: Check) -> tuple[str, str, dict]:
    limit, device = check.limit("sanitizer"), "cpu" if check.dry else "cuda"
    begun = Clock(limit)
    plain = check.python(
        ["-m", "benchmarks.gpu.check.sanitizer", "--device", device], limit, "sanitizer-none"
    )
    if not plain.ok:
        return FAILED, f"without a sanitizer: {plain.why(limit)}", {"none": plain.text[-2000:]}
    alone = plain.text.strip().splitlines()[-1]
    program = sanitizer.compute_sanitizer()
    if check.dry or program is None:
        why = "dry run" if check.dry else "compute-sanitizer is not installed"
        return PASSED if check.dry else NOT_RUN, f"{alone}; {why}, without a sanitizer", {}
    left = begun.left

    def one(tool: str) -> tuple[str, str]:
        command = sanitizer.command(program, tool, sys.executable)
        environment = {**sanitizer.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        return sanitizer.verdict(
            run(command, left, check.work / f"sanitizer-{tool}.log", ROOT, **environment), left
        )

    with ThreadPoolExecutor() as pool:
        found = dict(zip(sanitizer.TOOLS, pool.map(one, sanitizer.TOOLS), strict=True))
    outcomes = [result for result, _ in found.values()]
    worst = FAILED if FAILED in outcomes else NOT_RUN if NOT_RUN in outcomes else PASSED
    detail = "; ".join(f"{tool}: {text}" for tool, (_, text) in found.items())
    return worst, f"{alone}; {detail}", {tool: result for tool, (result, _) in found.items()}


def tune(check: Check) -> tuple[str, str, dict]:
    seconds = check.tune_seconds
    arguments = ["-m", "benchmarks.gpu", "tune", "--seconds", f"{seconds:.0f}"]
    arguments += ["--dry-run", "--out", str(check.work / "configs")] if check.dry else []
    done = check.python(arguments, seconds + 60, "tune")
    check.clock.end += done.seconds  # beside the budget of the others
    return (PASSED, f"{seconds:.0f} s", {}) if done.ok else (FAILED, done.why(seconds + 60), {})


def benchmark(check: Check) -> tuple[str, str, dict]:
    """Runs the contests in one process. Where a contest ends that process, a new one goes on after the contest."""
    titles = [contest.title for contest in contests.in_order(check.dry)]
    found, tried, first = check.measured, set(), 0
    while first < len(titles) and check.clock.left > outcome.START:
        file, limit = check.work / f"contests-{first}.jsonl", check.clock.left
        file.unlink(missing_ok=True)
        arguments = ["-m", "benchmarks.gpu.check.contests", "--out", str(file), "--skip", str(first)]
        arguments += [f"--seconds={limit - outcome.START:.0f}", *(["--tiny"] if check.dry else [])]
        done = check.python(arguments, limit, f"contests-{first}")
        begun = found.read(file, done, limit)
        tried |= set(begun)
        if done.ok or done.timed_out:
            break
        if not begun:
            found.failed["all"] = done.why(limit)
            break
        first = titles.index(begun[-1]) + 1
    found.left = [title for title in titles if title not in tried]
    rows = len(found.rows)
    detail = f"{rows} rows, {len(found.failed)} contests failed, {len(found.left)} not run"
    return PASSED if rows else FAILED, detail, found.problems()


STAGES = {
    "facts": facts,
    "build": build,
    "tests": tests,
    "sanitizer": sanitize,
    "tune": tune,
    "benchmark": benchmark,
}


def perform(check: Check, names: list[str]) -> list[Stage]:
    """Runs the stages in order. An exception of a stage is its failure."""
    found = []
    for name in names:
        print(f"-- {name}", flush=True)
        begun = time.monotonic()
        late = check.clock.left <= 0 or (name in LIMITS and name != "facts" and check.limit(name) <= 0)
        try:
            result = (NOT_RUN, NO_TIME, {}) if late else STAGES[name](check)
        except Exception as error:  # of the check itself: the report is still written
            result = FAILED, f"{type(error).__name__}: {error}", {}
        found.append(Stage(name, result[0], time.monotonic() - begun, *result[1:]))
        print(found[-1], flush=True)
    return found


def exit_code(stages: list[Stage], dry: bool) -> int:
    """1 where a stage failed, or the build or the tests did not pass."""
    needed = ("tests",) if dry else ("build", "tests")
    bad = [s for s in stages if s.outcome == FAILED or (s.name in needed and s.outcome != PASSED)]
    return 1 if bad else 0


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    dry = args.dry_run
    if not dry and not _has_gpu():
        raise SystemExit("there is no GPU that torch can use: --dry-run goes through the check on a CPU")
    if dry and args.out and args.out.resolve() == RESULTS:
        raise SystemExit("--out: expected another folder than that of the measurements for a dry run")
    out = args.out or (Path(tempfile.mkdtemp(prefix="dynops-dry-run-")) if dry else RESULTS)
    work = out / "logs" if dry else ROOT / "build" / "gpu-check"
    work.mkdir(parents=True, exist_ok=True)
    check = Check(dry, Clock(args.seconds), work, args.tune or 0.0)
    names = [name for name in args.only or STAGES if name != "tune" or args.tune]
    if "facts" not in names:
        names.insert(0, "facts")
    stages = perform(check, names)
    outcome.finish(check.facts, stages, check.measured, out, dry)
    return exit_code(stages, dry)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and CSV (benchmarks/results)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages but tune (570)")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument(
        "--tune",
        type=float,
        nargs="?",
        const=240.0,
        metavar="SECONDS",
        help="first search tiles for this GPU (240 s), which are then built in: dynops/kernels/configs",
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; measures nothing")
    return parser


def _has_gpu() -> bool:
    """Asked in a process of its own: this one holds no memory of the GPU and outlives one that is lost."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        return run([sys.executable, "-c", code], 60, Path(folder) / "log", ROOT).ok
