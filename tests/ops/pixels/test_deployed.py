"""The ops of the binary in a process without dynops, as a C++ program has them: what they give in Python."""

import subprocess
import sys

import pytest
import torch

from dynops import PixelPlan, backends, ops
from dynops.testing import random_mask, random_tensor

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="needs the binary")

CHILD = """
import sys, torch
binary, calls = sys.argv[1:]
torch.ops.load_library(binary)
calls = torch.load(calls, weights_only=False)
for name, arguments, expected in calls * 2:  # the second time with packed weights that were kept
    made = getattr(torch.ops.dynops, name).default(*arguments)
    made, expected = (x if isinstance(x, tuple) else (x,) for x in (made, expected))
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 1e-2, atol=1e-5)
        assert a.stride() == b.stride(), (name, a.shape, a.stride(), b.stride())
weight = next(arguments[1] for name, arguments, _ in calls if name == "pixel_conv")
weight.neg_()  # not the packed one of before
name, arguments, expected = next(call for call in calls if call[0] == "pixel_conv")
torch.testing.assert_close(torch.ops.dynops.pixel_conv.default(*arguments), -expected)
try:
    torch.ops.dynops.pixel_conv.default(arguments[0].double(), *arguments[1:])
except RuntimeError:
    pass
else:
    raise AssertionError("float64 has no kernel")
assert "dynops" not in sys.modules
"""


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the calls of dynops' ops, and what they gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "dynops" and not func._opname.startswith("cpu_"):
            plain = [list(a) if isinstance(a, tuple) else a for a in args]
            self.calls.append((func._opname, plain, out))
        return out


def convolve(channels_last: bool, dtype: torch.dtype) -> None:
    """Convolutions of each kind: bare first, then with all that is fused, rows, and copies."""

    def x(*shape):
        made = random_tensor(*shape).to(dtype)
        return made.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else made

    options = {"padding": 1}
    for o, c, k, more in (
        (5, 4, 3, {}),  # few channels: the taps of a row are one
        (40, 36, 3, {}),  # Winograd where its tiles are full
        (8, 8, 3, {"groups": 8}),
        (8, 8, 3, {"groups": 2, "stride": 2}),
    ):
        plan = (
            PixelPlan.full((2, 20, 20))
            if "stride" not in more
            else PixelPlan.from_mask(random_mask((2, 10, 10)))
        )
        plan = PixelPlan.from_mask(plan.mask(), plan.num_pixels)
        weight = x(o, c // more.get("groups", 1), k, k)
        ops.sparse_conv2d(x(2, c, 20, 20), weight, None, plan, **options, **more, backend="cpp")
        ops.sparse_conv2d(
            x(2, c, 20, 20), weight, x(o), plan, **options, **more, activation="silu", scale=x(o), shift=x(o),
            gate=x(*plan.shape), residual=x(2, o, *plan.shape[1:]), base=x(2, o, *plan.shape[1:]), backend="cpp",
        )  # fmt: skip
    plan = PixelPlan.from_mask(random_mask((2, 9, 9)))
    rows = ops.gather_pixels(x(2, 6, 9, 9), plan)
    rows = ops.packed_conv2d(
        rows, x(4, 6, 3, 3), None, plan, plan, padding=1, activation="relu", backend="cpp"
    )
    rows = ops.packed_conv2d(rows, x(7, 4, 1, 1), None, plan, plan, backend="cpp")
    ops.scatter_pixels(rows, plan)
    torch.ops.dynops.scatter_planes(rows, plan.index, None, list(plan.shape), None)
    ops.sparse_conv_transpose2d(
        x(2, 4, 5, 5), x(4, 3, 2, 2), None, PixelPlan.full((2, 10, 10)), stride=2, backend="cpp"
    )
    plan.needed(3, padding=1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_without_dynops_computes_the_same(dtype, tmp_path):
    with Recorder() as recorder:
        for channels_last in (True, False):
            convolve(channels_last, dtype)
    names = {name for name, *_ in recorder.calls}
    assert names >= {
        "pixel_conv",
        "gather_rows",
        "scatter_rows",
        "scatter_planes",
        "mask_to_index_capacity",
        "inverse_index",
        "needed_mask",
    }
    torch.save(recorder.calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", CHILD, backends._C.__file__, str(tmp_path / "calls.pt")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
