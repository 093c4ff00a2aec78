"""Values of the Triton kernels in Triton's interpreter, which runs them on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the interpreter has a process of its own:
each test here runs one file of tests (``interpreted_<noun>.py``) with the variable set. Those whose tensors
can be on a GPU run without it too, where there is one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted/interpreted_*.py"))
ON_GPU = [file for file in FILES if "DEVICE" in file.read_text()]


@pytest.fixture
def marks(request) -> str:
    """Slow ones are left out inside where they are here."""
    return "not slow" if request.config.option.markexpr.startswith("not slow") else ""


def run(file: Path, interpret: str, marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, file]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(file, marks):
    run(file, "1", marks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("file", ON_GPU, ids=lambda path: path.stem)
def test_on_a_gpu(file, marks):
    run(file, "0", marks)
