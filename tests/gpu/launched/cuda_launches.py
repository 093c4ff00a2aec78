"""The CUDA C++ kernels' launches on the stand-in for a GPU, beside those of Triton."""

import contract_cases
import pytest
import torch
from driver.watch import watch
from gpu_calls import CALLS, run
from on_gpu import moved

CPP = {
    "block_cover", "block_mask", "cuda_gather_tiles", "cuda_scatter_tiles", "expert_index", "gather_rows", "inverse_index",
    "mask_to_index", "mask_to_index_capacity", "needed_mask", "scatter_rows",
}  # fmt: skip


def test_the_kernels_are_there():
    have = {n for n in CPP if torch._C._dispatch_has_kernel_for_dispatch_key(f"dynops::{n}", "CUDA")}
    assert have == CPP


@pytest.mark.parametrize("name", contract_cases.NAMES)
def test_small_calls(name):
    """Plans, rows and blocks of both forms; nothing that a driver would refuse."""
    every = [arguments for op, arguments in contract_cases.samples(("triton",)) if op == name]
    for arguments in every if name in CPP else every[:2]:
        with watch.fresh():
            getattr(torch.ops.dynops, name).default(*moved(arguments, "cuda"))


@pytest.mark.parametrize("name", CALLS)
def test_calls_can_be_captured(name):
    call = CALLS[name]
    plan, tensors = call.plan("cuda", True), call.tensors("cuda", torch.bfloat16)
    with watch.capture():
        counts = run(call, plan, tensors)
    assert all(way["kernels"] + way["torch"] for way in counts)
