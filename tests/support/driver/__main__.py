"""``python -m driver ARGUMENTS``: pytest on the stand-in."""

import os
import sys

from . import machine

machine.guard()  # before torch

import pytest  # noqa: E402

from . import cuda_kernels, launches, streams, tensors  # noqa: E402

streams.install()
tensors.install()
launches.install()
if os.environ.get(cuda_kernels.VARIABLE):
    cuda_kernels.install()
sys.exit(pytest.main(sys.argv[1:]))
