"""Makes this process one whose GPUs are the stand-in's. Comes before ``import torch``."""

import os

from . import machine

machine.guard()

from . import cuda_kernels, launches, streams, tensors  # noqa: E402

streams.install()
tensors.install()
launches.install()
if os.environ.get(cuda_kernels.VARIABLE):
    cuda_kernels.install()
