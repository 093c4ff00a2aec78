"""The CUDA sources compile with nvcc without warnings, and load without a GPU; ``make gpu-audit`` reads what they need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

NVCC = shutil.which("nvcc")
ARCH = 90  # make gpu-audit compiles for the others
SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
OPS = {
    "experts": ("expert_index",),
    "blocks": ("block_mask", "block_cover", "cuda_gather_tiles", "cuda_scatter_tiles"),
    "pixels": (
        "mask_to_index", "mask_to_index_capacity", "inverse_index", "needed_mask", "gather_rows", "scatter_rows",
    ),
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")]

# The library is loaded beside a torch that may lack CUDA; its kernels must still find their schemas.
CHECK = """
import sys, torch, dynops.ops
def registered(op):
    known = op in torch._C._dispatch_get_all_op_names()  # cuda_* are defined by the library itself
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
if not any(map(registered, sys.argv[2:])):  # a binary built with CUDA has them, and they cannot be registered twice
    torch.ops.load_library(sys.argv[1])
missing = [op for op in sys.argv[2:] if not registered(op)]
assert not missing, missing
"""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_and_registers(source, tmp_path):
    library = tmp_path / f"{source.stem}.so"
    command = [
        NVCC,
        "-shared",
        "-O3",
        "-std=c++17",
        "-Xcompiler",
        "-fPIC,-Wall",
        "-cudart",
        "static",
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in include_paths())]
    command += [f"-arch=sm_{ARCH}"]
    build = subprocess.run(
        [*command, source, "-o", library, f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert "warning" not in build.stderr, build.stderr
    ops = [f"dynops::{op}" for op in OPS.get(source.stem, ())]
    check = subprocess.run([sys.executable, "-c", CHECK, library, *ops], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
