"""Convolution on the live channels of each sample in Triton: ``conv`` and ``conv_input_grad``.

``conv_weight_grad`` is in ``channels_weight_grad.py``, ``gather`` and ``scatter`` in ``channel_lists.py``. The
signatures and the meaning are those of the reference in ``dynops/ops/channels/conv.py``. Nothing here reads a
count on the host, and nothing uses atomics: every result is bitwise reproducible.

**Forward.** An implicit GEMM for each (sample, group or head). A program owns a tile of the sample's output
pixels and of its live output channels. It walks over (tap, block of live input channels), accumulates in
float32 and applies the epilogue in registers. Then it spreads its columns out to the channels between its first and
its last live one, with zeros or ``base`` between them, and stores vectors of 16 bytes. The first and last channel of a
tile are multiples of 8, so every element of the output is written once. Samples that share their lists are one job.

Single channels, taken through a list, are loads of 2 or 4 bytes. Tensors that are read often are compacted
first and then read in vectors: the input where the kernel has several taps or the outputs several tiles, and the
weight. It gets a copy for each job, if these take no more than twice the memory of the maps (a rule of thumb, not measured).

**Input gradient.** The same kernel on the adjoint geometry, with the lists and the roles of the weight
exchanged. Each head has an input gradient of its own, and these are summed.

Groups narrower than 16 channels (depthwise above all) use a kernel without a matrix product.
Jobs may have weights of their own (``Own``): ``sample_conv.py`` is made of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..layout import contiguous, empty_map
from ..lists import Lists
from . import channel_lists, gemm, tiling
from .channel_filters import regions_met
from .channel_lists import VECTOR, Side, boundary, choose, gather, list_part, listed, scatter, sides, tiles_of
from .channels_weight_grad import conv_weight_grad
from .experts import expert_tile
from .gemm import finish, lowest_tap, source_row
from .launch import cdiv, launch, power_of_2
from .rows import picked

_UNSPECIALIZED = [*gemm.UNSPECIALIZED, "jobs", "regions"]
MOST_REGIONS = 62  # those that a tile meets are bits of one integer
__all__ = ["conv", "conv_input_grad", "conv_weight_grad", "gather", "scatter"]

# ------------------------------------------------------------------------------------- kernels


@triton.jit
def _pixels(order, offsets, rows, jobs, n_tiles, JOBS: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr):
    """A program's job, its tile in the job, the tile's rows and pixels, which of them exist, and whether there is a weight."""
    if order is None:
        m_tiles = tl.cdiv(rows, M)
        job = tl.program_id(0) // (m_tiles * n_tiles)
        tile = tl.program_id(0) - job * (m_tiles * n_tiles)
        row = (tile // n_tiles) * M + tl.arange(0, M)
        pixel = row + (job.to(tl.int64) * rows if WIDE else job * rows)
        inside = row < rows
        weighted = job < jobs
    else:
        tile = tl.program_id(0)
        job, begin, last = expert_tile(offsets, tile // n_tiles, rows, jobs, M, JOBS)
        row = begin + tl.arange(0, M)
        inside = row < last
        pixel = tl.load(order + row, mask=inside, other=0)
        if WIDE:
            pixel = pixel.to(tl.int64)
        weighted = (job < jobs) & (begin < last)
    return job, tile, row, pixel, inside, weighted


@triton.jit
def _expand(z, out, base, channel, at, inside, begin, end, M: tl.constexpr, N: tl.constexpr):
    """Stores channels [begin, end) of rows: z [M, N] at those that are in the ascending ``channel``, else base or zero."""
    HALF: tl.constexpr = z.dtype.primitive_bitwidth == 16
    if HALF:
        low, high = tl.split(tl.reshape(z.to(tl.int16, bitcast=True), (M, N // 2, 2)))
        words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        words = z.to(tl.int32, bitcast=True)
    passed = tl.sum(((channel >= 0) & (channel < begin)).to(tl.int32), 0)  # slots of the tile before
    for start in range(begin, end, 32):
        target = start + tl.arange(0, 32)
        inner = channel - start
        here = (inner >= 0) & (inner < 32)
        bits = tl.sum(tl.where(here, 1 << tl.where(here, inner, 0), 0), 0)
        present = (bits >> tl.arange(0, 32)) & 1
        slot = passed + tl.cumsum(present, 0) - present
        passed += tl.sum(present, 0)
        live = present > 0
        slot = tl.minimum(slot, N - 1)
        value = picked(words, slot, HALF, M, 32).to(z.dtype, bitcast=True)
        to = at[:, None] + target[None, :]
        mask = inside[:, None] & (target < end)[None, :]
        below = tl.zeros([M, 32], z.dtype)
        if base is not None:
            below = tl.load(base + to, mask=mask)
        tl.store(out + to, tl.where(live[None, :], value, below), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def conv_kernel(
    x, w, out, in_index, in_count, out_index, out_count, order, offsets, region, bias, scale, base,
    rows, jobs, regions, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, k_part, inner,
    w_group, w_job, w_region, bias_job, in_channels, out_channels, in_lists, in_length, out_lists, out_length,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, IN_PARTS: tl.constexpr,
    IN_STEPS: tl.constexpr, OUT_PARTS: tl.constexpr, OUT_STEPS: tl.constexpr, X_READS: tl.constexpr,
    W_PACKED: tl.constexpr, PACKED_OUT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    JOBS: tl.constexpr, REGIONS: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of the pixels and of the output channels of one group of a job; ``rows`` pixels a job.

    X_READS: "slots", channel k of group h lies at ``h*k_part + k`` of a row of x; "listed", the list's entry k
    does; "packed", the group's part of the packed channels. The weight is ``[n, taps, inner]`` in each
    group, transposed ``[k, taps, inner]``; W_PACKED: the live part of it, for each job.

    With ``order`` the pixels of all jobs are listed, those of job j from ``offsets[j]`` to ``offsets[j + 1]``; what is
    listed after the last job has no weight, and is zero. With ``region`` each pixel of x names the weight that it meets.
    """
    EXPANDS: tl.constexpr = out_index is not None and not PACKED_OUT
    n_tiles = tiles_of(n_size, EXPANDS, N)
    group = tl.program_id(1)
    job, tile, row, pixel, inside, weighted = _pixels(order, offsets, rows, jobs, n_tiles, JOBS, WIDE, M)
    first = (tile % n_tiles) * N
    slot = first + tl.arange(0, N)
    k_part_at = group * k_part
    k_live = k_size
    k_read = k_size
    if in_index is not None:
        k_list, before, k_live = list_part(in_index, in_count, job, group, in_lists, in_length, k_size, IN_PARTS, IN_STEPS)  # fmt: skip
        k_read = k_live
        if X_READS == "slots":  # compact: zero up to a multiple of 16
            k_read = tl.cdiv(k_live, 16) * 16
        if X_READS == "packed":
            k_part_at = before
    n_live = n_size
    if order is not None:
        n_live = tl.where(weighted, n_size, 0)
    n_before = group * n_size
    channel = slot  # within the group
    n_at = slot  # in the weight
    if out_index is not None:
        n_list, n_before, n_live = list_part(out_index, out_count, job, group, out_lists, out_length, n_size, OUT_PARTS, OUT_STEPS)  # fmt: skip
        if EXPANDS:
            step = tl.where(n_live <= N, N, N - VECTOR)
            first = (tile % n_tiles) * step  # its own slots begin up to a vector later: weights are vectors
            begin, _ = boundary(n_list, first, n_live, group, n_size, OUT_PARTS)
            end, n_live = boundary(n_list, first + step, n_live, group, n_size, OUT_PARTS)
            slot = first + tl.arange(0, N)
        channel = listed(n_list, slot, slot < n_live, group, n_size, OUT_PARTS)
        n_at = slot if W_PACKED else channel
    n_mask = slot < n_live
    w_group_at = w + group.to(tl.int64) * w_group + job.to(tl.int64) * w_job
    reduction = tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    tap = 0
    start = 0
    walked = tl.where(first < n_live, TAPS, 0)
    if region is not None:
        left, met = regions_met(
            region, pixel, inside, row, regions, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, REGIONS, WIDE,
        )  # fmt: skip
        place = lowest_tap(left)
        walked *= met
    for _ in range(walked * tl.cdiv(k_live, K)):
        k = start + reduction
        k_mask = k < k_live
        k_at = k
        x_channel = k
        if in_index is not None and (X_READS == "listed" or not W_PACKED):
            entry = listed(k_list, k, k_mask, group, k_size, IN_PARTS)
            if X_READS == "listed":
                x_channel = entry
            if not W_PACKED:
                k_at = entry
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        w_at = w_group_at
        if region is not None:
            valid &= tl.load(region + at, mask=valid, other=-1) == place
            w_at += place.to(tl.int64) * w_region
        x_at = at[:, None] * in_channels + (k_part_at + x_channel)[None, :]
        a = tl.load(x + x_at, mask=valid[:, None] & (k < k_read)[None, :], other=0.0)
        if TRANSPOSED:
            w_at += k_at[:, None] * (TAPS * inner) + tap * inner + n_at[None, :]
            w_mask = k_mask[:, None] & (slot < (tl.cdiv(n_live, 16) * 16 if W_PACKED else n_live))[None, :]
        else:
            w_at += n_at[None, :] * (TAPS * inner) + tap * inner + k_at[:, None]
            w_mask = (k < (tl.cdiv(k_live, 16) * 16 if W_PACKED else k_live))[:, None] & n_mask[None, :]
        b = tl.load(w_at, mask=w_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        start += K
        done = start >= k_live
        start = tl.where(done, 0, start)
        tap += done.to(tl.int32)
        if region is not None:
            done = tap == TAPS
            tap = tl.where(done, 0, tap)
            left = tl.where(done, left & (left - 1), left)
            place = lowest_tap(left)
    channel += group * n_size
    if bias is not None:
        bias += job.to(tl.int64) * bias_job
    if scale is not None:
        scale += job.to(tl.int64) * (n_size * tl.num_programs(1))
    z = finish(acc, bias, scale, None, None, None, row, channel, inside, n_mask, out_channels, ACTIVATION, WIDE)  # fmt: skip
    z = z.to(out.dtype.element_ty)
    if EXPANDS:
        at = pixel * out_channels
        _expand(
            z,
            out,
            base,
            tl.where(n_mask, channel, -1),
            at,
            inside,
            group * n_size + begin,
            group * n_size + end,
            M,
            N,
        )
        return
    target = channel
    stored = slot < n_size
    if PACKED_OUT:  # the groups lack as many channels of their sizes as the list lacks of all
        target = n_before + slot
        if OUT_PARTS == "groups":
            total = tl.minimum(tl.load(out_count + job * out_lists), out_length)
            target = tl.where(n_mask, target, total + group * n_size - n_before + slot - n_live)
        stored &= target < out_channels
    at = pixel[:, None] * out_channels + target[None, :]
    if PACKED_OUT:
        z = tl.where(n_mask[None, :], z, 0.0)
    tl.store(out + at, z, mask=inside[:, None] & stored[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def direct_conv_kernel(
    x, w, out, in_slots, out_slots, order, offsets, region, bias, scale, base,
    rows, jobs, regions, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, channels_in, channels_out,
    w_job, w_region, bias_job, in_channels, out_channels, in_lists, out_lists,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr, ACTIVATION: tl.constexpr, JOBS: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """conv_kernel without a matrix product, for narrow groups; a tile spans groups.

    ``in_slots``, ``out_slots``: where in a list a channel is, or -1. What is packed and past the end of a list
    is not written.
    """
    n_tiles = tl.cdiv(channels_out, N)
    job, tile, row, pixel, inside, weighted = _pixels(order, offsets, rows, jobs, n_tiles, JOBS, WIDE, M)
    channel = (tile % n_tiles) * N + tl.arange(0, N)
    present = channel < channels_out
    live = channel < tl.where(weighted, channels_out, 0)
    target = channel
    if out_slots is not None:
        slot = tl.load(
            out_slots + job.to(tl.int64) * out_lists * channels_out + channel, mask=present, other=-1
        )
        live = slot >= 0
        if PACKED_OUT:
            target = slot
            present = live
    group = channel // n_size
    w += job.to(tl.int64) * w_job
    acc = tl.zeros([M, N], tl.float32)
    for tap in range(TAPS):
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        if region is not None:
            place = tl.load(region + at, mask=valid, other=-1)
            valid &= (place >= 0) & (place < regions)
            w_row = w + place.to(tl.int64) * w_region
        for k in range(k_size):
            x_channel = group * k_size + k
            read = live
            if TRANSPOSED:
                w_at = (x_channel * TAPS + tap) * n_size + channel % n_size
            else:
                w_at = (channel * TAPS + tap) * k_size + k
            if in_slots is not None:
                slot = tl.load(in_slots + job.to(tl.int64) * in_lists * channels_in + x_channel, mask=live, other=-1)  # fmt: skip
                read = slot >= 0
                if PACKED_IN:
                    x_channel = slot
            a = tl.load(x + at[:, None] * in_channels + x_channel[None, :], mask=valid[:, None] & read[None, :], other=0.0)  # fmt: skip
            if region is None:
                b = tl.load(w + w_at, mask=read, other=0.0)[None, :]
            else:
                b = tl.load(w_row[:, None] + w_at[None, :], mask=valid[:, None] & read[None, :], other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)
    if bias is not None:
        bias += job.to(tl.int64) * bias_job
    if scale is not None:
        scale += job.to(tl.int64) * channels_out
    z = finish(acc, bias, scale, None, None, None, row, channel, inside, live, out_channels, ACTIVATION, WIDE)
    at = pixel[:, None] * out_channels + target[None, :]
    if out_slots is not None and not PACKED_OUT:
        z = tl.where(live[None, :], z, 0.0)
        if base is not None:
            z += tl.load(base + at, mask=inside[:, None] & (present & ~live)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside[:, None] & present[None, :])


# ----------------------------------------------------------------------------------- launchers


def conv(
    x, weight, bias, lists: Lists, geometry, heads: int, activation: str, scale, base, packed_in: bool, out_width: int
) -> Tensor:  # fmt: skip
    """See ``ops.channels.conv._conv``."""
    g = ConvGeometry(*geometry)
    ins, outs = sides(weight.shape, lists, g, heads, packed_in, out_width >= 0)
    channels = weight.shape[0] if out_width < 0 else out_width
    out = empty_map(x, (g.batch, channels, g.out_h, g.out_w), torch.channels_last)
    if out_width > weight.shape[0]:  # a list padded past all channels: no program covers the rest
        out.zero_()
    w = gemm.weight_rows(weight, x.dtype, ins.groups)
    product(x, w, out, ins, outs, g._replace(groups=ins.groups), bias, activation, scale, base)
    return out


def conv_input_grad(
    grad, weight, lists: Lists, geometry, heads: int, in_width: int, packed_out: bool
) -> Tensor:
    """See ``ops.channels.conv._conv_input_grad``."""
    g = ConvGeometry(*geometry)
    ins, outs = sides(weight.shape, lists, g, heads, in_width >= 0, packed_out)
    channels = weight.shape[1] * ins.groups
    shape = (g.batch, channels if in_width < 0 else in_width, g.in_h, g.in_w)
    dx = empty_map(grad, shape, torch.channels_last)
    if in_width > channels:
        dx.zero_()
    w = gemm.weight_rows(weight, grad.dtype, ins.groups)
    product(grad, w, dx, outs, ins, gemm.adjoint(g._replace(groups=ins.groups)))
    return dx if heads == 1 else dx.unflatten(1, (heads, -1)).sum(1)


class Own(NamedTuple):
    """Weights that differ between pixels: those of ``jobs``, which are samples or regions.

    Attributes:
        order, offsets: as in ``ExpertPlan``, the pixels of each job, and at last those that have no weight; None: a job
            is a sample.
        region: int32 ``[N, h, w]`` at x, in an input gradient: which of its sample's ``regions`` weights a pixel meets;
            None: there is one.
    """

    jobs: int
    order: Tensor | None = None
    offsets: Tensor | None = None
    region: Tensor | None = None
    regions: int = 0


def product(
    x: Tensor,
    w: Tensor,  # [A, taps, B] as gemm.weight_rows has it; of each job: [jobs or 1, (regions,) A, taps, B]
    out: Tensor,  # channels_last
    ins: Side,  # of x: for an input gradient those of the convolution's outputs
    outs: Side,
    g: ConvGeometry,  # of this product: the adjoint one for an input gradient; heads are groups
    bias: Tensor | None = None,  # [O]; of each job: [jobs or 1, O]
    activation: str = "",
    scale: Tensor | None = None,
    base: Tensor | None = None,
    own: Own | None = None,
) -> None:
    """Chooses the kernel and launches it: out = epilogue(sum over taps of weight x)."""
    if out.numel() == 0:
        return
    if own is None:
        own = Own(g.batch if scale is not None or ins.per_sample or outs.per_sample else 1)
    rows, maps = g.batch * g.out_h * g.out_w, x.numel() + out.numel()
    each, listed = cdiv(rows, own.jobs), own.order is not None
    x, bias, scale, wide = gemm.rows_of(x), contiguous(bias), contiguous(scale), gemm.is_wide(x, out)
    arguments = own._asdict() | {
        "bias": bias, "scale": scale, "base": None if base is None else gemm.rows_of(base),
        "rows": rows if listed else each, "k_size": ins.size, "n_size": outs.size, "out_channels": out.shape[1],
        "w_region": w.stride(1) if w.dim() == 5 else 0, "w_job": 0 if w.dim() == 3 or w.shape[0] == 1 else w.stride(0),
        "bias_job": 0 if bias is None or bias.dim() == 1 or bias.shape[0] == 1 else bias.stride(0),
        **gemm.geometry_arguments(g), "PACKED_OUT": outs.packed, "ACTIVATION": activation, "WIDE": wide,
        "JOBS": min(1024, power_of_2(own.jobs)) if listed else 1,
    }  # fmt: skip

    def tiles(m: int) -> int:
        return rows // m + own.jobs + 1 if listed else own.jobs * cdiv(each, m)

    if gemm.is_narrow({"k_size": ins.size, "n_size": outs.size}, g.groups) and not (ins.heads or outs.heads):
        _direct(x, w, out, ins, outs, arguments, tiles)
        return
    x, w, operands, constants, single = _operands(x, w, ins, outs, g, own.jobs, maps)
    # two tiles at least, where only some channels are live: one past those costs little
    n = outs.size if outs.index is None else max(16, outs.size // 2)
    single |= own.region is not None
    heavy = wide or (listed and single)  # of 128 x 128 elements it spills
    tile, precision = choose(
        x, each, n, ins.capacity, own.jobs * g.groups, single, base is not None, heavy, family="channels"
    )
    with gemm.on_device(x):
        launch(conv_kernel, tiles(tile["M"]) * channel_lists.output_tiles(outs, tile["N"]), g.groups)(
            x, w, out, **ins.arguments("in"), **outs.arguments("out"), **(arguments | operands), **constants,
            PRECISION=precision, REGIONS=31 if own.regions <= 31 else MOST_REGIONS, **tile,
        )  # fmt: skip


def _operands(x: Tensor, w: Tensor, ins: Side, outs: Side, g: ConvGeometry, jobs: int, maps: int) -> tuple:
    """x and the weight as the kernel reads them, compacted where that pays; the kernel's arguments for them; and
    whether it loads single channels. ``maps``: the elements of input and output."""
    inner, lead = (outs, ins) if g.transposed else (ins, outs)
    reads = "slots" if ins.index is None else "packed" if ins.packed else "listed"
    k_part = 0 if ins.heads else ins.size
    has_entries = min(ins.capacity, outs.capacity) > 0
    packs = has_entries and inner.index is not None and jobs * w.numel() <= 2 * maps
    if packs:
        w = channel_lists.pack_weight(w, inner, lead, jobs)
        operands = {"inner": w.shape[4], "w_group": w.stride(1), "w_job": w.stride(0)}
    else:
        operands = {"inner": w.shape[-1], "w_group": lead.size * w.stride(-3)}
    if has_entries and ins.index is not None and channel_lists.is_read_often(g.taps, outs):
        x, reads, k_part = channel_lists.compact(x, ins), "slots", channel_lists.padded(ins.capacity)
    operands |= {"k_part": k_part, "in_channels": x.shape[1]}
    single = reads != "slots" or tiling.is_ragged(operands) or (inner.index is not None and not packs)
    return x, w, operands, {"X_READS": reads, "W_PACKED": packs}, single


def _direct(x, w, out, ins: Side, outs: Side, arguments: dict, tiles: Callable) -> None:
    if outs.packed:
        out.zero_()
    whole = ins.whole, outs.whole
    tile = tiling.direct_tile(whole[1].size)
    slots = dict(zip(("in_slots", "out_slots"), map(channel_lists.slots, whole), strict=True))
    with gemm.on_device(x):
        launch(direct_conv_kernel, tiles(tile["M"]) * cdiv(whole[1].size, tile["N"]))(
            x, w, out, **slots, channels_in=whole[0].size, channels_out=whole[1].size, in_channels=x.shape[1],
            in_lists=ins.per_sample, out_lists=outs.per_sample, PACKED_IN=ins.packed, **arguments, **tile,
        )  # fmt: skip
