"""The weight gradient of the convolution on live channels in Triton.

A program owns one slice of a sample's pixels, one tap, and one tile of live outputs and inputs. It multiplies their
live channels into the slice's own float32 copy of the live part of the gradient. A second pass adds the copies: each element of the gradient looks up its place in every sample's copy. No atomics: the result is
bitwise reproducible. The copies of a chunk of samples are kept at a time, 256 MiB at most where one fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..lists import Lists
from . import channel_lists, gemm, tiling
from .channel_lists import Side, choose, is_read_often, list_part, listed, sides
from .experts_weight_grad import slice_of
from .gemm import source_row
from .launch import cdiv, launch, power_of_2
from .pixels_weight_grad import chunk_rows

_COPIES = (
    2**26
)  # elements of the copies of a chunk of samples; with 2**24 a linear layer of 1024 to 4096 took 32 launches


@triton.jit
def _slice(offsets, number, rows, slices, chunk, BLOCK: tl.constexpr):
    """The job of a slice, and its pixels [first, last) of those of the job, or of the list of all jobs' pixels."""
    job = number // slices
    if offsets is None:
        first = (number - job * slices) * chunk
        last = tl.minimum(first + chunk, rows)
    else:
        first, last = slice_of(offsets, job, number - job * slices, slices, BLOCK)
    return job, first, last


@triton.jit
def _pixel(order, job, row, inside, rows, WIDE: tl.constexpr):
    """The pixels at rows of a job, or of the list."""
    if order is None:
        pixel = row + (job.to(tl.int64) * rows if WIDE else job * rows)
    else:
        pixel = tl.load(order + row, mask=inside, other=0)
        if WIDE:
            pixel = pixel.to(tl.int64)
    return pixel


@triton.jit(do_not_specialize=[*gemm.UNSPECIALIZED, "chunk", "slices", "first_job"])
def weight_grad_kernel(
    grad, x, copies, in_index, in_count, out_index, out_count, order, offsets,
    rows, first_job, slices, chunk, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, k_part, n_part,
    k_capacity, n_capacity, in_channels, out_channels, in_lists, in_length, out_lists, out_length,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, IN_PARTS: tl.constexpr,
    IN_STEPS: tl.constexpr, OUT_PARTS: tl.constexpr, OUT_STEPS: tl.constexpr, X_READS: tl.constexpr,
    GRAD_READS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """copies[job slice, group, i, tap, j] = the sum over pixels of grad of the i-th live output and x of the j-th
    live input. M tiles i, N tiles j, K is how many pixels are taken at a time."""
    n_tiles = tl.cdiv(k_capacity, N)
    tile = tl.program_id(0)
    tap = tl.program_id(1) % TAPS
    group = tl.program_id(1) // TAPS
    job, first, last = _slice(offsets, tl.program_id(2), rows, slices, chunk, K)
    copy = tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // TAPS) + group
    job += first_job
    i = (tile // n_tiles) * M + tl.arange(0, M)
    j = (tile % n_tiles) * N + tl.arange(0, N)
    i_live, i_channel = _channels(out_index, out_count, job, group, out_lists, out_length, n_size, n_part, i, OUT_PARTS, OUT_STEPS, GRAD_READS)  # fmt: skip
    j_live, j_channel = _channels(in_index, in_count, job, group, in_lists, in_length, k_size, k_part, j, IN_PARTS, IN_STEPS, X_READS)  # fmt: skip
    i_mask = i < i_live
    j_mask = j < j_live
    i_read = i < (tl.cdiv(i_live, 16) * 16 if GRAD_READS == "compact" else i_live)
    j_read = j < (tl.cdiv(j_live, 16) * 16 if X_READS == "compact" else j_live)
    some = ((tile // n_tiles) * M < i_live) & ((tile % n_tiles) * N < j_live)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, tl.where(some, last, first), K):
        row = start + tl.arange(0, K)
        inside = row < last
        pixel = _pixel(order, job, row, inside, rows, WIDE)
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        grad_at = pixel[:, None] * out_channels + i_channel[None, :]
        x_at = at[:, None] * in_channels + j_channel[None, :]
        a = tl.load(grad + grad_at, mask=inside[:, None] & i_read[None, :], other=0.0)
        b = tl.load(x + x_at, mask=valid[:, None] & j_read[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    copy_at = (copy * n_capacity + i)[:, None] * (TAPS * k_capacity) + tap * k_capacity + j[None, :]
    tl.store(copies + copy_at, acc, mask=i_mask[:, None] & j_mask[None, :])


@triton.jit
def _channels(index, count, job, group, lists, length, size, part, slot, PARTS: tl.constexpr, STEPS: tl.constexpr, READS: tl.constexpr):  # fmt: skip
    """The number of a group's live channels, and the places of those at ``slot`` in a row of the map."""
    live = size
    channel = group * part + slot
    if index is not None:
        entries, before, live = list_part(index, count, job, group, lists, length, size, PARTS, STEPS)
        if READS == "packed":
            channel = before + slot
        if READS == "dense":
            channel = group * part + listed(entries, slot, slot < live, group, size, PARTS)
    return live, channel


@triton.jit(do_not_specialize=["first_job", "jobs", "slices"])
def add_copies_kernel(
    copies, dw, in_slots, out_slots, first_job, jobs, slices, groups, k_size, n_size, k_capacity, n_capacity,
    in_lists, out_lists, TAPS: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dw[o, tap, k] (+)= the sum over the jobs that have both channels of their copies."""
    output = tl.program_id(0)
    group = output // n_size
    element = tl.program_id(1) * N + tl.arange(0, N)
    inside = element < TAPS * k_size
    tap = element // k_size
    k = element - tap * k_size
    at = dw + output.to(tl.int64) * (TAPS * k_size) + element
    acc = tl.zeros([N], tl.float32)
    if ADD:
        acc = tl.load(at, mask=inside, other=0.0)
    first = first_job.to(tl.int64)
    for job in range(jobs):
        row = first + job
        i = output - group * n_size
        if out_slots is not None:
            i = tl.load(out_slots + row * out_lists * groups * n_size + output)
        if i >= 0:
            j = k
            if in_slots is not None:
                j = tl.load(in_slots + (row * in_lists * groups + group) * k_size + k, mask=inside, other=-1)
            copy = (row - first) * slices * groups + group
            for part in range(slices):
                copy_at = (((copy + part * groups) * n_capacity + i) * TAPS + tap) * k_capacity + j
                acc += tl.load(copies + copy_at, mask=inside & (j >= 0), other=0.0)
    tl.store(at, acc, mask=inside)


@triton.jit(do_not_specialize=[*gemm.UNSPECIALIZED, "chunk", "slices"])
def direct_weight_grad_kernel(
    grad, x, dw, in_slots, out_slots, order, offsets,
    rows, slices, chunk, in_h, in_w, out_h, out_w, pad_h, pad_w, k_size, n_size, channels_in, channels_out,
    in_channels, out_channels, in_lists, out_lists,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dw[job slice, o, tap, k] for narrow groups, without a matrix product: one tap and one k of every group."""
    tap = tl.program_id(1) % TAPS
    k = tl.program_id(1) // TAPS
    job, first, last = _slice(offsets, tl.program_id(0), rows, slices, chunk, M)
    channel = tl.program_id(2) * N + tl.arange(0, N)
    present = channel < channels_out
    x_channel = (channel // n_size) * k_size + k
    grad_channel = channel
    live = present
    if out_slots is not None:
        slot = tl.load(out_slots + job.to(tl.int64) * out_lists * channels_out + channel, mask=live, other=-1)
        live = slot >= 0
        if PACKED_OUT:
            grad_channel = slot
    if in_slots is not None:
        slot = tl.load(in_slots + job.to(tl.int64) * in_lists * channels_in + x_channel, mask=live, other=-1)
        live = slot >= 0
        if PACKED_IN:
            x_channel = slot
    acc = tl.zeros([M, N], tl.float32)
    for start in range(first, last, M):
        row = start + tl.arange(0, M)
        inside = row < last
        pixel = _pixel(order, job, row, inside, rows, WIDE)
        at, valid = source_row(
            pixel, inside, row, tap, None, in_h, in_w, out_h, out_w, pad_h, pad_w,
            KERNEL_W, STRIDE_H, STRIDE_W, DIL_H, DIL_W, TRANSPOSED, "pixels", WIDE,
        )  # fmt: skip
        grad_at = pixel[:, None] * out_channels + grad_channel[None, :]
        x_at = at[:, None] * in_channels + x_channel[None, :]
        a = tl.load(grad + grad_at, mask=inside[:, None] & live[None, :], other=0.0)
        b = tl.load(x + x_at, mask=valid[:, None] & live[None, :], other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    at = ((tl.program_id(0).to(tl.int64) * channels_out + channel) * TAPS + tap) * k_size + k
    tl.store(dw + at, tl.sum(acc, 0), mask=present)


# ----------------------------------------------------------------------------------- launchers


def conv_weight_grad(
    grad, x, lists: Lists, weight_shape, geometry, heads: int, packed_in: bool, packed_out: bool, bias: bool
) -> tuple[Tensor, Tensor]:
    """See ``ops.channels.conv._conv_weight_grad``."""
    g = ConvGeometry(*geometry)
    ins, outs = sides(weight_shape, lists, g, heads, packed_in, packed_out)
    g = g._replace(groups=ins.groups)
    db = _bias_grad(grad, outs, weight_shape[0]) if bias else grad.new_empty(0)
    if grad.numel() == 0 or x.numel() == 0 or 0 in (ins.capacity, outs.capacity):
        return grad.new_zeros(weight_shape), db
    narrow = heads == 1 and gemm.is_narrow({"k_size": ins.size, "n_size": outs.size}, g.groups)
    jobs = g.batch if ins.per_sample or outs.per_sample else 1
    if narrow:
        dw = _direct(grad, x, ins, outs, g, jobs).sum((0, 1))
    else:
        dw = _products(grad, x, ins, outs, g, jobs)
    return gemm.as_weight(dw, weight_shape, grad.dtype), db


def own_weight_grads(grad: Tensor, x: Tensor, ins: Side, outs: Side, g: ConvGeometry, jobs: int, *lists: Tensor | None) -> Tensor:  # fmt: skip
    """float32 ``[jobs, O, taps, C/groups]``, the gradient of each job's own weight.

    ``lists``: order and offsets of the jobs' pixels, as in ``channels.Own``.
    """
    narrow = gemm.is_narrow({"k_size": ins.size, "n_size": outs.size}, g.groups)
    copies = (_direct if narrow else _own_products)(grad, x, ins, outs, g, jobs, *lists)
    return copies[:, 0] if copies.shape[1] == 1 else copies.sum(1)


def _bias_grad(grad: Tensor, outs: Side, outputs: int) -> Tensor:
    sums = grad.sum((2, 3), dtype=torch.float32)[:, :, None, None]
    if outs.index is not None:  # zero at channels that are not live
        if not outs.packed:
            sums = channel_lists.gather(sums, outs.index, outs.count, outs.index.shape[1])
        sums = channel_lists.scatter(sums, outs.index, outs.count, outputs, None)
    return sums[:, :, 0, 0].sum(0).to(grad.dtype)


def _products(grad: Tensor, x: Tensor, ins: Side, outs: Side, g: ConvGeometry, jobs: int) -> Tensor:
    """float32 ``[O, taps, C/groups]``."""
    arguments, tiles, slices = _prepared(grad, x, ins, outs, g, jobs)
    capacities = {name: arguments[name] for name in ("k_capacity", "n_capacity")}
    copy = slices * g.groups * outs.capacity * g.taps * ins.capacity
    together = max(1, min(jobs, _COPIES // copy, 65535 // slices))
    copies = torch.empty(together * copy, dtype=torch.float32, device=x.device)
    outputs = g.groups * outs.size
    dw = torch.empty((outputs, g.taps, ins.size), dtype=torch.float32, device=x.device)
    lists = {"in_lists": ins.per_sample and 1, "out_lists": outs.per_sample}
    slots = {"in_slots": channel_lists.slots(ins), "out_slots": channel_lists.slots(outs)}
    n = min(256, max(16, power_of_2(g.taps * ins.size)))
    with gemm.on_device(x):
        for first in range(0, jobs, together):
            some = min(together, jobs - first)
            launch(weight_grad_kernel, tiles, g.taps * g.groups, some * slices)(
                copies=copies, order=None, offsets=None, first_job=first, **arguments
            )
            launch(add_copies_kernel, outputs, cdiv(g.taps * ins.size, n))(
                copies, dw, **slots, **lists, first_job=first, jobs=some, slices=slices, groups=g.groups,
                k_size=ins.size, n_size=outs.size, **capacities, TAPS=g.taps, ADD=first > 0, N=n,
            )  # fmt: skip
    return dw


def _prepared(grad: Tensor, x: Tensor, ins: Side, outs: Side, g: ConvGeometry, jobs: int) -> tuple[dict, int, int]:  # fmt: skip
    """The arguments of ``weight_grad_kernel``, its tiles of a weight, and the slices of a job."""
    rows = cdiv(g.batch * g.out_h * g.out_w, jobs)
    x, k_part, x_reads = _readable(x, ins, is_read_often(g.taps, outs))
    grad, n_part, grad_reads = _readable(grad, outs, is_read_often(g.taps, ins))
    sizes = {"k_size": ins.size, "n_size": outs.size, "k_part": k_part, "n_part": n_part, "in_channels": x.shape[1], "out_channels": grad.shape[1]}  # fmt: skip
    listed_reads = [side.index is not None and reads != "compact" for side, reads in ((ins, x_reads), (outs, grad_reads))]  # fmt: skip
    ragged, batch = tiling.is_ragged(sizes), jobs * g.groups * g.taps
    single, family = any(listed_reads) or ragged, "channels_weight"
    tile, precision = choose(x, outs.capacity, ins.capacity, rows, batch, single, wide=ragged, family=family)
    tiles = cdiv(outs.capacity, tile["M"]) * cdiv(ins.capacity, tile["N"])
    chunk = chunk_rows(rows, jobs * tiles * g.taps * g.groups, tile["K"], x.device)
    slices = cdiv(rows, chunk)
    arguments = {
        "grad": grad, "x": x, **ins.arguments("in"), **outs.arguments("out"), "rows": rows, "slices": slices,
        "chunk": chunk, **sizes, "k_capacity": ins.capacity, "n_capacity": outs.capacity,
        **gemm.geometry_arguments(g), "X_READS": x_reads, "GRAD_READS": grad_reads, "PRECISION": precision,
        "WIDE": gemm.is_wide(x, grad), **tile,
    }  # fmt: skip
    return arguments, tiles, slices


def _own_products(
    grad, x, ins: Side, outs: Side, g: ConvGeometry, jobs: int, order=None, offsets=None
) -> Tensor:
    """float32 ``[jobs, slices, O, taps, C/groups]``."""
    arguments, tiles, slices = _prepared(grad, x, ins, outs, g, jobs)
    shape = (jobs, slices, g.groups * outs.size, g.taps, ins.size)
    copies = torch.empty(shape, dtype=torch.float32, device=x.device)
    together = max(1, 65535 // slices)
    with gemm.on_device(x):
        for first in range(0, jobs, together):
            some = copies[first : first + together]
            launch(weight_grad_kernel, tiles, g.taps * g.groups, len(some) * slices)(
                copies=some, order=order, offsets=offsets if offsets is None else offsets[first:], first_job=first, **arguments
            )  # fmt: skip
    return copies


def _readable(x: Tensor, lists: Side, often: bool) -> tuple[Tensor, int, str]:
    """The map as the product reads it, the channels that each group has there, and how it is read."""
    if lists.index is not None and often:  # worth a copy that is read in vectors
        return channel_lists.compact(x, lists), channel_lists.padded(lists.capacity), "compact"
    return gemm.rows_of(x), 0 if lists.heads else lists.size, "packed" if lists.packed else "dense"


def _direct(grad, x, ins: Side, outs: Side, g: ConvGeometry, jobs: int, order=None, offsets=None) -> Tensor:
    """float32 ``[jobs, slices, O, taps, C/groups]``."""
    rows = cdiv(g.batch * g.out_h * g.out_w, jobs)
    grad, x = gemm.rows_of(grad), gemm.rows_of(x)
    whole = ins.whole, outs.whole
    tile = tiling.direct_tile(whole[1].size)
    grid = (g.taps * ins.size, cdiv(whole[1].size, tile["N"]))
    chunk = chunk_rows(rows, jobs * grid[0] * grid[1], tile["M"], x.device)
    slices = cdiv(rows, chunk)
    dw = torch.empty((jobs, slices, whole[1].size, g.taps, ins.size), dtype=torch.float32, device=x.device)
    with gemm.on_device(x):
        launch(direct_weight_grad_kernel, jobs * slices, *grid)(
            grad, x, dw, *map(channel_lists.slots, whole), order, offsets, rows=rows, slices=slices, chunk=chunk,
            k_size=ins.size, n_size=outs.size, channels_in=whole[0].size, channels_out=whole[1].size,
            in_channels=x.shape[1], out_channels=grad.shape[1], in_lists=ins.per_sample, out_lists=outs.per_sample,
            **gemm.geometry_arguments(g), PACKED_IN=ins.packed, PACKED_OUT=outs.packed,
            WIDE=gemm.is_wide(x, grad), **tile,
        )  # fmt: skip
    return dw
