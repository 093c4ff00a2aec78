"""Convolution on the live channels of each sample in Triton: ``conv`` and ``conv_input_grad``.

``conv_weight_grad`` is in ``channels_weight_grad.py``, ``gather`` and ``scatter`` in ``channel_lists.py``. The
signatures and the meaning are those of the reference in ``dynops/ops/channels/conv.py``. Nothing here reads a
count on the host, and nothing uses atomics: every result is bitwise reproducible.

**Forward.** An implicit GEMM for each (sample, group or head). A program owns a tile of the sample's output
pixels and of its output channels, in the order: live ones, then all others; it walks over (tap, block of
live input channels), accumulates in float32, applies the epilogue in registers and stores each column at its
channel. A tile past the live ones computes nothing and writes zeros, or ``base``: every element of the output
is written once. Samples that share their lists are one job.

Single channels, taken through a list, are loads of 2 or 4 bytes. Tensors that are read often are compacted
first and then read in vectors: the input where the kernel has several taps, and the weight. It gets a copy for
each job, if these take no more than twice the memory of the maps (a rule of thumb, not measured).

**Input gradient.** The same kernel on the adjoint geometry, with the lists and the roles of the weight
exchanged. Each head has an input gradient of its own, and these are summed.

Groups narrower than 16 channels (depthwise above all) use a kernel without a matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..layout import contiguous, empty_map
from ..lists import Lists
from . import channel_lists, gemm, tiling
from .channel_lists import Side, all_channels, choose, gather, list_part, listed, scatter, sides
from .channels_weight_grad import conv_weight_grad
from .gemm import finish, source_row

__all__ = ["conv", "conv_input_grad", "conv_weight_grad", "gather", "scatter"]

# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def conv_kernel(
    x, w, out, in_index, in_count, out_index, out_count, bias, scale, base,
    rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, k_part, inner, w_group, w_job,
    in_channels, out_channels, in_lists, in_length, out_lists, out_length,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, IN_PARTS: tl.constexpr,
    IN_STEPS: tl.constexpr, OUT_PARTS: tl.constexpr, OUT_STEPS: tl.constexpr, X_READS: tl.constexpr,
    W_PACKED: tl.constexpr, PACKED_OUT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of the pixels and of the output channels of one group of a job; ``rows`` pixels a job.

    X_READS: "slots", channel k of group h lies at ``h*k_part + k`` of a row of x; "listed", the list's entry k
    does; "packed", the group's part of the packed channels. The weight is ``[n, taps, inner]`` in each
    group, transposed ``[k, taps, inner]``; W_PACKED: the live part of it, for each job.
    """
    n_tiles = tl.cdiv(n_size, N)
    m_tiles = tl.cdiv(rows, M)
    job = tl.program_id(0) // (m_tiles * n_tiles)
    tile = tl.program_id(0) - job * (m_tiles * n_tiles)
    group = tl.program_id(1)
    row = (tile // n_tiles) * M + tl.arange(0, M)
    first = (tile % n_tiles) * N
    slot = first + tl.arange(0, N)
    pixel = row + (job.to(tl.int64) * rows if WIDE else job * rows)
    inside = row < rows
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
    n_before = group * n_size
    channel = slot  # within the group
    n_at = slot  # in the weight
    if out_index is not None:
        n_list, n_before, n_live = list_part(out_index, out_count, job, group, out_lists, out_length, n_size, OUT_PARTS, OUT_STEPS)  # fmt: skip
        if PACKED_OUT:
            channel = listed(n_list, slot, slot < n_live, group, n_size, OUT_PARTS)
        else:
            channel = all_channels(n_list, slot, n_live, group, n_size, OUT_PARTS, OUT_STEPS)
        if not W_PACKED:
            n_at = channel
    n_mask = slot < n_live
    w_group_at = w + group.to(tl.int64) * w_group
    if W_PACKED:
        w_group_at += job.to(tl.int64) * w_job
    reduction = tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    tap = 0
    start = 0
    walked = tl.where(first < n_live, TAPS, 0)
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
        x_at = at[:, None] * in_channels + (k_part_at + x_channel)[None, :]
        a = tl.load(x + x_at, mask=valid[:, None] & (k < k_read)[None, :], other=0.0)
        if TRANSPOSED:
            w_at = k_at[:, None] * (TAPS * inner) + tap * inner + n_at[None, :]
            w_mask = k_mask[:, None] & (slot < (tl.cdiv(n_live, 16) * 16 if W_PACKED else n_live))[None, :]
        else:
            w_at = n_at[None, :] * (TAPS * inner) + tap * inner + k_at[:, None]
            w_mask = (k < (tl.cdiv(k_live, 16) * 16 if W_PACKED else k_live))[:, None] & n_mask[None, :]
        b = tl.load(w_group_at + w_at, mask=w_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        start += K
        done = start >= k_live
        start = tl.where(done, 0, start)
        tap += done.to(tl.int32)
    channel += group * n_size
    if scale is not None:
        scale += job.to(tl.int64) * (n_size * tl.num_programs(1))
    z = finish(acc, bias, scale, None, None, None, row, channel, inside, n_mask, out_channels, ACTIVATION, WIDE)  # fmt: skip
    target = channel
    stored = slot < n_size
    if PACKED_OUT:  # the groups lack as many channels of their sizes as the list lacks of all
        target = n_before + slot
        if OUT_PARTS == "groups":
            total = tl.minimum(tl.load(out_count + job * out_lists), out_length)
            target = tl.where(n_mask, target, total + group * n_size - n_before + slot - n_live)
        stored &= target < out_channels
    at = pixel[:, None] * out_channels + target[None, :]
    if base is None:
        if out_index is not None:
            z = tl.where(n_mask[None, :], z, 0.0)
        tl.store(out + at, z.to(out.dtype.element_ty), mask=inside[:, None] & stored[None, :])
    else:
        tl.store(out + at, z.to(out.dtype.element_ty), mask=inside[:, None] & n_mask[None, :])
        if first + N > n_live:
            other = inside[:, None] & (stored & ~n_mask)[None, :]
            tl.store(out + at, tl.load(base + at, mask=other), mask=other)


@triton.jit(do_not_specialize=gemm.UNSPECIALIZED)
def direct_conv_kernel(
    x, w, out, in_slots, out_slots, bias, scale, base,
    rows, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, channels_in, channels_out, in_channels,
    out_channels, in_lists, out_lists,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """conv_kernel without a matrix product, for narrow groups; a tile spans groups.

    ``in_slots``, ``out_slots``: where in a list a channel is, or -1. What is packed and past the end of a list
    is not written.
    """
    n_tiles = tl.cdiv(channels_out, N)
    m_tiles = tl.cdiv(rows, M)
    job = tl.program_id(0) // (m_tiles * n_tiles)
    tile = tl.program_id(0) - job * (m_tiles * n_tiles)
    row = (tile // n_tiles) * M + tl.arange(0, M)
    channel = (tile % n_tiles) * N + tl.arange(0, N)
    inside = row < rows
    pixel = row + (job.to(tl.int64) * rows if WIDE else job * rows)
    present = channel < channels_out
    live = present
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
    acc = tl.zeros([M, N], tl.float32)
    for tap in range(TAPS):
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
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
            b = tl.load(w + w_at, mask=read, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
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
    _conv(x, weight, out, ins, outs, g._replace(groups=ins.groups), bias, activation, scale, base)
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
    _conv(grad, weight, dx, outs, ins, gemm.adjoint(g._replace(groups=ins.groups)))
    return dx if heads == 1 else dx.unflatten(1, (heads, -1)).sum(1)


def _conv(
    x: Tensor,
    weight: Tensor,
    out: Tensor,  # channels_last
    ins: Side,  # of x: for an input gradient those of the convolution's outputs
    outs: Side,
    g: ConvGeometry,  # of this product: the adjoint one for an input gradient; heads are groups
    bias: Tensor | None = None,
    activation: str = "",
    scale: Tensor | None = None,
    base: Tensor | None = None,
) -> None:
    """Chooses the kernel and launches it: out = epilogue(sum over taps of weight x)."""
    if out.numel() == 0:
        return
    jobs = g.batch if scale is not None or ins.per_sample or outs.per_sample else 1
    rows, maps = g.batch // jobs * g.out_h * g.out_w, x.numel() + out.numel()
    x, w = gemm.rows_of(x), gemm.weight_rows(weight, x.dtype)
    base = None if base is None else gemm.rows_of(base)
    epilogue = [contiguous(t) for t in (bias, scale)]
    if gemm.is_narrow({"k_size": ins.size, "n_size": outs.size}, g) and not (ins.heads or outs.heads):
        _direct(x, w, out, ins, outs, g, jobs, rows, (*epilogue, base), activation)
        return
    x, w, operands, constants, single = _operands(x, w, ins, outs, g, jobs, maps)
    # two tiles at least, where only some channels are live: one past those costs little
    n = outs.size if outs.index is None else max(16, outs.size // 2)
    problem, wide = (rows, n, ins.capacity, jobs * g.groups), gemm.is_wide(x, out)
    tile, precision = choose(x, *problem, single, base is not None, wide, family="channels")
    grid = (jobs * triton.cdiv(rows, tile["M"]) * triton.cdiv(outs.size, tile["N"]), g.groups)
    with gemm.on_device(x):
        conv_kernel[grid](
            x, w, out, bias=epilogue[0], scale=epilogue[1], base=base, rows=rows,
            k_size=ins.size, n_size=outs.size, out_channels=out.shape[1], **ins.arguments("in"),
            **outs.arguments("out"), **operands, **constants, **gemm.geometry_arguments(g), PACKED_OUT=outs.packed,
            ACTIVATION=activation, PRECISION=precision, WIDE=wide, **tile,
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
        operands = {"inner": w.shape[2], "w_group": lead.size * w.stride(0), "w_job": 0}
    if has_entries and ins.index is not None and g.taps > 1:
        x, reads, k_part = channel_lists.compact(x, ins), "slots", channel_lists.padded(ins.capacity)
    operands |= {"k_part": k_part, "in_channels": x.shape[1]}
    single = reads != "slots" or tiling.is_ragged(operands) or (inner.index is not None and not packs)
    return x, w, operands, {"X_READS": reads, "W_PACKED": packs}, single


def _direct(x, w, out, ins: Side, outs: Side, g: ConvGeometry, jobs: int, rows: int, epilogue, activation: str) -> None:  # fmt: skip
    if outs.packed:
        out.zero_()
    whole = ins.whole, outs.whole
    bias, scale, base = epilogue
    tile = tiling.direct_tile(whole[1].size)
    grid = (jobs * triton.cdiv(rows, tile["M"]) * triton.cdiv(whole[1].size, tile["N"]),)
    with gemm.on_device(x):
        direct_conv_kernel[grid](
            x, w, out, *map(channel_lists.slots, whole), bias, scale, base, rows=rows, k_size=ins.size, n_size=outs.size,
            channels_in=whole[0].size, channels_out=whole[1].size, in_channels=x.shape[1], out_channels=out.shape[1],
            in_lists=ins.per_sample, out_lists=outs.per_sample, **gemm.geometry_arguments(g),
            PACKED_IN=ins.packed, PACKED_OUT=outs.packed, ACTIVATION=activation, WIDE=gemm.is_wide(x, out), **tile,
        )  # fmt: skip
