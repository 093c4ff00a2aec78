"""Values of the pixel kernels in Triton's interpreter. Run by ``test_triton_interpreter.py``."""

from dataclasses import replace
from functools import partial

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from expert_launches import PLAIN
from launch_checks import DTYPES, check, check_all, check_named_backends
from pixel_launches import CASES, Case, Inputs, of_cases

from dynops import PixelPlan, ops
from dynops.geometry import ConvGeometry
from dynops.kernels.epilogue import NOTHING
from dynops.kernels.layout import empty_map, memory_format_of
from dynops.kernels.triton import gemm, pixels, rows, taps, tiling
from dynops.ops.pixels import conv as reference
from dynops.ops.pixels import interpolate
from dynops.testing import random_mask, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@of_cases
def test_values_and_gradients(name, dtype):
    inputs = Inputs(CASES[name], dtype)
    check_all(inputs, pixels, reference, bias=random_tensor(CASES[name].o, dtype=dtype))
    if not CASES[name].packed_out and not CASES[name].packed_in:
        assert memory_format_of(inputs.conv(pixels.conv)) == memory_format_of(inputs.x)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("name", ["3x3", "depthwise", "packed", "transposed-stride"])
def test_epilogue(name, activation):
    for dtype in DTYPES if name == "3x3" else DTYPES[:1]:
        inputs = Inputs(CASES[name], dtype)
        check(inputs.conv, pixels.conv, reference._conv, activation=activation, **inputs.epilogue())


def test_nan_passes_through_every_activation():
    inputs = Inputs(replace(CASES["1x1"], mask="full"), torch.float32)
    inputs.x[0, 0, 0, 0] = float("nan")
    for activation in PLAIN:
        assert inputs.conv(pixels.conv, activation=activation)[0, :, 0, 0].isnan().all(), activation


@pytest.mark.parametrize("name", ["3x3", "groups", "transposed-stride", "packed", "capacity", "wide"])
def test_weights_by_tma(name, monkeypatch):
    """The boxes in which sm_90 fetches weights. What lies beside a box's own part is NaN or another group's."""
    case = replace(CASES[name], c=64 if name == "wide" else 32, o=40)
    boxes, matrix_box = [], gemm.matrix_box
    monkeypatch.setattr(gemm, "matrix_box", lambda *given: boxes.append(given) or matrix_box(*given))
    for processors in (1, 64) if name == "3x3" else (64,):
        monkeypatch.setattr(tiling, "device_facts", lambda device, n=processors: (90, n))
        inputs = Inputs(case, torch.bfloat16)
        check(inputs.conv, pixels.conv, reference._conv)
        check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    assert len(boxes) == (2 if name == "3x3" else 1), "one for the forward product of each run"


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize(
    "live,limit", [(70, gemm.INT32_LIMIT), (45, gemm.INT32_LIMIT), (0, gemm.INT32_LIMIT), (45, 1)]
)
def test_same_rows(live, limit, processors, monkeypatch):
    """Row i of the output reads row i: boxes of x, also past its last row. What lies past the count is in no result."""
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, processors))
    boxes, row_box = [], gemm.row_box
    monkeypatch.setattr(gemm, "row_box", lambda *given: boxes.append(row_box(*given)) or boxes[-1])
    case = Case(n=1, h=1, w=70, kernel=(1, 1), pad=(0, 0), c=64, o=64, mask="full", packed_out=True)
    for groups, dtype in ((1, torch.bfloat16), (2, torch.bfloat16), (1, torch.float32)):
        inputs = Inputs(replace(case, groups=groups), dtype)
        if live < case.w:
            mask = torch.arange(case.w)[None, None] < live
            inputs.plan = PixelPlan.from_mask(mask, case.w)
            inputs.live = inputs.plan.index >= 0
            inputs.x[..., live:], inputs.grad[live:] = float("nan"), float("nan")
        check(inputs.conv, partial(pixels.conv, same_rows=True), reference._conv, **inputs.epilogue())
        check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    assert [box is None for box in boxes] == [False] * 4 + [True] * 2, (
        "of either half-precision run, forward and back"
    )


SPLIT = [(name, torch.float32) for name in ("groups", "dilation", "packed-in", "packed-out", "capacity", "capacity-packed", "empty")]  # fmt: skip


@pytest.mark.parametrize("name,dtype", [*SPLIT, ("3x3", torch.bfloat16)])
def test_split_reductions(name, dtype, monkeypatch):
    """Few rows: the reduction in parts, whose sums are added and finished by a second kernel."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    split, choose = [], tiling.parts
    monkeypatch.setattr(tiling, "parts", lambda *given: split.append(choose(*given)) or split[-1])
    # a step takes 16 to 64 channels of a group, a part ten steps
    channels = 136 if dtype == torch.bfloat16 or name == "groups" else 72
    inputs = Inputs(replace(CASES[name], c=channels, o=36 if name == "groups" else 20), dtype)
    check(inputs.conv, pixels.conv, reference._conv, activation="relu", **inputs.epilogue())
    assert name == "empty" or max(split) > 1


@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise", "transposed-stride", "packed-in", "capacity", "empty", "full", "one", "no-images"])  # fmt: skip
def test_filled_beside(name, monkeypatch):
    """The fill of a large map, which writes where the plan has no pixel and nowhere else."""
    monkeypatch.setattr(rows, "_LARGE", 1)
    inputs = Inputs(CASES[name], torch.float32)
    g = inputs.g
    base = random_tensor(g.batch, CASES[name].o, g.out_h, g.out_w)
    for value in (None, base):
        check(inputs.conv, pixels.conv, reference._conv, base=value)
    check(inputs.input_grad, pixels.conv_input_grad, reference._conv_input_grad)
    out = empty_map(base, base.shape, torch.channels_last)
    with rows.filled(out, base, inputs.plan.index, inputs.plan.count):
        assert out.isnan().all(), "the fill goes before what it is to run beside"
    assert out.permute(0, 2, 3, 1)[inputs.plan.mask()].isnan().all(), "an active pixel was written"


def test_programs_walk_over_tiles(monkeypatch):
    """A capacity form with more tiles than programs: each walks over several."""
    monkeypatch.setattr(tiling, "resident", lambda device: 2)
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))
    monkeypatch.setattr(tiling, "parts", lambda *given: 1)
    for name in ("capacity", "capacity-packed", "capacity-exceeded", "capacity-transposed", "capacity-empty"):
        case = replace(CASES[name], n=3, h=11, w=11, capacity=CASES[name].capacity * 5)
        inputs = Inputs(case, torch.float32)
        check(inputs.conv, pixels.conv, reference._conv, bias=random_tensor(case.o))


@pytest.mark.parametrize("name", ["capacity", "capacity-packed", "capacity-exceeded", "capacity-transposed", "capacity-depthwise", "capacity-empty"])  # fmt: skip
@pytest.mark.parametrize("expected", [1, 40])
def test_expected_rows_change_the_launch_alone(name, expected, monkeypatch):
    """Tile, split and grid follow what is expected, also where the count is more. Rows past it are not written."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    chosen, choose = [], tiling.choose
    monkeypatch.setattr(
        tiling, "choose", lambda x, rows, *a, **k: chosen.append(rows) or choose(x, rows, *a, **k)
    )
    case = CASES[name] if name == "capacity-depthwise" else replace(CASES[name], c=72)
    inputs = Inputs(replace(case, n=3, h=11, w=11, capacity=case.capacity * 5), torch.float32)
    run = partial(pixels.conv, expected=expected, zero_tail=False)
    check(inputs.conv, run, reference._conv, activation="relu", **inputs.epilogue())
    assert chosen == [] if name == "capacity-depthwise" else chosen == [expected]
    if case.packed_out:
        bare = run(inputs.x, inputs.weight, None, inputs.plan.index, inputs.plan.count, inputs.source, inputs.g, NOTHING, None, True)  # fmt: skip
        assert bare[~inputs.live].isnan().all() and not bare[inputs.live].isnan().any()


def test_sums_of_a_split_capacity_stay_small(monkeypatch):
    """One expected row of a capacity of many: parts are as many as have room."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 128))
    for outputs, most in ((1 << 12, 16), (1 << 23, 2), (1 << 25, 1)):
        assert tiling.parts(torch.device("cpu"), 1, 1000, outputs) == most


def test_weights_are_rounded_for_tf32():
    """Tensor cores cut off the low bits of what they get: of weights nothing is left to cut."""
    weight = random_tensor(4, 5, 3, 3) * 1e3
    weight[0, 0, 0] = torch.tensor([float("inf"), float("nan"), -0.0])
    exact, rounded = (gemm.pack_rows(weight, torch.float32, tf32) for tf32 in (False, True))
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert torch.equal(rounded.isnan(), exact.isnan()) and torch.equal(rounded.isinf(), exact.isinf())
    error = ((rounded - exact) / exact)[exact.isfinite() & (exact != 0)]
    assert 0 < error.abs().max() <= 2**-11 and error.min() < 0 < error.max()


def test_many_slices_of_rows(monkeypatch):
    """A weight gradient whose rows are split among programs and added in a second pass."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    full = {"h": 14, "w": 14, "mask": "full"}
    cases = [replace(CASES[name], **full) for name in ("3x3", "depthwise")]
    cases += [replace(case, mask="random", capacity=392, packed_out=True) for case in cases]
    cases += [replace(cases[0], mask="empty", capacity=392)]
    for case in cases:
        inputs = Inputs(case, torch.float32)
        check(inputs.weight_grad, pixels.conv_weight_grad, reference._conv_weight_grad)


def test_input_gradient_walks_over_the_taps_of_active_outputs():
    """The work of a tile is the union of its rows' taps; the docstring of kernels/pixels.py has the numbers."""
    g = ConvGeometry(8, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    plan = PixelPlan.from_mask(random_mask(g.out_shape, 0.5))
    active = plan.inverse()
    options = {"READS": "active", "WIDE": False, **gemm.geometry_arguments(gemm.adjoint(g))}
    keys, order = taps.tap_order(None, active, plan.num_pixels, options, active.device)
    sets = keys.int() ^ (keys.int() >> 1)
    read = torch.nn.functional.unfold((active >= 0).float()[:, None], 3, padding=1)  # [N, 9, H*W]
    bits = (read.flip(1).long() << torch.arange(9).view(1, 9, 1)).sum(1).reshape(-1)
    assert torch.equal(sets, bits[order].int())
    union = sets.view(-1, 64).clone()
    while union.shape[1] > 1:
        union = union[:, ::2] | union[:, 1::2]
    walked = sum(int(((union >> tap) & 1).sum()) for tap in range(9)) * 64
    assert walked <= 1.16 * int(read.sum())


@pytest.mark.parametrize("nchw", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [None, 60])
def test_gather_and_scatter(dtype, nchw, capacity):
    x = (random_tensor(2, 19, 7, 6) * 100).to(dtype)
    x = x if nchw else x.to(memory_format=torch.channels_last)
    plan = PixelPlan.from_mask(random_mask((2, 7, 6), 0.4), capacity)
    rows = pixels.gather_rows(x, plan.index, plan.count)
    assert torch.equal(rows, torch.ops.dynops.gather_rows(x, plan.index, plan.count))
    for base in (None, x):
        out = pixels.scatter_rows(rows + 1, plan.index, plan.count, list(plan.shape), base)
        expected = torch.ops.dynops.scatter_rows(rows + 1, plan.index, plan.count, list(plan.shape), base)
        assert torch.equal(out, expected) and out.stride() == expected.stride()


@pytest.mark.parametrize("density,capacity", [(0.04, None), (0.4, 60), (1, None), (0, 4)])
def test_nearest_pixel(density, capacity):
    """Many ties, a sample without pixels, and more pixels than a program has."""
    mask = random_mask((3, 9, 37), density)
    mask[1] = False
    plan = PixelPlan.from_mask(mask, capacity)
    arguments = plan.index, plan.count, list(plan.shape)
    assert torch.equal(rows.nearest_pixel(*arguments), interpolate._nearest_pixel(*arguments))


def test_named_backend_runs_the_kernels():
    tensors = random_tensor(2, 20, 7, 6), random_tensor(24, 20, 3, 3), random_tensor(24)
    plan = PixelPlan.from_mask(random_mask((2, 7, 6), 0.4))
    check_named_backends(partial(ops.sparse_conv2d, plan=plan, padding=1, activation="silu"), tensors)
