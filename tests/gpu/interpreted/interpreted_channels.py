"""Values of the channel kernels in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

from dataclasses import replace

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from channel_launches import CASES, DEVICE, Case, Inputs, of_cases
from launch_checks import DTYPES, check, check_all, check_named_backends

from dynops import ChannelPlan, ops
from dynops.kernels.triton import channel_lists, channels, channels_weight_grad, gemm, tiling
from dynops.ops.channels import conv as reference
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@of_cases
def test_values_and_gradients(name, dtype):
    bias = random_tensor(CASES[name].o, dtype=dtype).to(DEVICE)
    check_all(Inputs(CASES[name], dtype), channels, reference, bias=bias)


@pytest.mark.parametrize("name", ["3x3", "groups", "depthwise", "packed", "shared", "3x3-all"])
def test_epilogue(name):
    """Every activation is in ``interpreted_pixels.py``: the kernels share them."""
    for dtype in DTYPES if name == "3x3" else DTYPES[:1]:
        inputs, case = Inputs(CASES[name], dtype), CASES[name]
        changes = {"bias": random_tensor(case.o, dtype=dtype).to(DEVICE)}
        changes["scale"] = random_tensor(case.n, case.o, dtype=dtype).to(DEVICE)
        if not case.packed_out:
            base = random_tensor(case.n, case.o, inputs.g.out_h, inputs.g.out_w, dtype=dtype).to(DEVICE)
            live = (
                torch.ones(1, case.o, dtype=torch.bool, device=DEVICE)
                if inputs.outs is None
                else inputs.outs.mask()
            )
            changes["base"] = base.masked_fill(live.expand(case.n, -1)[:, :, None, None], float("nan"))
        check(inputs.conv, channels.conv, reference._conv, activation="silu", **changes)


@pytest.mark.parametrize("name", ["3x3", "aligned", "packed", "depthwise", "heads", "groups"])
@pytest.mark.parametrize("limit", ["int64-offsets", "small-tiles"])
def test_other_configurations(name, limit, monkeypatch):
    """The 64-bit offsets that tensors past 2**31 elements take, and the tiles of small problems."""
    if limit == "int64-offsets":
        monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    else:
        monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    check_all(Inputs(CASES[name], torch.float32), channels, reference)


@pytest.mark.parametrize("name", ["3x3", "heads", "shared", "depthwise"])
def test_weight_grad_in_slices_and_chunks(name, monkeypatch):
    """Pixels split among programs, and samples taken one after another."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    monkeypatch.setattr(channels_weight_grad, "_COPIES", 1)
    case = replace(CASES[name], n=2, h=20, w=20)
    case = case if case.groups > 1 else replace(case, c=6, o=6)
    inputs = Inputs(case, torch.float32)
    check(inputs.weight_grad, channels.conv_weight_grad, reference._conv_weight_grad)


def test_large_maps_have_a_packed_weight(monkeypatch):
    packed, pack = [], channel_lists.pack_weight
    monkeypatch.setattr(channel_lists, "pack_weight", lambda *a: packed.append(a) or pack(*a))
    for name, expected in (("aligned", 2), ("wide", 0), ("3x3-out", 0), ("shared", 2)):
        packed.clear()
        inputs = Inputs(CASES[name], torch.float32)
        inputs.conv(channels.conv), inputs.input_grad(channels.conv_input_grad)
        assert len(packed) == expected, name


@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "shared", "ends", "empty", "padded", "capacity", "none"])
def test_gather_and_scatter(kind, dtype, nchw):
    capacity = {"capacity": 5, "none": 0}.get(kind)
    plan = Case(capacity=capacity).plan("random" if capacity is not None else kind, 19)
    x = (random_tensor(3, 19, 7, 6) * 100).to(DEVICE, dtype)
    x = x if nchw else x.to(memory_format=torch.channels_last)
    for width in {plan.width, plan.index.shape[1]}:
        packed = channels.gather(x, plan.index, plan.count, width)
        expected = reference._gather(x, plan.index, plan.count, width)
        assert torch.equal(packed, expected) and packed.stride() == expected.stride()
        for base in (None, x):
            out = channels.scatter(packed + 1, plan.index, plan.count, 19, base)
            expected = reference._scatter(packed + 1, plan.index, plan.count, 19, base)
            assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_named_backend_runs_the_kernels():
    tensors = random_tensor(2, 20, 7, 6), random_tensor(24, 20, 3, 3), random_tensor(24), random_tensor(2, 24)
    plans = [ChannelPlan.from_mask(torch.rand(2, size, device=DEVICE) < 0.5) for size in (20, 24)]

    def call(x, weight, bias, scale, backend):
        options = {"padding": 1, "activation": "silu", "scale": scale, "backend": backend}
        return ops.channel_conv2d(x, weight, bias, *plans, **options)

    check_named_backends(call, [t.to(DEVICE) for t in tensors])
