"""Values of the Triton kernels in Triton's interpreter, which runs them on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the interpreter has a process of its own:
each test here runs one file of tests (``interpreted_<noun>.py``) with the variable set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
