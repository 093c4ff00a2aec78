"""The kernels of every instruction set: a part of the ops' tests, in one process for each set that this CPU has.

A process takes its instruction set when it loads the binary. Each runs on two threads, the tests themselves on one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import all_isas, run_script

import dynops
from dynops import backends

HERE = Path(__file__).parent
SELECTED = (
    "pixels/test_pixels.py::test_dtypes",
    "pixels/test_pixels.py::test_activations",
    "channels/test_channels.py::test_dtypes",
    "channels/test_channel_weights.py::test_mixed_dtypes",
    "channels/test_channel_outputs.py::test_any_convolution_and_any_mask",
    "channels/test_channel_filters.py::test_any_local_convolution",
    "experts/test_experts.py::test_linear_in_half_precision",
    "experts/test_eight_bits_and_activations.py::test_linear_of_eight_bits",
    "experts/test_experts.py::test_mlp_activation",
    "test_long_sums.py::test_sums",
)

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built")


SETS = ["portable", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512")), "avx512_bf16"]


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    if isa not in all_isas():
        pytest.skip(f"{isa}: not built, or not on this CPU")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not reference",
        *SELECTED,
    ]
    environment = {**os.environ, "DYNOPS_CPU_ISA": isa, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100


def test_the_instruction_sets_are_named():
    info = dynops.build_info()
    assert "portable" in info["cpu_isas"] and info["cpu_isa"] in info["cpu_isas"]
    script = """
        import dynops
        try:
            print(dynops.build_info()["cpu_isa"])
        except RuntimeError as error:
            print("refused", error)
    """
    for isa in info["cpu_isas"]:
        assert run_script(script, DYNOPS_CPU_ISA=isa).strip() == isa
    refused = run_script(script, DYNOPS_CPU_ISA="sse9")
    assert refused.startswith("refused") and "sse9" in refused and "portable" in refused
