"""The check of a GPU: all of it on a CPU in a dry run, and what it makes of failures that a first day on a GPU may bring."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, SETTING, briefly, make_row  # noqa: F401
from spread import part_of

from benchmarks.gpu.check import check, contests, facts, junit, outcome, sanitizer
from benchmarks.gpu.check.stages import FAILED, NOT_RUN, PASSED, Clock, Finished, Stage, run
from benchmarks.harness import compare as comparing
from benchmarks.harness import replay
from benchmarks.harness.compare import compare
from benchmarks.harness.report import Report
from dynops import backends

needs_binary = pytest.mark.skipif(not backends.has_binary(), reason="dynops._C is not built")


def finished(text: str = "", code: int = 0, timed_out: bool = False) -> Finished:
    return Finished(code, timed_out, 1.0, text)


@needs_binary
def test_dry_run_goes_through_every_stage_and_writes_no_measurement(tmp_path):
    before = {path.name for path in check.RESULTS.iterdir()}
    command = [sys.executable, "-m", "benchmarks.gpu", "check", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.load(tmp_path / "dry-run-on-a-cpu.json")
    assert (
        outcome.DRY in report.machine["device"] and outcome.DRY in report.notes and outcome.DRY in done.stdout
    )
    stages = {stage["name"]: stage for stage in report.checks["stages"]}
    assert list(stages) == ["facts", "build", "tests", "sanitizer", "benchmark"]
    assert {name: s["outcome"] for name, s in stages.items() if name != "build"} == dict.fromkeys(
        ("facts", "tests", "sanitizer", "benchmark"), PASSED
    )
    assert stages["tests"]["values"]["passed"] > 0
    assert stages["benchmark"]["values"]["failed"] == {} and stages["benchmark"]["values"]["not run"] == []
    assert {row.suite for row in report.rows} >= {"layers", "channels", "samples", "blocks", "experts"}
    assert all(row.roofline_ms > 0 for row in report.rows if row.suite != "models")
    assert "roofline" in done.stdout and "realised: median" in done.stdout
    assert {path.name for path in check.RESULTS.iterdir()} == before


def test_refuses_to_measure_without_a_gpu_and_to_write_a_dry_run_beside_measurements(monkeypatch):
    monkeypatch.setattr(check, "_has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        check.main([])
    with pytest.raises(SystemExit, match="another folder"):
        check.main(["--dry-run", "--out", str(check.RESULTS)])


def test_a_command_that_hangs_is_interrupted_and_then_killed_with_its_children(tmp_path):
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.gpu.check.stages.GRACE", 0.5)
        done = run([sys.executable, "stubborn.py"], 3.0, tmp_path / "log", tmp_path)
    assert done.timed_out and not done.ok and done.seconds < 20
    child, said = done.text.split()
    assert said == "interrupted" and "no end within 3 s: interrupted" in done.why(3.0)
    time.sleep(0.2)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_a_program_that_is_missing_is_no_exception(tmp_path):
    done = run(["/no/such/program"], 1.0, tmp_path / "log", tmp_path)
    assert done.code == 127 and "/no/such/program" in done.why(1.0)


def test_a_stage_that_raises_or_has_no_time_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("a bug")

    stages = {"facts": broken, "build": lambda _: (PASSED, "", {}), "benchmark": lambda _: (PASSED, "", {})}
    monkeypatch.setattr(check, "STAGES", stages)
    some = check.Check(False, Clock(check.FOR_THE_BENCHMARK - 1), tmp_path)
    found = check.perform(some, ["facts", "build", "benchmark"])
    assert [stage.outcome for stage in found] == [FAILED, NOT_RUN, PASSED]
    assert found[0].detail == "ValueError: a bug" and found[1].detail == check.NO_TIME


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"build": PASSED, "tests": PASSED, "sanitizer": NOT_RUN, "benchmark": PASSED}, 0),
        ({"build": PASSED, "tests": FAILED, "benchmark": PASSED}, 1),
        ({"build": FAILED, "tests": PASSED}, 1),
        ({"build": PASSED, "tests": NOT_RUN}, 1),  # what did not run proves nothing
        ({"build": PASSED, "tests": PASSED, "sanitizer": FAILED}, 1),
        ({"benchmark": PASSED}, 0),
    ],
)
def test_exit_code(outcomes, code):
    assert check.exit_code([Stage(name, o, 1.0) for name, o in outcomes.items()], dry=False) == code


def test_pytest_is_counted_with_its_failures_and_with_what_it_did_not_finish(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="t" name="good"/>'
        '<testcase classname="t" name="bad"><failure message="AssertionError: 1 != 2&#10;more"/></testcase>'
        '<testcase classname="t" name="hard"><error message="CUDA error"/></testcase>'
        '<testcase classname="t" name="none"><skipped message="needs two GPUs"/></testcase></testsuite></testsuites>'
    )
    counts = junit.read(file, "t", finished(code=1), 9.0)
    assert (counts.passed, counts.skipped) == (1, 1)
    assert counts.problems == {"t::bad": "AssertionError: 1 != 2", "t::hard": "CUDA error"}
    assert "1 passed, 1 skipped, 2 failed" in str(counts)
    crashed = junit.read(tmp_path / "none.xml", "crash", finished("Fatal error", -6), 9.0)
    assert crashed.problems == {"crash": "exit code -6: Fatal error"}
    assert (
        "no end within 9 s"
        in junit.read(tmp_path / "none.xml", "slow", finished("", -2, True), 9.0).problems["slow"]
    )
    assert not junit.read(
        tmp_path / "none.xml", "empty", finished(code=junit.NOTHING_COLLECTED), 9.0
    ).problems
    assert junit.total([counts, crashed]).passed == 1 and len(junit.total([counts, crashed]).problems) == 3


def test_rows_survive_a_process_that_dies_and_the_next_one_goes_on(tmp_path):
    titles = [contest.title for contest in contests.in_order(tiny=True)]

    starts = []

    class Fake(check.Check):
        def python(self, arguments, seconds, log, **environment):
            first = int(arguments[arguments.index("--skip") + 1])
            starts.append(first)
            lines = [
                {"begun": titles[first]},
                {"row": make_row().as_dict()},
                {"done": titles[first], "seconds": 1},
            ]
            if first == 0:
                lines += [{"begun": titles[1]}, {"failed": titles[1], "error": "OutOfMemoryError: 9 GB"}]
                lines += [{"done": titles[1], "seconds": 1}, {"begun": titles[2]}]
            text = "\n".join(map(json.dumps, lines)) + '\n{"row": {"cut of'
            Path(arguments[arguments.index("--out") + 1]).write_text(text)
            return finished("CUDA error: an illegal memory access", -6) if first == 0 else finished()

    some = Fake(True, Clock(500), tmp_path)
    result, detail, problems = check.benchmark(some)
    assert starts == [0, 3] and result == PASSED and len(some.measured.rows) == 2
    assert problems["failed"][titles[1]] == "OutOfMemoryError: 9 GB"
    assert "illegal memory access" in problems["failed"][titles[2]]
    assert problems["not run"] == titles[4:] and detail.startswith("2 rows, 2 contests failed")


def test_a_check_without_the_benchmark_keeps_what_was_measured(tmp_path, capsys):
    (tmp_path / "nvidia-h200.json").write_text("measured")
    found = {"gpu": "NVIDIA H200", "versions": {}, "ceilings": {}}
    outcome.finish(found, [Stage("tests", PASSED, 1.0)], outcome.Measured(), tmp_path, dry=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["measured"]
    assert "tests: passed" in capsys.readouterr().out


def test_a_benchmark_that_never_begins_fails_once(tmp_path):
    some = check.Check(True, Clock(500), tmp_path)
    some.python = lambda *_, **__: finished("ImportError: libcudart", 1)
    result, _, problems = check.benchmark(some)
    assert result == FAILED and problems["failed"] == {"all": "exit code 1: ImportError: libcudart"}


def test_a_contest_that_fails_leaves_the_others_and_each_suite_has_its_share():
    lines = []

    def fails(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = [contests.Contest("pixels", "a", fails), contests.Contest("pixels", "b", lambda _: [make_row()])]
    made += [contests.Contest("models", "c", lambda _: [make_row(suite="experts")])]
    assert contests.measure(made, CPU, 60, lines.append) == 0
    kinds = [next(iter(line)) for line in lines]
    assert kinds == ["begun", "failed", "done", "begun", "row", "done", "begun", "row", "done", "note"]
    assert lines[1]["error"] == "OutOfMemoryError: CUDA out of memory"
    lines.clear()
    assert contests.measure(made, CPU, -1, lines.append) == 0 and not lines


def test_contests_have_names_of_their_own_and_every_suite_has_some():
    for tiny in (False, True):
        found = contests.in_order(tiny)
        assert len({contest.title for contest in found}) == len(found)
        assert list(dict.fromkeys(contest.suite for contest in found)) == list(contests.SUITES)


class Replays:
    """``replay.captured`` on a CPU: what a replay returns, and how it fails."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(replay, "captured", self.capture)

    @staticmethod
    def capture(call):
        if getattr(call, "waits", False):
            raise RuntimeError("operation not permitted when stream is capturing")
        return call


def spinning(seconds: float, value: float = 1.0):
    def call():
        time.sleep(seconds)
        return torch.full((3,), value)

    return call


def test_replays_count_where_they_are_faster_and_compute_the_same(monkeypatch):
    Replays(monkeypatch)
    waits = spinning(0.001)
    waits.waits = True

    def lacks():
        raise RuntimeError("no kernel for NCHW")

    dense = {"NCHW": lacks, "channels_last": spinning(0.004)}
    ours = {key: spinning(0.008) for key in ("fast", "waits", "wrong")}
    replays = {"fast": spinning(0.001), "waits": waits, "wrong": spinning(0.001, value=7.0)}
    setting = dataclasses.replace(SETTING, graph=True)
    found = compare(dense, ours, setting, replays=replays)
    what = {"suite": "layers", "group": "", "case": "", "mask": "", "density": 1.0, "variant": "plain"}
    rows = {key: found.row(key, **what) for key in ours}
    assert rows["fast"].dense_name == "channels_last" and rows["fast"].ours_name == comparing.GRAPH
    assert rows["fast"].ours_ms < rows["fast"].dense_ms < rows["waits"].ours_ms
    assert set(rows["fast"].ours_all) == {comparing.EAGER, comparing.GRAPH}
    assert list(rows["waits"].ours_all) == list(rows["wrong"].ours_all) == [comparing.EAGER]
    assert rows["fast"].failed == found.failed and set(found.failed) == {
        "NCHW",
        "ours waits, graph",
        "ours wrong, graph",
    }
    assert "capturing" in found.failed["ours waits, graph"] and "differs" in found.failed["ours wrong, graph"]
    with pytest.raises(RuntimeError, match="nothing to compare"):
        compare({"NCHW": lacks}, ours, setting, replays=replays)


@needs_binary
@pytest.mark.parametrize("suite", ["pixels", "experts", "channels", "blocks"])
def test_contests_with_replays_of_both_sides(monkeypatch, suite):
    Replays(monkeypatch)
    contest = next(contest for contest in contests.in_order(tiny=True) if contest.suite == suite)
    rows = contest.run(dataclasses.replace(contests.setting_of(contest, CPU), graph=True))
    assert rows
    for row in rows:
        assert set(row.ours_all) == {comparing.EAGER, comparing.GRAPH} and row.failed == {}
        assert row.ours_ms == row.ours_all[row.ours_name] == min(row.ours_all.values())
        assert suite != "experts" or set(row.dense_all) == {"torch grouped_mm", "loop"}


def test_difference_of_two_results():
    x = torch.randn(5, 7)
    assert replay.difference((x, x), (x, x)) == 0 and replay.difference(x * 1.5, x) == pytest.approx(
        0.5, rel=1e-5
    )
    assert replay.difference(x.masked_fill(x > 0, float("nan")), x) == float("inf")


def test_facts_leave_out_what_a_driver_does_not_know(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *vbios*|*clocks_throttle*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'case "$*" in *=name,*) exit 2;; *=name*) echo "A GPU";; *=clocks.sm*) echo "1980 MHz";;\n'
        '*mig*) echo "[N/A]";; *) echo "[Not Supported]";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert facts.nvidia_smi() == {"name": "A GPU", "clocks.sm": "1980 MHz"}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert facts.nvidia_smi() == {}


@needs_binary
def test_the_script_of_the_sanitizer_sees_a_kernel_that_is_wrong():
    call = next(sanitizer.calls())
    call.check(CPU)
    spoiled = sanitizer.Call("spoiled", lambda *a: call.op(*a) + 1, call.reference, call.arguments)
    with pytest.raises(AssertionError, match="spoiled, result 0"):
        spoiled.check(CPU)


def test_the_script_of_the_sanitizer_calls_every_cuda_kernel():
    sources = "".join(path.read_text() for path in (check.ROOT / "csrc" / "cuda").glob("*.cu"))
    registered = {line.split('"')[1] for line in sources.splitlines() if "impl(" in line and '"' in line}
    registered = {name.removeprefix("cuda_") for name in registered}
    called = {call.op._qualified_op_name.partition("::")[2] for call in sanitizer.calls()}
    assert registered - called == set()


def test_verdict_of_the_sanitizer():
    done = f"9 calls: {sanitizer.DONE}\n"
    assert sanitizer.verdict(finished(f"{done}== ERROR SUMMARY: 0 errors"), 9.0)[0] == PASSED
    assert sanitizer.verdict(finished(f"{done}== RACECHECK SUMMARY: 0 hazards displayed"), 9.0)[0] == PASSED
    found = sanitizer.verdict(finished(f"{done}== ERROR SUMMARY: 3 errors", 9), 9.0)
    assert found == (FAILED, "3 found")
    ended = "== Invalid __global__ write of size 4 bytes\nRuntimeError: unspecified launch failure\n"
    assert sanitizer.verdict(finished(f"{ended}== ERROR SUMMARY: 2 errors", 9), 9.0) == (FAILED, "2 found")
    refused = sanitizer.verdict(finished("== Error: Device not supported\n== ERROR SUMMARY: 1 error", 9), 9.0)
    assert refused[0] == NOT_RUN and "could not run" in refused[1]


def test_everything_measured_is_printed_and_written(tmp_path, capsys):
    expert = make_row(suite="experts", case="H 8", tokens=128, weights="bfloat16", roofline_ms=0.5)
    measured = outcome.Measured([make_row(roofline_ms=1.5), make_row(case="unknown"), expert])
    found = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11"}, "ceilings": {"half": 1e15}}
    outcome.finish(found, [Stage("benchmark", PASSED, 1.0)], measured, tmp_path, dry=False)
    printed = capsys.readouterr().out
    known, unknown = (line.split() for line in printed.splitlines() if line.startswith(("a ", "unknown ")))
    assert known[-3:] == ["0.75", "1000", "0.75"] and unknown[-1] == "1000"
    assert (
        "layers, 3x3, float32" in printed
        and "H 8" in printed
        and "128" in printed
        and "benchmark: passed" in printed
    )
    loaded = Report.load(tmp_path / "nvidia-h200.json")
    assert loaded.machine["device"] == "NVIDIA H200" and loaded.machine["ceilings"] == {"half": 1e15}
    assert loaded.rows == measured.rows and loaded.checks["stages"][0]["outcome"] == PASSED


def test_the_gpus_tests_are_found_wherever_they_lie(tmp_path):
    calls = []
    some = check.Check(False, Clock(500), tmp_path)
    some.python = lambda arguments, *_, **__: (
        calls.append(arguments) or finished(code=junit.NOTHING_COLLECTED)
    )
    check.tests(some)
    files = {argument for arguments in calls for argument in arguments if argument.endswith(".py")}
    assert "tests/gpu/test_pixels.py" in files and len(calls) == check.TEST_PARTS * len(files)
    logs = [a for arguments in calls for a in arguments if a.startswith("--junitxml")]
    assert len(set(logs)) == len(logs)  # files of one name in two folders


@pytest.mark.parametrize("tests", [0, 1, 2, 3, 7, 100])
def test_parts_have_every_test_once(tests):
    """The tests that ``--part`` leaves of a file, over all the parts that the check runs."""
    found = []
    for part in range(check.TEST_PARTS):
        found += part_of(list(range(tests)), f"{part}/{check.TEST_PARTS}")
    assert found == list(range(tests))
