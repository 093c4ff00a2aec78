"""The check of a GPU: all of it on a CPU in a dry run, and what it makes of failures that a first day on a GPU may bring."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, SETTING, briefly, make_row  # noqa: F401
from spread import part_of

from benchmarks.gpu.check import check, contests, facts, junit, outcome
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
@pytest.mark.slow  # 50 s: the stages by themselves are tested below
def test_dry_run_goes_through_every_stage_and_writes_no_measurement(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "check", "--dry-run", "--seconds", "240"]
    command += ["--suite", "pixels", "models", "--out", str(tmp_path)]  # the contests of the others run below
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.load(tmp_path / "dry-run-on-a-cpu.json")
    assert (
        outcome.DRY in report.machine["device"] and outcome.DRY in report.notes and outcome.DRY in done.stdout
    )
    stages = {stage["name"]: stage for stage in report.checks["stages"]}
    assert {name: stage["outcome"] for name, stage in stages.items()} == dict.fromkeys(check.STAGES, PASSED)
    assert stages["values"]["values"]["passed"] > 0 and stages["training"]["values"]["passed"] > 0
    assert report.checks["failed"] == {} and report.checks["not run"] == []
    assert {row.suite for row in report.rows} == {"layers", "models"}
    assert all(row.roofline_ms > 0 for row in report.rows if row.suite != "models")
    table = (tmp_path / "dry-run-on-a-cpu.txt").read_text()
    assert table in done.stdout and "roofline" in table and "realised: median" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dry-run-on-a-cpu.json",
        "dry-run-on-a-cpu.txt",
        "logs.zip",
    ]


def test_refuses_to_measure_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "BEGUN", time.monotonic())
    monkeypatch.setattr(check, "run", lambda *_, **__: finished(code=facts.NO_GPU))
    with pytest.raises(SystemExit, match="there is no GPU"):
        check.main(["--out", str(tmp_path)])


def test_a_command_that_hangs_is_killed_with_its_children_within_its_limit(tmp_path):
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    watched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.gpu.check.stages.GRACE", 0.5)
        command = [sys.executable, "stubborn.py"]
        done = run(command, 3.0, tmp_path / "log", tmp_path, lambda: watched.append(1))
    assert done.timed_out and not done.ok and 2.5 < done.seconds < 4 and len(watched) >= 2
    child, said = done.text.split()
    assert said == "interrupted" and "no end within 3 s: interrupted" in done.why(3.0)
    time.sleep(0.2)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_a_program_that_is_missing_is_no_exception(tmp_path):
    done = run(["/no/such/program"], 1.0, tmp_path / "log", tmp_path)
    assert done.code == 127 and "/no/such/program" in done.why(1.0)


def a_check(
    tmp_path, seconds: float = 500.0, coming: tuple[str, ...] = ("headline",), **values
) -> check.Check:
    (tmp_path / "work").mkdir()
    return check.Check(False, Clock(seconds), tmp_path, tmp_path / "work", coming=list(coming), **values)


def test_a_stage_that_raises_does_not_stop_the_next_and_none_begins_too_late(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("a bug")

    def late(some):
        some.clock = Clock(0)
        return PASSED, "", {}

    stages = {"facts": broken, "build": late, "headline": lambda _: (PASSED, "", {})}
    monkeypatch.setattr(check, "STAGES", stages)
    some = a_check(tmp_path)
    check.perform(some, list(stages))
    assert [stage.outcome for stage in some.stages] == [FAILED, PASSED, NOT_RUN]
    assert some.stages[0].detail == "ValueError: a bug" and some.stages[2].detail == check.NO_TIME
    written = Report.load(tmp_path / "unknown-gpu.json").checks["stages"]
    assert [stage["name"] for stage in written] == list(stages)


def test_stages_share_the_time_that_is_left(tmp_path):
    some = a_check(tmp_path, 460.0, tuple(check.STAGES))
    plan = dict.fromkeys(some.coming, 0.0)
    for name in list(plan):  # each takes all that it may
        plan[name] = some.limit()
        some.clock.end -= plan[name]
        some.coming.pop(0)
    assert (plan["facts"], plan["build"]) == (60, 90) and plan["headline"] > 90
    assert 0 < some.clock.left <= check.REPORT and sum(plan.values()) <= 460


def test_what_is_asked_for_keeps_the_facts_and_the_build():
    def names(*arguments: str) -> list[str]:
        return check._names(check._parser().parse_args(arguments))

    assert names("--only", "headline") == ["facts", "build", "headline"]
    assert names("--no-compile") == [name for name in check.STAGES if name != "compiled"]


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"build": PASSED, "values": PASSED, "second": NOT_RUN}, 0),
        ({"build": PASSED, "values": FAILED, "headline": PASSED}, 1),
        ({"build": FAILED, "values": PASSED}, 1),
        ({"build": PASSED, "values": NOT_RUN}, 1),  # what did not run proves nothing
        ({"headline": PASSED}, 0),
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
    titles = [contest.title for contest in contests.of_round("headline")]
    starts, reported = [], []

    class Fake(check.Check):
        def python(self, arguments, seconds, log, watch=int, **environment):
            first = int(next(a for a in arguments if "--skip" in a).partition("=")[2])
            starts.append(first)
            lines = [{"begun": titles[first]}, {"row": make_row(case=log).as_dict()}, {"done": titles[first]}]
            if first == 0:
                lines += [{"begun": titles[1]}, {"failed": titles[1], "error": "OutOfMemoryError: 9 GB"}]
                lines += [{"done": titles[1]}, {"begun": titles[2]}]
            text = "\n".join(map(json.dumps, lines)) + '\n{"row": {"cut of'
            Path(arguments[arguments.index("--out") + 1]).write_text(text)
            watch()
            watch()
            reported.append(len(Report.load(tmp_path / "unknown-gpu.json").rows))
            return finished("CUDA error: an illegal memory access", -6) if first == 0 else finished()

    (tmp_path / "work").mkdir()
    some = Fake(False, Clock(500), tmp_path, tmp_path / "work", coming=["headline"])
    result, detail, _ = check.contest(some, "headline")
    problems = some.measured.problems()
    assert starts == [0, 3] and result == PASSED and reported == [1, 2]  # in the report while they run
    assert problems["failed"][titles[1]] == "OutOfMemoryError: 9 GB"
    assert "illegal memory access" in problems["failed"][titles[2]]
    assert problems["not run"] == titles[4:] and detail == "2 of 6 contests measured, 2 failed, 2 not run"


def test_a_round_that_never_begins_fails_once_and_one_without_contests_is_not_run(tmp_path):
    some = a_check(tmp_path)
    some.python = lambda *_, **__: finished("ImportError: libcudart", 1)
    assert check.contest(some, "headline")[0] == FAILED
    assert some.measured.failed == {"headline": "exit code 1: ImportError: libcudart"}
    some.suites = ("pixels",)
    assert check.contest(some, "compiled")[0] == NOT_RUN


def test_a_contest_that_fails_keeps_its_rows_and_leaves_the_others():
    lines = []

    def fails(_):
        yield make_row()
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = [contests.Contest("pixels", "a", fails), contests.Contest("pixels", "b", lambda _: [make_row()])]
    assert contests.measure(made, CPU, 60, lines.append) == 0
    kinds = [next(iter(line)) for line in lines]
    assert kinds == ["begun", "row", "failed", "done", "begun", "row", "note", "done"]
    assert lines[2]["error"] == "OutOfMemoryError: CUDA out of memory"
    lines.clear()
    assert contests.measure(made, CPU, -1, lines.append) == 0 and not lines


def test_rounds_have_every_suite_in_turns_and_names_of_their_own():
    headline, compiled, second = (contests.of_round(name) for name in contests.ROUNDS)
    assert [contest.suite for contest in headline] == list(contests.SUITES)
    assert [(contest.suite, contest.compiled) for contest in compiled] == [("models", True)]
    turns = [contest.suite for contest in second]
    assert turns[:5] == turns[5:10] == list(contests.SUITES[:5]) and turns[-1] == "channels"
    titles = [contest.title for contest in (*headline, *compiled, *second)]
    assert len(set(titles)) == len(titles)
    assert {contest.suite for contest in contests.of_round("second", ("blocks",))} == {"blocks"}


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


class Graph:
    """CUDA graphs on a CPU: ``begun`` counts the captures, in which and before which ``mode`` holds."""

    begun, mode = 0, "default"

    def capture_begin(self, pool, capture_error_mode):
        Graph.begun += 1

    def capture_end(self):
        pass

    def replay(self):
        pass


def test_what_waits_for_the_device_is_never_captured(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=id, synchronize=int)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph}
    fakes |= {"stream": lambda _: contextlib.nullcontext(), "get_sync_debug_mode": lambda: Graph.mode}
    fakes["set_sync_debug_mode"] = lambda mode: setattr(Graph, "mode", mode)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def waits():
        if Graph.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    failed = {}
    assert replay.captured_or(waits, "loop", failed) is None and Graph.begun == 0
    assert "waits for the device" in failed["loop"] and Graph.mode == "default"
    assert replay.captured_or(lambda: "out", "ours", failed)() == "out" and Graph.begun == 1
    assert list(failed) == ["loop"] and Graph.mode == "default"


@needs_binary
@pytest.mark.parametrize("suite", ["pixels", "experts", "channels", "samples", "blocks"])
def test_contests_with_replays_of_both_sides(monkeypatch, suite):
    Replays(monkeypatch)
    (contest,) = contests.of_round("headline", (suite,), tiny=True)
    rows = list(contest.run(dataclasses.replace(contests.setting_of(contest, CPU), graph=True)))
    assert rows
    for row in rows:
        eager = {comparing.EAGER} if suite != "samples" else {"NCHW eager", "channels_last eager"}
        assert set(row.ours_all) == {*eager, comparing.GRAPH} and row.failed == {}
        assert row.ours_ms == row.ours_all[row.ours_name]
        assert suite == "samples" or row.ours_ms == min(
            row.ours_all.values()
        )  # of three a first look leaves two
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


def test_everything_measured_is_written_and_what_is_measured_again_takes_its_place(tmp_path):
    expert = make_row(suite="experts", case="H 8", tokens=128, weights="bfloat16", roofline_ms=0.5)
    measured = outcome.Measured()
    for row in (make_row(roofline_ms=9.0), make_row(case="unknown"), expert, make_row(roofline_ms=1.5)):
        measured.add(row)
    found = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11"}, "ceilings": {"half": 1e15}}
    outcome.write(found, [Stage("headline", PASSED, 1.0)], measured, tmp_path, dry=False)
    written = (tmp_path / "nvidia-h200.txt").read_text()
    known, unknown = (line.split() for line in written.splitlines() if line.startswith(("a ", "unknown ")))
    assert known[-3:] == ["0.75", "1000", "0.75"] and unknown[-1] == "1000"
    assert all(part in written for part in ("layers, 3x3, float32", "H 8", "128", "headline: passed"))
    loaded = Report.load(tmp_path / "nvidia-h200.json")
    assert loaded.machine["device"] == "NVIDIA H200" and loaded.machine["ceilings"] == {"half": 1e15}
    assert loaded.rows == measured.rows and len(loaded.rows) == 3
    assert loaded.checks["stages"][0]["outcome"] == PASSED


@pytest.mark.parametrize("files", [check.VALUES, check.TRAINING], ids=["values", "training"])
def test_the_tests_of_a_stage_exist_and_each_part_runs_once(files, tmp_path):
    calls = []
    some = a_check(tmp_path)
    some.python = lambda arguments, *_, **__: (
        calls.append(arguments) or finished(code=junit.NOTHING_COLLECTED)
    )
    check.tests(some, files)
    jobs = [(a[-4], a[-1]) for a in calls]
    assert len(jobs) == len(set(jobs)) == check.TESTS_AT_A_TIME  # all at once
    logs = [a for arguments in calls for a in arguments if a.startswith("--junitxml")]
    assert len(set(logs)) == len(logs)
    for file, (match, _) in files.items():
        text = (check.ROOT / "tests" / "gpu" / f"test_{file}.py").read_text()
        names = [line for line in text.splitlines() if line.startswith("def test_")]
        assert all(any(part in name for name in names) for part in match.split(" or ")), file


def test_parts_have_every_test_once():
    for tests in (0, 1, 2, 7, 100):
        items = list(range(tests))
        assert [item for part in range(3) for item in part_of(items, f"{part}/3")] == items
