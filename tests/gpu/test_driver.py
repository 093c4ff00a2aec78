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
def launch(folder):
    """Runs tests of these files, those of some marks, in a process that has the stand-in for its GPU."""

    def run(*files: Path, marks: str = "", **variables: str) -> None:
        command = [sys.executable, "-m", "driver", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, *files]
        support = HERE.parent / "support"
        path = os.pathsep.join(
            filter(None, (str(support), f"{support}/launches", os.environ.get("PYTHONPATH")))
        )
        environment = {**os.environ, "PYTHONPATH": path, "DYNOPS_STAND_IN": str(folder), **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

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
