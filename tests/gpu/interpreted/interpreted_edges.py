"""The edges of every Triton kernel in Triton's interpreter. Run by ``test_triton_interpreter.py``.

Nothing, one of everything, one less and one more than a tile in each dimension, an index that ends at the last row of
the buffer, capacities that are empty, full and exceeded, 64-bit offsets. Each address is checked (``interpreter.py``);
values are compared with the reference. Tiles are the smallest of the table, as on a GPU with very many SMs.
"""

import os
import pkgutil
from dataclasses import replace
from importlib import import_module

import block_cases
import block_conv_launches as block_conv_cases
import channel_launches as channel_cases
import expert_launches as expert_cases
import interpreter
import pixel_launches as pixel_cases
import pytest
import torch
import weight_launches as weight_cases
from launch_checks import check, check_all

from dynops import PixelPlan, SamplePlan
from dynops.kernels import triton as kernels
from dynops.kernels.layout import empty_map
from dynops.kernels.triton import blocks, channels, channels_weight_grad, experts, gemm, pixels, rows, tiling
from dynops.kernels.triton.channel_lists import channel_index
from dynops.ops import index as index_reference
from dynops.ops.channels import conv as channel_reference
from dynops.ops.experts import activations as expert_activations
from dynops.ops.experts import linear as expert_reference
from dynops.ops.experts import mlp as mlp_reference
from dynops.ops.experts import rows as expert_rows
from dynops.ops.pixels import conv as pixel_reference
from dynops.ops.pixels import interpolate
from dynops.ops.pixels import rows as row_reference
from dynops.testing import random_tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned", "smallest_tiles"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter"),
]
M, N = 32, 16  # the smallest tile; a block of its reduction is 16
FLOAT, BFLOAT = torch.float32, torch.bfloat16
# rows, outputs and inputs around a tile: each of the three below, at and above it
AROUND = [(M - 1, N - 1, N + 1), (M, N, N), (M + 1, N + 1, N - 1), (M - 1, N, N - 1), (M, N + 1, N + 1), (M + 1, N - 1, N)]  # fmt: skip
MAPS = {1: (1, 1), M - 1: (1, M - 1), M: (4, M // 4), M + 1: (3, (M + 1) // 3)}  # h, w
of_offsets = pytest.mark.parametrize("limit", [gemm.INT32_LIMIT, 1], ids=["int32", "int64"])


@pytest.fixture
def smallest_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 10**6))


def named(cases: dict):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


Pixels = pixel_cases.Case
ONE = Pixels(n=1, h=1, w=1, c=1, o=1, mask="full")
NARROW = Pixels(c=3, o=3, n=1, h=4, w=5, mask="last")
PIXELS = {
    "one-of-all": ONE,
    "one-of-all-packed": replace(ONE, packed_in=True, packed_out=True, capacity=1),
    "one-row": Pixels(c=17, o=17, n=1, h=1, w=1, mask="full"),
    "no-images": Pixels(n=0),
    "no-images-packed": Pixels(n=0, packed_in=True, packed_out=True),
    "no-rows": Pixels(mask="empty", n=1),
    "no-rows-packed": Pixels(mask="empty", n=1, packed_in=True, packed_out=True),
    **{f"{r}-{o}-{c}": Pixels(n=1, h=MAPS[r][0], w=MAPS[r][1], o=o, c=c, mask="full") for r, o, c in AROUND},
    "last": Pixels(n=2, c=17, o=17, mask="last", stride=(2, 2), nchw=True),
    "last-packed": Pixels(n=1, c=17, o=17, mask="last", packed_in=True, packed_out=True),
    "last-transposed": Pixels(n=1, c=17, o=17, mask="last", extra=1, stride=(2, 2), h=4, w=4),
    "last-groups": Pixels(n=1, c=34, o=34, groups=2, mask="last"),
    "last-1x1": Pixels(c=17, o=17, mask="last", kernel=(1, 1), pad=(0, 0), packed_in=True, packed_out=True),
    "capacity-0": Pixels(n=1, capacity=0, packed_out=True),
    "count-0": Pixels(n=1, capacity=M + 1, mask="empty", packed_out=True),
    "count-full": Pixels(n=1, h=3, w=11, c=17, o=17, capacity=M + 1, mask="full", packed_out=True),
    "count-over": Pixels(n=1, h=3, w=11, c=17, o=17, capacity=M, mask="full"),
    "count-under": Pixels(n=1, h=3, w=11, c=17, o=17, capacity=2 * M + 1, mask="last", packed_in=True),
    "taps-15": replace(NARROW, kernel=(3, 5), pad=(1, 2)),  # 16-bit tap sets
    "taps-16": replace(NARROW, kernel=(4, 4), pad=(2, 2)),  # 32-bit ones
    "taps-31": replace(NARROW, kernel=(31, 1), pad=(15, 0)),
    "taps-32": replace(NARROW, kernel=(8, 4), pad=(4, 2)),  # 64-bit ones
    "taps-62": replace(NARROW, kernel=(31, 2), pad=(15, 1)),
    "taps-63": replace(NARROW, kernel=(9, 7), pad=(4, 3)),  # no order
    "depthwise-15": Pixels(n=1, h=4, w=4, c=15, o=15, groups=15, mask="last"),
    "depthwise-17-packed": Pixels(n=1, c=17, o=34, groups=17, mask="last", packed_in=True, packed_out=True),
    "depthwise-64": Pixels(n=1, h=3, w=11, c=64, o=64, groups=64, mask="full"),  # tiles of 32 rows
    "depthwise-65-transposed": Pixels(n=1, h=2, w=2, c=65, o=65, groups=65, extra=0, mask="last"),
    "depthwise-count-0": Pixels(n=1, c=9, o=9, groups=9, capacity=8, mask="empty"),
}
WIDE_PIXELS = ("one-of-all", "33-17-15", "last", "last-packed", "last-transposed", "count-under", "depthwise-17-packed")  # fmt: skip


def check_pixels(case: Pixels, dtype: torch.dtype, epilogue: bool) -> None:
    inputs = pixel_cases.Inputs(case, dtype)
    check_all(inputs, pixels, pixel_reference, **(inputs.epilogue() if epilogue else {}))


@named(PIXELS)
def test_pixels(case):
    check_pixels(case, FLOAT, epilogue=True)


@pytest.mark.parametrize("name", WIDE_PIXELS)
def test_pixels_with_wide_offsets(name, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    check_pixels(PIXELS[name], FLOAT, epilogue=True)


@pytest.mark.parametrize("r,o,c", [(M + 1, N + 1, N), (M - 1, N - 1, 2 * N), (1, 1, N)])
def test_pixels_with_weights_by_tma(r, o, c):
    """Boxes that end at the end of the weight, and past it. A descriptor's rows are multiples of 16 bytes."""
    for transposed in (None, 0):
        o = 8 * max(1, o // 8) if transposed is not None else o
        h, w = MAPS[r]
        check_pixels(Pixels(n=1, h=h, w=w, o=o, c=c, mask="full", extra=transposed), BFLOAT, epilogue=False)


@of_offsets
@pytest.mark.parametrize("r,channels_", [(1, 1), (M - 1, 63), (M, 64), (M + 1, 65)])
def test_pixel_rows(r, channels_, limit, monkeypatch):
    """gather, scatter and the fill of what no pixel names, of tiles of 32 rows and 64 channels."""
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    h, w = MAPS[r]
    for kind, capacity in (("full", None), ("last", None), ("empty", None), ("last", 0), ("empty", r), ("full", max(1, r - 1)), ("last", 2 * r)):  # fmt: skip
        plan = PixelPlan.from_mask(pixel_cases.mask_of((1, h, w), 0.5, kind), capacity)
        for nchw in (False, True):
            x = random_tensor(1, channels_, h, w)
            x = x if nchw else x.to(memory_format=torch.channels_last)
            check_rows(x, plan, [1, h, w])
        base, channels_last = random_tensor(1, channels_, h, w), {"memory_format": torch.channels_last}
        check_fill(base.to(**channels_last), plan, monkeypatch)
        arguments = plan.index, plan.count, [1, h, w]
        assert rows.nearest_pixel(*arguments).equal(interpolate._nearest_pixel(*arguments))


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025])
def test_weights_rounded_for_tf32(size):
    weight = random_tensor(size, 1, 1, 1)
    bits = weight.view(torch.int32) + 0x1000 & -0x2000
    assert gemm.pack_rows(weight, FLOAT, True).flatten().equal(bits.view(FLOAT).flatten())
    for layout in (torch.contiguous_format, torch.channels_last):  # and put in order
        weight = random_tensor(size, 3, 2, 1).contiguous(memory_format=layout)
        bits = weight.view(torch.int32) + 0x1000 & -0x2000
        expected = bits.view(FLOAT).permute(0, 2, 3, 1).reshape(size, 2, 3)
        assert gemm.rounded_rows(weight).equal(expected)


def check_rows(x: torch.Tensor, plan, shape: list[int]) -> None:
    small = rows.gather_rows(x, plan.index, plan.count)
    assert small.equal(row_reference._gather_rows(x, plan.index, plan.count))
    for base in (None, x):
        arguments = (small + 1, plan.index, plan.count, shape, base)
        expected = row_reference._scatter_rows(*arguments)
        assert rows.scatter_rows(*arguments).equal(expected)
        planes = rows.scatter_planes(*arguments)
        assert planes.equal(expected) and planes.is_contiguous()


def check_fill(base: torch.Tensor, plan: PixelPlan, monkeypatch) -> None:
    monkeypatch.setattr(rows, "_LARGE", 1)
    out = empty_map(base, base.shape, torch.channels_last)
    with rows.filled(out, base, plan.index, plan.count):
        pass
    live = row_reference._scatter_rows(torch.ones(len(plan.index), 1), plan.index, plan.count, list(plan.shape), None)  # fmt: skip
    assert out.isnan().equal(live.bool().expand_as(out)) and out[~out.isnan()].equal(base[~out.isnan()])


@of_offsets
@pytest.mark.parametrize("n,columns", [(0, 3), (1, 1), (M - 1, 63), (M, 64), (M + 1, 65), (2, 4097)])
def test_sample_rows(n, columns, limit, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    at = torch.arange(n)
    for keep, capacity in ((at >= 0, None), (at == n - 1, None), (at < 0, n), (at >= 0, max(0, n - 1)), (at >= 0, 0), (at % 2 == 0, n)):  # fmt: skip
        plan = SamplePlan.from_mask(keep, capacity)
        base, live = random_tensor(n, columns), (plan.index >= 0)[:, None]
        check_rows(base[:, :, None, None], plan, [n, 1, 1])
        new = torch.where(live, random_tensor(plan.num_rows, columns), float("nan"))
        scale = torch.where(live[:, 0], random_tensor(plan.num_rows), float("nan"))
        for share, mix in ((None, False), (scale, False), (scale, True)):
            clean = None if share is None else share.nan_to_num(0)
            got = rows.merge_rows(new, plan.index, plan.count, base, share, mix)
            given = (new.nan_to_num(0), plan.index, plan.count, base, clean, mix)
            torch.testing.assert_close(got, row_reference._merge_rows(*given))


Blocks = block_cases.Case
LINE = Blocks(c=1, n=1, h=1, block=(1, 1), kind="full")
BLOCKS = {
    name: block_cases.CASES[name]
    for name in ("empty", "one", "full-overlap", "uneven-halo", "one-pixel-map", "one-channel-halo", "unaligned", "padding", "block-over-map-halo", "capacity", "capacity-exceeded", "capacity-empty", "capacity-0", "no-images", "no-pixels-capacity")
}  # fmt: skip
BLOCKS |= {f"units-{w}": replace(LINE, w=w) for w in (1, blocks._UNITS - 1, blocks._UNITS, blocks._UNITS + 1)}
BLOCKS |= {"no-channels": replace(LINE, c=0, w=3), "capacity-full": replace(LINE, w=9, capacity=9)}


@of_offsets
@named(BLOCKS)
def test_blocks(case, limit, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    for nchw in (False, True):
        block_cases.check_gather(blocks, case, FLOAT, nchw)
        block_cases.check_scatter(blocks, case, FLOAT, nchw)


BlockConv = block_conv_cases.Case
ALL = BlockConv(n=1, h=4, w=8, block=(4, 8), kind="full")  # one box
BLOCK_CONVS = {
    "one-of-all": replace(ALL, h=1, w=1, block=(1, 1), kernel=(1, 1), pad=(0, 0)),
    "one-box": replace(ALL, o=32),
    "box-and-pixel": replace(ALL, h=5, w=9, block=(5, 9)),
    "box-less-a-pixel": replace(ALL, h=3, w=7, block=(3, 7)),
    "two-blocks": replace(ALL, h=8, w=16, capacity=4),
    "no-rows": replace(ALL, kind="empty"),
    "count-0": replace(ALL, kind="empty", capacity=1),
    "count-over": replace(ALL, w=17, capacity=2),
    "no-images": replace(ALL, n=0),
}


@of_offsets
@named(BLOCK_CONVS)
def test_block_convs(case, limit, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    monkeypatch.setattr(rows, "_LARGE", 1)
    block_conv_cases.check(case, torch.float16)


Channels = channel_cases.Case
SINGLE = Channels(c=1, o=1, n=1, h=1, w=1, ins="one", outs="one")
BOTH = {"packed_in": True, "packed_out": True}
CHANNELS = {
    "one-of-all": SINGLE,
    "one-of-all-packed": replace(SINGLE, **BOTH),
    "no-samples": Channels(n=0),
    "none-live": Channels(ins="empty", outs="empty", **BOTH),
    "last-live": Channels(c=17, o=17, ins="one", outs="one"),
    "last-live-packed": Channels(c=17, o=17, n=2, h=4, w=4, ins="one", outs="one", **BOTH),
    "ends": Channels(c=17, o=17, ins="ends", outs="ends", stride=(2, 2), nchw=True),
    "ends-packed": Channels(c=17, o=17, ins="ends", outs="ends", **BOTH),
    "ends-groups": Channels(c=34, o=34, groups=2, ins="ends", outs="ends"),
    "ends-heads": Channels(c=17, o=34, heads=2, ins="ends", outs="ends"),
    **{f"{r}-{o}-{c}": Channels(n=3, h=MAPS[r][0], w=MAPS[r][1], o=o, c=c, ins="ends", outs="ends") for r, o, c in AROUND},
    **{f"all-{r}-{o}-{c}": Channels(n=1, h=MAPS[r][0], w=MAPS[r][1], o=o, c=c, ins=None, outs=None) for r, o, c in AROUND[:3]},
    "taps-16": Channels(c=3, o=3, kernel=(4, 4), pad=(2, 2)),
    "capacity-0": Channels(capacity=0),
    "capacity-0-packed": Channels(capacity=0, packed_in=True, outs=None),
    "capacity-full": Channels(c=17, o=17, capacity=17, ins="ends", outs="ends", **BOTH),
    "capacity-over": Channels(c=17, o=17, capacity=3, ins="ends", outs="ends", **BOTH),
    "padded": Channels(c=17, o=17, ins="padded", outs="padded", **BOTH),
    "large": Channels(c=32, o=32, n=2, h=9, w=9),  # the weight is packed
    "depthwise-15": Channels(c=15, o=15, groups=15, ins="ends", outs="ends"),
    "depthwise-17-packed": Channels(c=17, o=17, groups=17, ins="ends", outs="ends", **BOTH),
    "depthwise-65": Channels(c=65, o=65, groups=65, h=3, w=3, ins="one", outs="one"),
}  # fmt: skip
WIDE_CHANNELS = ("one-of-all", "33-17-15", "ends-packed", "ends-groups", "large", "depthwise-17-packed")


def check_channels(case: Channels) -> None:
    check_all(channel_cases.Inputs(case, FLOAT), channels, channel_reference, bias=random_tensor(case.o))


@named(CHANNELS)
def test_channels(case):
    check_channels(case)


@pytest.mark.parametrize("name", WIDE_CHANNELS)
def test_channels_with_wide_offsets(name, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    monkeypatch.setattr(channels_weight_grad, "_COPIES", 1)  # and samples one after another
    check_channels(CHANNELS[name])


@pytest.mark.parametrize("kind", ["empty", "one", "ends", "padded", None])
@pytest.mark.parametrize("r,size", [(1, 1), (M - 1, 63), (M, 64), (M + 1, 65)])
def test_channel_lists(r, size, kind):
    case = Channels(n=3, capacity=None if kind else 0)
    plan = case.plan(kind or "random", size)
    x = random_tensor(3, size, *MAPS[r])
    for nchw in (False, True):
        x = x if nchw else x.to(memory_format=torch.channels_last)
        packed = channels.gather(x, plan.index, plan.count, plan.width)
        assert packed.equal(channel_reference._gather(x, plan.index, plan.count, plan.width))
        for base in (None, x):
            arguments = (packed + 1, plan.index, plan.count, size, base)
            assert channels.scatter(*arguments).equal(channel_reference._scatter(*arguments))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, FLOAT, BFLOAT, torch.float64], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "rows,size", [(0, 5), (1, 1), (2, 15), (1, 16), (3, 17), (2, 1024), (2, 1025), (4, 0)]
)
def test_channel_plans(rows, size, dtype):
    """Lists shorter than the mask's rows, as long, and longer than a program takes at once."""
    mask = torch.where(torch.rand(rows, size) < 0.5, random_tensor(rows, size) + 9, 0).to(dtype)
    if rows > 1:
        mask[0], mask[1] = 0, 1
        if dtype.is_floating_point and dtype != BFLOAT:  # which the interpreter keeps as an integer
            mask[0] = -0.0
    mask[:, size - 1 :] = 1  # the last of the buffer
    for width in {0, min(1, size), size // 2, size}:
        for got, expected in zip(channel_index(mask, width), index_reference._channel_index(mask, width), strict=True):  # fmt: skip
            assert got.dtype == expected.dtype and got.equal(expected)


Own = weight_cases.Case
OWN = {
    "one-of-all": Own(c=1, o=1, n=1, h=1, w=1, kernel=1),
    "no-samples": Own(n=0),
    "no-samples-regions": Own(n=0, regions=2),
    "33-17-15": Own(n=2, h=3, w=11, o=17, c=15, kernel=1),
    "32-16-16": Own(n=1, h=4, w=8, o=16, c=16, kernel=1),
    "33-17-15-regions": Own(n=1, h=3, w=11, o=17, c=15, regions=2, kernel=1, each=False),
    "no-weight": Own(n=2, h=2, w=2, regions=2, kind="none", kernel=1),
    "last-region": Own(n=2, h=3, w=3, regions=3, kind="last", kernel=1),
    "regions-32": Own(c=3, o=3, n=1, regions=32, kernel=1, each=False),  # 64-bit sets
    "regions-63": Own(c=3, o=3, n=1, h=2, w=2, regions=63, kernel=1, each=False),  # two launches
    "depthwise-17": Own(c=17, o=17, groups=17, n=2, h=2, w=2),
    "depthwise-65-regions": Own(c=65, o=65, groups=65, n=2, h=2, w=2, regions=2),
}
WIDE_OWN = ("33-17-15", "33-17-15-regions", "depthwise-17")


@named(OWN)
def test_own_weights(case):
    weight_cases.check_own(case, FLOAT)


@pytest.mark.parametrize("name", WIDE_OWN)
def test_own_weights_with_wide_offsets(name, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    weight_cases.check_own(OWN[name], FLOAT)


@of_offsets
@pytest.mark.parametrize(
    "case,upsample",
    [(Own(c=1, n=1, h=1, w=1, kernel=1), 1), (Own(n=0, c=4), 2), (Own(c=63, n=1, h=3, w=11), 1), (Own(c=65, groups=5, n=1, h=2, w=1), 3), (Own(c=51, groups=3, n=2, h=2, w=2, nchw=True), 2)],
    ids=["one-of-all", "no-samples", "63", "65-upsampled", "51-nchw"],
)  # fmt: skip
def test_local_filters(case, upsample, limit, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    weight_cases.check_local(case, FLOAT, upsample)


Experts = expert_cases.Case
EXPERTS = {
    "one-of-all": Experts(t=1, k=1, e=1, i=1, o=1, routing="kept", weighted=True),
    "no-tokens": Experts(t=0),
    "no-tokens-summed": Experts(t=0, packed_out=False, weighted=True),
    "no-inputs": Experts(i=0),
    "no-outputs": Experts(o=0),
    "all-dropped": Experts(t=M + 1, k=1, routing="dropped", weighted=True),
    "all-dropped-summed": Experts(routing="dropped", packed_out=False, weighted=True),
    "all-dropped-packed": Experts(routing="dropped", packed_in=True),
    **{f"{r}-{o}-{i}": Experts(t=r, k=1, e=2, routing="one", o=o, i=i, weighted=True) for r, o, i in AROUND},
    "last-expert-summed": Experts(t=17, k=2, e=2, i=17, o=17, routing="one", packed_out=False, weighted=True),
    "transposed": Experts(t=M + 1, k=1, e=2, i=17, o=17, routing="one", transposed=True, packed_in=True),
    "slice": Experts(t=M + 1, k=1, e=2, i=17, o=17, routing="one", weight="slice"),
    "int8": Experts(t=M - 1, k=1, e=2, i=17, o=15, routing="one", weight="int8"),
    "capacity-0": Experts(capacity=0, packed_out=False, weighted=True),
    "capacity-full": Experts(t=M + 1, k=1, e=2, i=17, o=17, routing="one", capacity=M + 1, packed_out=False),
    "capacity-over": Experts(t=M + 1, k=1, e=2, i=17, o=17, routing="one", capacity=M - 1, packed_out=False),
    "many-experts": Experts(t=5, k=1, e=17, i=3, o=3, packed_out=False),
}
WIDE_EXPERTS = ("one-of-all", "33-17-15", "last-expert-summed", "transposed", "slice", "capacity-over")


def check_experts(case: Experts, dtype: torch.dtype = FLOAT) -> None:
    inputs = expert_cases.Inputs(case, dtype)
    check(inputs.linear, experts.linear, expert_reference._linear, activation="silu")
    check(inputs.weight_grad, experts.weight_grad, expert_reference._weight_grad)


@named(EXPERTS)
def test_experts(case):
    check_experts(case)


@pytest.mark.parametrize("name", WIDE_EXPERTS)
def test_experts_with_wide_offsets(name, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    check_experts(EXPERTS[name])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("o,i", [(24, 16)])
def test_experts_with_weights_by_tma(o, i, transposed):
    case = Experts(t=M + 1, k=1, e=2, i=i, o=o, routing="one", transposed=transposed)
    check_experts(case, BFLOAT)
    for gated, interleaved in ((True, False), (True, True), (False, False)):
        method = expert_cases.mlp(replace(case, packed_out=False), BFLOAT, "silu", gated, interleaved, True)
        check(method, experts.mlp, mlp_reference._mlp)


@of_offsets
@pytest.mark.parametrize("r,size", [(0, 3), (3, 0), (1, 1), (M - 1, 63), (M, 64), (M + 1, 65)])
def test_expert_activations_and_rows(r, size, limit, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_LIMIT", limit)
    calling = expert_cases.calling
    for gated, interleaved in ((True, False), (True, True), (False, False)):
        z, grad = random_tensor(r, size * (2 if gated else 1)), random_tensor(r, size)
        options = ("silu", gated, interleaved, 1.702, 2.1)
        check(calling((z,), *options), experts.activation, expert_activations._activation)
        check(calling((grad, z), *options), experts.activation_grad, expert_activations._activation_grad)
    for routing, capacity in (("one", None), ("dropped", None), ("one", 0), ("one", max(0, r - 1))):
        case = Experts(t=r, k=2, e=2, i=size, o=size, routing=routing, capacity=capacity, weighted=True)
        inputs = expert_cases.Inputs(case, FLOAT)
        x, grad, weight = inputs.x.nan_to_num(1), inputs.grad, inputs.row_weight
        check(calling((x, weight), *inputs.indices), experts.gather, expert_rows._gather)
        check(calling((grad, weight), *inputs.indices), experts.combine, expert_rows._combine)
        check(calling((x, grad), False, *inputs.indices), experts.dots, expert_rows._dots)


def test_every_kernel_was_launched(request):
    """A new kernel needs edges here."""
    if request.config.option.keyword or any("::" in name for name in request.config.args):
        pytest.skip("a part of the file")
    modules = [import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    every = {
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert len(every) > 20 and not every - interpreter.launched, sorted(every - interpreter.launched)
