"""Launches on a stand-in for the driver (``tests/support/driver``), which checks and records them and runs nothing.

The stand-in changes PyTorch and Triton for good, so the files of ``launched/`` run in a process of their own. All such
processes share a folder with the compiled libraries and Triton's cache.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_host import needs_nvcc

from benchmarks.harness.compare import GRAPH
from benchmarks.harness.report import Report

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("launched/launched_*.py"))
WITH_SLOW = [file for file in FILES if "pytest.mark.slow" in file.read_text()]


def missing() -> str:
    """What the stand-in lacks here, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if torch.backends.cuda.is_built():
        return "needs a PyTorch without CUDA: this one would launch its own kernels"
    return "" if shutil.which("cc") and shutil.which("c++") else "needs cc and c++"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """One for all processes of tests."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stand-in"
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture
def python(folder):
    """Runs this interpreter from the root of the sources, with the modules of the stand-in in reach."""

    def run(*arguments: str | Path, paths: tuple[str, ...] = (), **variables: str) -> None:
        support = HERE.parent / "support"
        path = [str(support), f"{support}/launches", *(f"{support}/{p}" for p in paths), str(HERE.parents[1])]
        path = os.pathsep.join(filter(None, (*path, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "DYNOPS_STAND_IN": str(folder), **variables}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def launch(python):
    """Runs tests of these files, those of some marks, in a process that has the stand-in for its GPU."""

    def run(*files: Path, marks: str = "", **variables: str) -> None:
        python("-m", "driver", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, *files, **variables)

    return run


def test_launches(launch):
    launch(*FILES, marks="not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_SLOW, ids=lambda path: path.stem)
def test_all_launches(launch, file):
    launch(file, marks="slow")


@needs_nvcc
@pytest.mark.slow
def test_launches_of_the_cuda_kernels(launch):
    launch(HERE / "launched/cuda_launches.py", DYNOPS_STAND_IN_NVCC="1")


@pytest.mark.slow
def test_the_check_of_a_gpu_goes_through_its_code_for_one(python, tmp_path):
    """A dry run whose contests find GPUs: plans with a capacity, captures, replays and events, of every suite."""
    command = ["-m", "benchmarks.gpu", "check", "--dry-run", "--seconds", "400", "--only", "headline"]
    python(*command, "--out", tmp_path, paths=("driver/startup",), OMP_NUM_THREADS="1")
    (file,) = tmp_path.glob("*.json")
    report = Report.load(file)
    suites = {"layers", "experts", "channels", "samples", "blocks", "models"}
    assert report.checks["failed"] == {} and {row.suite for row in report.rows} == suites
    for row in report.rows:
        whole = (
            row.suite == "samples" and row.density == 1
        )  # by the dense module, and by kernels that compute nothing
        assert whole or GRAPH in row.ours_all, row
        # a CPU's grouped_mm reads where each expert's rows end, as the loop does
        waits = {"dense loop, graph", "dense torch grouped_mm, graph"} if row.suite == "experts" else set()
        failed = {
            name: why for name, why in row.failed.items() if row.suite != "samples" or "differs" not in why
        }
        assert {*failed} == waits and all("waits for the device" in why for why in failed.values())
