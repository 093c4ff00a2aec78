"""``launch.launch`` on the stand-in: what Triton compiled is called again where, and only where, it would take it itself."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from driver.machine import GPUS
from driver.watch import watch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dynops.kernels.triton import launch as module
from dynops.kernels.triton.launch import launch


@triton.jit(do_not_specialize=["rows"])
def copying_kernel(x, out, extra, rows, columns, scale, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at, mask=at < rows) * scale
    if extra is not None:
        value += tl.load(extra + at, mask=at < columns)
    tl.store(out + at, value, mask=at < rows)


@triton.jit
def boxed_kernel(box, out, N: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, box.load([0, 0]))


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(module, "_forms", {})


def bound(*arguments, kernel=copying_kernel, grid=(3,), **named) -> tuple[int, int]:
    """How often Triton's own way was gone, and how often the kernel was launched."""
    seen, run = [], JITFunction.run

    def noted(self, *given, **options):
        seen.append(self)
        return run(self, *given, **options)

    before = watch.counts["kernels"]
    with mock.patch.object(JITFunction, "run", noted), mock.patch.object(module, "_run", noted):
        launch(kernel, *grid)(*arguments, **named)
    return len(seen), watch.counts["kernels"] - before


def floats(size: int = 64, dtype=torch.float32, device: str = "cuda") -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def test_the_same_call_is_bound_once():
    x, out = floats(), floats()
    assert bound(x, out, None, 64, 64, 0.5, N=64, num_warps=4) == (1, 1)
    assert bound(x, out, None, 64, 64, 0.5, N=64, num_warps=4) == (0, 1)
    assert bound(floats(), floats(128), None, 7, 64, 0.5, grid=(5, 2), N=64, num_warps=4) == (0, 1)


CHANGES = {
    "an address": lambda a: {"x": floats(65)[1:]},
    "a type": lambda a: {"x": floats(dtype=torch.float16)},
    "a tensor for None": lambda a: {"extra": floats()},
    "more than 32 bits": lambda a: {"rows": 2**31},
    "a specialised number": lambda a: {"columns": 63},
    "a one": lambda a: {"columns": 1},
    "a float": lambda a: {"scale": 0.25},
    "a constant": lambda a: {"N": 32},
    "an option": lambda a: {"num_warps": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_tells_apart_is_told_apart(change):
    arguments = {
        "x": floats(),
        "out": floats(),
        "extra": None,
        "rows": 64,
        "columns": 64,
        "scale": 0.5,
        "N": 64,
    }
    arguments["num_warps"] = 4
    bound(**arguments)
    changed = arguments | CHANGES[change](arguments)
    assert bound(**changed) == (1, 1) and bound(**changed) == (0, 1) and bound(**arguments) == (0, 1)


def test_a_descriptor_is_known_by_its_box():
    out, matrices = (
        floats(1024, torch.bfloat16),
        [floats(4096, torch.bfloat16).view(64, 64) for _ in range(2)],
    )
    found = [
        bound(TensorDescriptor.from_tensor(matrix, [16, n]), out, n, kernel=boxed_kernel)
        for n in (16, 32)
        for matrix in matrices
    ]
    assert found == [(1, 1), (0, 1)] * 2


def test_a_device_has_kernels_of_its_own():
    for device in (f"cuda:{i}" for i in range(len(GPUS))):
        with torch.cuda.device(device):
            x = floats(device=device)
            assert [bound(x, x, None, 64, 64, 0.5, N=64)[0] for _ in range(2)] == [1, 0]


def test_who_replaces_tritons_way_sees_every_launch():
    x, seen = floats(), []
    launch(copying_kernel, 3)(x, x, None, 64, 64, 0.5, N=64)
    with mock.patch.object(JITFunction, "run", lambda self, *given, **options: seen.append(self)):
        launch(copying_kernel, 3)(x, x, None, 64, 64, 0.5, N=64)
    assert seen == [copying_kernel]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_COMPILED", 3)
    x = floats()
    for columns in range(2, 20):
        launch(copying_kernel, 3)(x, x, None, 64, columns, 0.5, N=64)
    (form,) = module._forms.values()
    assert len(form.compiled) <= 3
