"""Arguments for every op: both plan forms, both memory formats, with and without gradients and epilogues."""

import functools

import torch
from on_gpu import moved

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops
from dynops.geometry import BlockGeometry, ConvGeometry
from dynops.testing import available_backends, in_layout, random_mask, random_tensor


def _plans():
    mask = random_mask((2, 5, 6), 0.4)
    return [("compact", PixelPlan.from_mask(mask)), ("capacity", PixelPlan.from_mask(mask, 40))]


def index_samples():
    mask = random_mask((2, 5, 6), 0.4)
    for dtype in (torch.bool, torch.float32):
        yield "mask_to_index", (mask.to(dtype),)
        yield "mask_to_index_capacity", (mask.to(dtype), 20)
    for geometry in (
        ConvGeometry(2, 7, 8, 5, 6, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0),
        ConvGeometry(2, 4, 3, 5, 6, 2, 2, 1, 2, 0, 0, 1, 1, 1, 1),
    ):
        for _, plan in _plans():
            yield "needed_mask", (plan.index, plan.count, list(geometry))
    for _, plan in _plans():
        yield "inverse_index", (plan.index, plan.count, [2, 5, 6])
        yield "nearest_pixel", (plan.index, plan.count, [2, 5, 6])


def row_samples():
    for layout in ("nchw", "channels_last", "strided"):
        x = in_layout(random_tensor(2, 4, 5, 6), layout)
        for _, plan in _plans():
            yield "gather_rows", (x.detach().requires_grad_(), plan.index, plan.count)
            rows = random_tensor(plan.num_rows, 4).requires_grad_()
            for base in (None, x.detach().requires_grad_()):
                yield "scatter_rows", (rows, plan.index, plan.count, [2, 5, 6], base)
                yield "scatter_planes", (rows, plan.index, plan.count, [2, 5, 6], base)
    for capacity in (None, 4):
        plan = SamplePlan.from_mask(torch.tensor([1, 0, 1, 1, 0]), capacity)
        rows, base = random_tensor(plan.num_rows, 6).requires_grad_(), random_tensor(5, 6).requires_grad_()
        for scale in (None, random_tensor(plan.num_rows).requires_grad_()):
            yield "merge_rows", (rows, plan.index, plan.count, base, scale, False)
        yield "merge_rows", (rows, plan.index, plan.count, base, scale, True)


def conv_samples(backend: str):
    """Both plan forms, dense and packed on either side, with gradients and with an epilogue."""
    g = list(ConvGeometry(2, 6, 7, 5, 6, 2, 2, 1, 1, 0, 0, 1, 1, 2, 0))
    source = PixelPlan.from_mask(random_mask((2, 6, 7), 0.6))
    weight, bias = random_tensor(6, 2, 2, 2), random_tensor(6)
    norm = {"scale": random_tensor(6), "shift": random_tensor(6)}
    for _, plan in _plans():
        index, count, rows = plan.index, plan.count, plan.num_rows
        for layout in ("nchw", "channels_last", None):
            x = (
                random_tensor(len(source), 4)
                if layout is None
                else in_layout(random_tensor(2, 4, 6, 7), layout)
            )
            inverse = source.inverse() if layout is None else None
            for packed in (False, True):
                plain = ("", None, None, None, None)
                base = None if packed else random_tensor(2, 6, 5, 6)
                grads = [t.clone().requires_grad_() for t in (x, weight, bias)]
                yield (
                    "pixel_conv",
                    (*grads, index, count, inverse, g, *plain, base, packed, None, True, False, backend),
                )
                full = ("silu", *norm.values(), random_tensor(rows), random_tensor(rows, 6))
                yield (
                    "pixel_conv",
                    (x, weight, None, index, count, inverse, g, *full, base, packed, 7, True, False, backend),
                )
                dy = (
                    random_tensor(rows, 6)
                    if packed
                    else in_layout(random_tensor(2, 6, 5, 6), layout or "channels_last")
                )
                dx = (dy, weight, index, count, inverse, len(x) if layout is None else 0, g, packed, backend)
                yield "pixel_conv_input_grad", dx
                for wanted in (True, False):
                    dw = (dy, x, index, count, inverse, [6, 2, 2, 2], g, packed, wanted, backend)
                    yield "pixel_conv_weight_grad", dw


def block_samples():
    """Both plan forms, tiles side by side and overlapping, both formats, one channel too."""
    mask = random_mask((2, 5, 6), 0.1)
    for given in (mask, mask.long(), mask.to(torch.bfloat16)):
        for mean, threshold in ((False, 0.0), (True, 0.2)):
            geometry = BlockGeometry(2, 5, 6, 2, 3, 3, 2, -1, 0, 3, 4)
            yield "block_mask", (given, list(geometry), mean, threshold)
    for capacity, side in ((None, 2), (7, 2), (None, 3)):
        plan = BlockPlan.from_mask(mask, 2, capacity=capacity)
        geometry = plan.geometry.widened((side - 2,) * 4)
        index, count, g = plan.index, plan.count, list(geometry)
        yield "block_cover", (index, count, g)
        if count is None:
            yield "block_pixels", (index, g)
        for layout, channels in (("nchw", 4), ("channels_last", 4), ("channels_last", 1), ("strided", 4)):
            x = in_layout(random_tensor(2, channels, 5, 6), layout)
            yield "gather_tiles", (x.detach().requires_grad_(), index, count, g)
            size = (len(plan), channels, geometry.tile_h, geometry.tile_w)
            tiles = in_layout(random_tensor(*size), layout).detach().requires_grad_()
            for base in (None, x.detach().requires_grad_()):
                for add in (True,) if geometry.overlaps else (False, True):
                    yield "scatter_tiles", (tiles, index, count, g, base, add)


def block_conv_samples():
    """Both plan forms and formats, with gradients and with an epilogue; channels as TMA takes them, and others."""
    g = list(ConvGeometry(2, 6, 7, 5, 6, 2, 2, 1, 1, 0, 0, 1, 1, 1, 0))
    mask = random_mask((2, 5, 6), 0.1)
    for capacity, layout, c, o in (
        (None, "channels_last", 16, 32),
        (7, "nchw", 16, 16),
        (None, "strided", 4, 6),
    ):
        plan = BlockPlan.from_mask(mask, 2, capacity=capacity)
        x, base = (in_layout(random_tensor(2, *size), layout) for size in ((c, 6, 7), (o, 5, 6)))
        weight, vector = random_tensor(o, c, 2, 2), random_tensor(o)
        pixels = plan.pixels()
        at = (pixels.index, pixels.count) if capacity is None else (None, None)
        where = plan.index, plan.count, *at, list(plan.geometry), g
        leaves = [t.detach().requires_grad_() for t in (x, weight, vector, base)]
        yield "block_conv", (*leaves[:3], *where, "", None, None, None, leaves[3])
        yield "block_conv", (x, weight, None, *where, "silu", vector, vector, base, None)


def channel_copy_samples():
    for plan in (ChannelPlan.from_mask(torch.rand(2, 5) < 0.5, 3), ChannelPlan.prefix(2, 5)):
        yield "channel_mask", (plan.index, plan.count, 5)
        for layout in ("nchw", "channels_last", "strided"):
            x = in_layout(random_tensor(2, 5, 3, 4), layout)
            yield "gather_channels", (x.detach().requires_grad_(), plan.index, plan.count, plan.width)
            rows = in_layout(random_tensor(2, plan.width, 3, 4), layout).detach().requires_grad_()
            for base in (None, x.detach().requires_grad_()):
                yield "scatter_channels", (rows, plan.index, plan.count, 5, base)
    for dtype in (torch.bool, torch.float32):
        for size in (5, 3):
            yield "channel_index", ((torch.rand(2, 5) < 0.5).to(dtype), size)


def channel_samples(backend: str):
    """Dense and packed on either side, shared lists and heads, with gradients and with an epilogue."""
    g = list(ConvGeometry(2, 6, 7, 5, 6, 2, 2, 1, 1, 0, 0, 1, 1, 1, 0))
    weight, bias = random_tensor(6, 4, 2, 2), random_tensor(6)
    ins = ChannelPlan.from_mask(torch.rand(2, 4) < 0.5, 3)
    headed = ChannelPlan.from_mask(torch.rand(2, 2, 4) < 0.5)
    outs, shared = ChannelPlan.from_mask(torch.rand(2, 6) < 0.5, 4), ChannelPlan.prefix(3, 6)
    for plan, out, packed, layout in (
        (ins, outs, False, "nchw"), (ins, outs, True, "channels_last"), (None, shared, False, "channels_last"),
        (headed, None, False, "strided"), (None, shared, True, "nchw"),
    ):  # fmt: skip
        heads, packed_in = (1 if plan is None else plan.heads), packed and plan is not None
        width = out.width if packed else -1
        lists = (*(_lists(plan)), *(_lists(out)))
        x = in_layout(random_tensor(2, plan.width if packed_in else 4, 6, 7), layout)
        base = None if packed else random_tensor(2, 6, 5, 6)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        yield "channel_conv", (*leaves, *lists, g, heads, "", None, base, packed_in, width, backend)
        full = ("silu", random_tensor(2, 6), base)
        yield "channel_conv", (x, weight, None, *lists, g, heads, *full, packed_in, width, backend)
        dy = in_layout(random_tensor(2, width if packed else 6, 5, 6), layout)
        in_width = plan.width if packed_in else -1
        yield "channel_conv_input_grad", (dy, weight, *lists, g, heads, in_width, packed, backend)
        for wanted in (True, False):
            dw = (dy, x, *lists, [6, 4, 2, 2], g, heads, packed_in, packed, wanted, backend)
            yield "channel_conv_weight_grad", dw


def _lists(plan):
    return (None, None) if plan is None else (plan.index, plan.count)


def weighted_samples(backend: str):
    """Weights of each sample, of regions and mixed ones, both formats, with gradients and an activation."""
    g = list(ConvGeometry(2, 6, 7, 5, 6, 2, 2, 1, 1, 0, 0, 1, 1, 2, 0))
    region = torch.randint(0, 3, (2, 5, 6), dtype=torch.int32)
    for layout in ("nchw", "channels_last"):
        x, dy = (in_layout(random_tensor(2, *size), layout) for size in ((4, 6, 7), (6, 5, 6)))
        mixed = x, random_tensor(3, 6, 2, 2, 2), random_tensor(2, 3), random_tensor(2, 1, 6)
        yield "mixed_conv", (*(t.clone().requires_grad_() for t in mixed), g, "", backend)
        yield "mixed_conv", (*mixed, g, "silu", backend)
        for batch, regions, at in ((2, 1, None), (1, 1, None), (2, 3, region), (1, 3, region)):
            weight, bias = random_tensor(batch, regions, 6, 2, 2, 2), random_tensor(batch, regions, 6)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            yield "weighted_conv", (*leaves, at, g, "", backend)
            yield "weighted_conv", (x, weight, None, at, g, "relu", backend)
            yield "weighted_conv_input_grad", (dy, weight, at, g, backend)
            for wanted in (True, False):
                yield "weighted_conv_weight_grad", (dy, x, at, list(weight.shape), g, wanted, backend)


def output_mask_samples(backend: str):
    """With and without a bias and a partial, a part of the input's channels, both formats."""
    g = list(ConvGeometry(2, 6, 7, 6, 4, 3, 3, 1, 2, 1, 1, 1, 1, 2, 0))
    mask, weight = torch.rand(2, 6, 6, 4) < 0.4, random_tensor(6, 2, 3, 3)
    for layout in ("nchw", "channels_last", "strided"):
        x, partial = (in_layout(random_tensor(2, c, h, w), layout) for c, h, w in ((7, 6, 7), (6, 6, 4)))
        tensors = [t.detach().requires_grad_() for t in (x, weight, random_tensor(6), partial)]
        yield "masked_output_conv", (*tensors[:3], in_layout(mask, layout), tensors[3], 2, g, backend)
        yield "masked_output_conv", (tensors[0], weight, None, mask, None, 0, g, backend)


def local_samples(backend: str):
    """With a stride, upsampled, both formats."""
    for geometry in (
        ConvGeometry(2, 6, 7, 3, 4, 3, 3, 2, 2, 1, 1, 1, 1, 2, 0),
        ConvGeometry(2, 6, 7, 4, 7, 3, 1, 1, 1, 0, 0, 1, 1, 2, 0),
    ):
        for layout, upsample in (("nchw", 1), ("channels_last", 2), ("strided", 1)):
            size, g = (geometry.out_h * upsample, geometry.out_w * upsample), list(geometry)
            x, kernels, dy = (
                in_layout(random_tensor(2, *shape), layout)
                for shape in ((4, 6, 7), (2 * geometry.taps, *size), (4, *size))
            )
            leaves = [t.detach().requires_grad_() for t in (x, kernels)]
            yield "local_conv", (*leaves, g, upsample, backend)
            yield "local_conv_input_grad", (dy, kernels, g, upsample, backend)
            yield "local_conv_kernel_grad", (dy, x, g, upsample, backend)


def expert_samples(backend: str):
    """Dropped pairs, packed and not, transposed, of eight bits, with gradients and with an activation."""
    index = torch.randint(0, 4, (5, 2))
    plan, shares = ExpertPlan.from_topk(index, 3), random_tensor(5, 2)
    indices = plan.order, plan.offsets, plan.position
    tokens, rows, dy = random_tensor(5, 6), random_tensor(10, 6), random_tensor(5, 4)
    for limit in (-1, 2):
        yield "expert_index", (index, 3, limit)
    for packed_in, packed_out, transposed in (
        (False, True, False),
        (True, False, True),
        (False, False, False),
    ):
        x = rows if packed_in else tokens
        weight, bias = random_tensor(3, *((6, 4) if transposed else (4, 6))), random_tensor(3, 4)
        options = packed_in, packed_out, transposed
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, shares)]
        yield "grouped_linear", (*leaves[:2], None, *leaves[2:], *indices, *options, "", backend)
        eight = ops.quantize_experts(weight, transposed)
        yield "grouped_linear", (x, *eight, None, None, *indices, *options, "silu", backend)
        upstream = random_tensor(10, 4) if packed_out else dy
        for wanted in (True, False):
            yield "grouped_weight_grad", (upstream, x, shares if wanted else None, *indices, packed_out, packed_in, transposed, wanted, backend)  # fmt: skip
    up, down, biases = (
        random_tensor(3, 8, 6),
        random_tensor(3, 6, 4),
        (random_tensor(3, 8), random_tensor(3, 6)),
    )
    flags = ("silu", True, False, False, False, 1.7, 7.0, backend)
    yield "experts_mlp", (tokens, up, down, None, None, *biases, shares, *indices, *flags)
    for activation, gated in (("clamped_swiglu", True), ("gelu", False)):
        for interleaved in (False, True):
            z, h = random_tensor(10, 8), random_tensor(10, 4 if gated else 8)
            options = activation, gated, interleaved, 1.7, 7.0, backend
            yield "expert_activation", (z.clone().requires_grad_(), *options)
            yield "expert_activation_grad", (h, z, *options)
    for given in (None, shares.clone().requires_grad_()):
        yield "gather_pairs", (tokens.clone().requires_grad_(), given, *indices, backend)
        yield "combine_pairs", (rows.clone().requires_grad_(), given, *indices, backend)
    for packed in (False, True):
        yield "pair_dots", (rows if packed else tokens, rows, packed, *indices, backend)


def samples(backends) -> list:
    """(name, arguments) for every op, on the CPU."""
    torch.manual_seed(0)
    every = [
        *index_samples(),
        *row_samples(),
        *block_samples(),
        *block_conv_samples(),
        *channel_copy_samples(),
    ]
    for backend in backends:
        every += [*conv_samples(backend), *channel_samples(backend), *expert_samples(backend)]
        every += [*weighted_samples(backend), *output_mask_samples(backend), *local_samples(backend)]
    return every


@functools.cache
def samples_on(device: str) -> dict[str, list]:
    """The arguments of every op by its name, on a device, for the backends that run there."""
    every: dict[str, list] = {}
    backends = ("triton", "reference") if device == "cuda" else available_backends()
    for name, arguments in samples(backends):
        every.setdefault(name, []).append(moved(arguments, device))
    return every


NAMES = sorted({name for name, _ in samples(("reference",))})
