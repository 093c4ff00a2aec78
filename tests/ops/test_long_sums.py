"""Sums of many products: within twice the error of the dense layer in its more exact format, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import errors
from dynops import backends, build_info
from dynops.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built")

DEPTHS = (198, 1152, 4608)


def check(kind: str, depth: int) -> None:
    for what, ours, exact, dense in errors.sums(kind, depth):
        assert_within_budget(ours, exact, dense, f"{kind}, {what} of {depth} products")


@pytest.mark.parametrize("kind", errors.KINDS)
def test_this_instruction_set(kind):
    for depth in DEPTHS:
        check(kind, depth)


@pytest.mark.parametrize("depth", [9216, 18432])
@pytest.mark.parametrize("kind", ["pixels", "pixels 1x1", "experts 8"])
def test_the_longest(kind, depth):
    check(kind, depth)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    if isa not in build_info()["cpu_isas"]:
        pytest.skip(f"{isa}: not on this CPU")
    path = os.pathsep.join([str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": path, "DYNOPS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [isa]


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in errors.KINDS:
        for products in DEPTHS:
            check(each, products)
    print(build_info()["cpu_isa"])
