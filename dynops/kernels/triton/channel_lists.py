"""Lists of channels in Triton: made of a mask, walked through, and channels moved by them (gather, scatter, pack).

Nothing here reads a count on the host: grids cover the longest list that there may be, and a program past
the count has nothing to do but to write zeros, or ``base``. Rows of channels_last maps and of weights are loaded
whole where that pays (``rows.whole_rows``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ..layout import empty_map, memory_format_of
from ..lists import Lists
from . import gemm, tiling
from .gemm import rank
from .launch import cdiv, launch, power_of_2
from .rows import row_values, whole_rows, words

_SINGLE = {"ROW": 0, "HALF": False}  # channels are loaded one by one
VECTOR = tl.constexpr(8)  # channels that are stored together: 16 bytes in half precision
PAD = 16  # channels of a compact tensor's group are a multiple: loads are vectors, cut at a multiple of 16


@dataclass(frozen=True)
class Side:
    """The live channels of one side of a convolution, ``groups`` parts of ``size`` channels for each sample.

    Attributes:
        index, count: as in ``ChannelPlan``; None where all channels are live.
        heads: whether each group has lists of its own, of channels in ``[0, size)``; else a sample has one, of
            channels in ``[0, groups * size)``, and a group's part of it is where its channels lie.
        packed: whether the tensor on this side holds the live channels only.
    """

    index: Tensor | None
    count: Tensor | None
    batch: int
    groups: int
    size: int
    heads: bool = False
    packed: bool = False

    @property
    def per_sample(self) -> int:
        """Side of a sample; 0 where all samples share them."""
        lists = self.groups if self.heads else 1
        return lists if self.index is not None and self.index.shape[0] == self.batch * lists else 0

    @property
    def capacity(self) -> int:
        """The most live channels that a group may have."""
        return self.size if self.index is None else min(self.size, self.index.shape[1])

    @property
    def whole(self) -> Side:
        """The same channels as one group."""
        return replace(self, groups=1, size=self.groups * self.size)

    def arguments(self, side: str) -> dict:
        """The kernels' arguments for the lists of "in" or "out"; ``_lists`` steps from job to job."""
        length = 0 if self.index is None else self.index.shape[1]
        parts = "heads" if self.heads else "groups" if self.groups > 1 else "one"
        values = {"lists": self.per_sample, "length": length}
        named = {f"{side}_{name}": value for name, value in values.items()}
        constants = {f"{side.upper()}_PARTS": parts, f"{side.upper()}_STEPS": length.bit_length()}
        return {f"{side}_index": self.index, f"{side}_count": self.count, **named, **constants}


def sides(
    weight_shape, lists: Lists, g: ConvGeometry, heads: int, packed_in: bool, packed_out: bool
) -> tuple[Side, Side]:
    """The inputs and the outputs of a convolution. Heads are groups whose inputs are the same channels."""
    groups = max(heads, g.groups)
    ins = Side(*lists.ins, g.batch, groups, weight_shape[1], heads > 1, packed_in)
    return ins, Side(*lists.outs, g.batch, groups, weight_shape[0] // groups, False, packed_out)


def choose(
    x: Tensor, rows: int, n: int, k: int, batch: int, single: bool, base: bool = False, wide: bool = False, *,
    family: str,
) -> tuple[dict, str]:  # fmt: skip
    """The tile and the precision of ``batch`` products ``[rows, k] @ [k, n]``, as :func:`tiling.choose`.

    Args:
        single: channels are loaded one by one: of a list, or of rows that are not aligned.
        base: the epilogue reads one.
        wide: offsets are 64-bit numbers, or single channels have pixels from a list.
        family: "channels" or "channels_weight".
    """
    most = {
        "half": 64 * 64 if base or wide else 128 * 128,
        "tf32": 64 * 64 if base or single else 128 * 64,
        "ieee": 32 * 32 if base and single else 64 * 32 if base or single else 64 * 64,
    }
    tile, kind = tiling.choose(x, rows, n, k, batch, family=family, indirect=single, largest=most)
    return (tile | {"K": min(tile["K"], 32)} if single else tile), kind  # a deeper block spills


# --------------------------------------------------------------------------- device functions


@triton.jit
def list_part(index, count, job, group, lists, length, size, PARTS: tl.constexpr, STEPS: tl.constexpr):
    """The part of a list that is in a group: a pointer to it, how many entries lie before it, and its length."""
    row = job.to(tl.int64) * lists
    if PARTS == "heads":
        row += group
    entries = index + row * length
    live = tl.minimum(tl.load(count + row), length)
    before = live * 0
    if PARTS == "groups":
        before = rank(entries, live, group * size - 1 + before, STEPS, False)
        live = rank(entries, live, group * size + size - 1 + before * 0, STEPS, False) - before
    return entries + before, before, live


@triton.jit
def listed(entries, slot, present, group, size, PARTS: tl.constexpr):
    """The channels within their group at these slots of the group's part of a list."""
    channel = tl.load(entries + slot, mask=present, other=0)
    if PARTS == "groups":
        channel = tl.where(present, channel - group * size, 0)
    return channel


@triton.jit
def tiles_of(n_size, EXPANDS: tl.constexpr, N: tl.constexpr):
    """The tiles of a group's outputs. Where they expand one with a neighbour may lack up to a vector of slots."""
    n_tiles = tl.cdiv(n_size, N)
    if EXPANDS:
        n_tiles = tl.where(n_size <= N, 1, tl.cdiv(n_size, N - VECTOR))
    return n_tiles


@triton.jit
def boundary(entries, slot, live, group, size, PARTS: tl.constexpr):
    """The first channel of the tile of the channels that begins at ``slot`` or up to a vector later, and its first slot.

    The channel is a multiple of a vector; ``slot`` is a multiple of it too.
    """
    near = slot + tl.arange(0, VECTOR)
    channel = listed(entries, near, near < live, group, size, PARTS)
    first = tl.sum(tl.where(near == slot, channel, 0), 0)
    begin = tl.cdiv(first, VECTOR) * VECTOR
    begin = tl.where(slot == 0, 0, tl.where(slot < live, tl.minimum(begin, size), size))
    passed = tl.sum(((channel < begin) & (near < live)).to(tl.int32), 0)
    return begin, tl.minimum(slot, live) + passed


# -------------------------------------------------------------------------------------- kernels


@triton.jit
def channel_index_kernel(mask, index, count, channels, size, BLOCK: tl.constexpr):
    """index[row] = the first ``size`` nonzeros of a row of the mask, then -1; count[row] how many there are."""
    row = tl.program_id(0)
    mask += row.to(tl.int64) * channels
    index += row.to(tl.int64) * size
    found = 0
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        live = tl.load(mask + channel, mask=channel < channels, other=0) != 0
        slot = found + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(index + slot, channel, mask=live & (slot < size))
        found += tl.sum(live.to(tl.int32), 0)
    valid = tl.minimum(found, size)
    tl.store(count + row, valid)
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(index + slot, -1, mask=(slot >= valid) & (slot < size))


@triton.jit(do_not_specialize=["rows"])
def gather_channels_kernel(
    x, out, in_index, in_count, rows, size, width, part, x_n, x_p, x_c, out_n, out_p, out_c, in_lists, in_length,
    IN_PARTS: tl.constexpr, IN_STEPS: tl.constexpr, PACKED: tl.constexpr, ALL: tl.constexpr, ROW: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[n, p, group*part + slot] = x[n, p, channel], zero past the list's end; ROW, HALF as in ``row_values``.

    ``rows`` pixels of a sample, ``x_n``, ``x_p``, ``x_c`` the strides of sample, pixel and channel. PACKED: x
    holds the live channels only. ALL: zeros up to ``width``, else up to a multiple of 16 channels.
    """
    m_tiles = tl.cdiv(rows, M)
    job = tl.program_id(0) // m_tiles
    group = tl.program_id(2)
    row = (tl.program_id(0) - job * m_tiles) * M + tl.arange(0, M)
    slot = tl.program_id(1) * N + tl.arange(0, N)
    entries, before, live = list_part(in_index, in_count, job, group, in_lists, in_length, size, IN_PARTS, IN_STEPS)  # fmt: skip
    present = slot < live
    x_first = before
    channel = slot
    if not PACKED:
        channel = listed(entries, slot, present, group, size, IN_PARTS)
        x_first = group * size if IN_PARTS == "groups" else 0
    written = slot < width
    if not ALL:
        if tl.program_id(1) * N >= live:
            return
        written = slot < tl.minimum(width, tl.cdiv(live, 16) * 16)
    target = group * part + slot
    if WIDE:
        row = row.to(tl.int64)
        channel = channel.to(tl.int64)
        target = target.to(tl.int64)
        job = job.to(tl.int64)
    inside = row < rows
    x_at = job * x_n + row * x_p + x_first * x_c
    out_at = (job * out_n + row * out_p)[:, None] + target[None, :] * out_c
    value = row_values(x, x_at, x_c, channel, inside, present, size, ROW, HALF, M, N)
    tl.store(out + out_at, value, mask=inside[:, None] & written[None, :])


@triton.jit(do_not_specialize=["rows"])
def scatter_channels_kernel(
    packed, out, base, in_index, in_count, rows, channels, width, x_n, x_p, x_c, out_n, out_p, out_c,
    in_lists, in_length,
    IN_STEPS: tl.constexpr, ROW: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[n, p, channel] = packed[n, p, slot] where the channel is in the list, else base or zero.

    ``width`` channels of a packed row; ROW, HALF as in ``row_values``.
    """
    m_tiles = tl.cdiv(rows, M)
    job = tl.program_id(0) // m_tiles
    row = (tl.program_id(0) - job * m_tiles) * M + tl.arange(0, M)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    entries, _, live = list_part(in_index, in_count, job, 0, in_lists, in_length, channels, "one", IN_STEPS)
    slot = rank(entries, live, channel - 1, IN_STEPS, False)
    present = (slot < live) & (tl.load(entries + slot, mask=slot < live, other=-1) == channel)
    if WIDE:
        row = row.to(tl.int64)
        channel = channel.to(tl.int64)
        slot = slot.to(tl.int64)
        job = job.to(tl.int64)
    inside = row < rows
    written = inside[:, None] & (channel < channels)[None, :]
    out_at = (job * out_n + row * out_p)[:, None] + channel[None, :] * out_c
    value = row_values(packed, job * x_n + row * x_p, x_c, slot, inside, present, width, ROW, HALF, M, N)
    if base is not None:  # whole vectors, also where they are not needed
        value = tl.where(present[None, :], value, tl.load(base + out_at, mask=written, other=0))
    tl.store(out + out_at, value, mask=written)


@triton.jit
def pack_weight_kernel(
    w, packed, in_index, in_count, out_index, out_count, in_size, out_size, in_part, out_part,
    in_lists, in_length, out_lists, out_length,
    TAPS: tl.constexpr, IN_PARTS: tl.constexpr, IN_STEPS: tl.constexpr, OUT_PARTS: tl.constexpr,
    OUT_STEPS: tl.constexpr, ROW: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """packed[job, group, i, tap, j] = w[group*out_size + the i-th live output, tap, the j-th live input].

    Inputs are zero from the list's end to a multiple of 16; nothing else is written. ROW, HALF as in ``row_values``.
    """
    n_tiles = tl.cdiv(in_part, N)
    m_tiles = tl.cdiv(out_part, M)
    job = tl.program_id(0) // (m_tiles * n_tiles)
    tile = tl.program_id(0) - job * m_tiles * n_tiles
    group = tl.program_id(1) // TAPS
    tap = tl.program_id(1) % TAPS
    i = (tile // n_tiles) * M + tl.arange(0, M)
    j = (tile % n_tiles) * N + tl.arange(0, N)
    entries, _, in_live = list_part(in_index, in_count, job, group, in_lists, in_length, in_size, IN_PARTS, IN_STEPS)  # fmt: skip
    inner = listed(entries, j, j < in_live, group, in_size, IN_PARTS)
    if out_index is not None:
        entries, _, out_live = list_part(out_index, out_count, job, group, out_lists, out_length, out_size, OUT_PARTS, OUT_STEPS)  # fmt: skip
        lead = listed(entries, i, i < out_live, group, out_size, OUT_PARTS)
    else:
        out_live = out_size
        lead = i
    if ((tile // n_tiles) * M >= out_live) | ((tile % n_tiles) * N >= in_live):
        return
    inside = i < out_live
    written = inside[:, None] & (j < tl.cdiv(in_live, 16) * 16)[None, :]
    groups = tl.num_programs(1) // TAPS
    source = ((group * out_size + lead).to(tl.int64) * TAPS + tap) * in_size
    target = (((job.to(tl.int64) * groups + group) * out_part + i) * TAPS + tap)[:, None] * in_part + j[
        None, :
    ]
    value = row_values(w, source, 1, inner, inside, j < in_live, in_size, ROW, HALF, M, N)
    tl.store(packed + target, value, mask=written)


@triton.jit
def slots_kernel(
    slots, in_index, in_count, groups, size, in_length,
    IN_PARTS: tl.constexpr, IN_STEPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """slots[row, channel] = the channel's slot in its group's part of list ``row``, or -1."""
    row = tl.program_id(0)
    group = tl.program_id(2)
    channel = tl.program_id(1) * N + tl.arange(0, N)  # within the group
    entries, before, live = list_part(in_index, in_count, row, group, 1, in_length, size, IN_PARTS, IN_STEPS)
    first = group * size if IN_PARTS == "groups" else 0
    slot = rank(entries, live, first + channel - 1, IN_STEPS, False)
    at = tl.load(entries + slot, mask=slot < live, other=-1)
    slot = tl.where(at == first + channel, slot, -1)
    tl.store(slots + (row.to(tl.int64) * groups + group) * size + channel, slot, mask=channel < size)


# ----------------------------------------------------------------------------------- launchers


def channel_index(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """See ``ops.index._channel_index``: one launch, where torch's sort takes a dozen."""
    rows, channels = mask.shape
    index = torch.empty((rows, size), dtype=torch.int32, device=mask.device)
    count = torch.empty(rows, dtype=torch.int32, device=mask.device)
    if rows:
        block = min(1024, max(16, power_of_2(channels)))
        with gemm.on_device(mask):
            launch(channel_index_kernel, rows)(mask.contiguous(), index, count, channels, size, BLOCK=block)
    return index, count


def gather(x: Tensor, index: Tensor, count: Tensor, width: int) -> Tensor:
    """See ``ops.channels.rows._gather``."""
    layout = memory_format_of(x)
    out = empty_map(x, (x.shape[0], width, *x.shape[2:]), layout)
    if out.numel() == 0:
        return out
    if x.numel() == 0 or index.shape[1] == 0:  # no list has an entry
        return out.zero_()
    lists = Side(index, count, x.shape[0], 1, x.shape[1])
    _launch_gather(x.contiguous(memory_format=layout), out, lists, width, 0, map_strides(out, layout), layout)
    return out


def compact(x: Tensor, lists: Side) -> Tensor:
    """The live channels as rows ``[N * H * W, groups * part]``, a group's part a multiple of 16 wide.

    Zero from a list's end to the next multiple of 16; nothing else is written.
    """
    part = padded(lists.capacity)
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    out = torch.empty((rows, lists.groups * part), dtype=x.dtype, device=x.device)
    strides = (x.shape[2] * x.shape[3] * out.shape[1], out.shape[1], 1)
    _launch_gather(gemm.rows_of(x), out, lists, part, part, strides, torch.channels_last)
    return out


def padded(channels: int) -> int:
    """The channels rounded up to a multiple of 16."""
    return cdiv(channels, PAD) * PAD


def _launch_gather(x: Tensor, out: Tensor, lists: Side, width: int, part: int, strides, layout) -> None:
    rows = x.shape[2] * x.shape[3]
    x_strides, wide = map_strides(x, layout), gemm.is_wide(x, out)
    whole = layout == torch.channels_last and not lists.packed
    x, tile = whole_rows(x, lists.size if whole else 0) or (words(x), _tile(width, layout) | _SINGLE)
    grid = (lists.batch * cdiv(rows, tile["M"]), cdiv(width, tile["N"]), lists.groups)
    with gemm.on_device(x):
        launch(gather_channels_kernel, *grid)(
            x, words(out), rows=rows, size=lists.size, width=width, part=part,
            **_named("x", x_strides), **_named("out", strides), **lists.arguments("in"),
            PACKED=lists.packed, ALL=part == 0, WIDE=wide, **tile,
        )  # fmt: skip


def scatter(packed: Tensor, index: Tensor, count: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """See ``ops.channels.rows._scatter``."""
    layout, (n, _, h, w) = memory_format_of(packed), packed.shape
    out = empty_map(packed, (n, channels, h, w), layout)
    if out.numel() == 0:
        return out
    if packed.numel() == 0 or index.shape[1] == 0:  # no list has an entry
        return out.zero_() if base is None else out.copy_(base)
    packed = packed.contiguous(memory_format=layout)
    base = None if base is None else words(base.contiguous(memory_format=layout))
    lists, strides, width = Side(index, count, n, 1, channels).arguments("in"), map_strides(packed, layout), packed.shape[1]  # fmt: skip
    del lists["IN_PARTS"]
    wide, whole = gemm.is_wide(packed, out), width if layout == torch.channels_last else 0
    packed, tile = whole_rows(packed, whole) or (words(packed), _tile(channels, layout) | _SINGLE)
    grid = (n * cdiv(h * w, tile["M"]), cdiv(channels, tile["N"]))
    with gemm.on_device(packed):
        launch(scatter_channels_kernel, *grid)(
            packed, words(out), base, rows=h * w, channels=channels, width=width,
            **_named("x", strides), **_named("out", map_strides(out, layout)), **lists, WIDE=wide, **tile,
        )  # fmt: skip
    return out


def output_tiles(outs: Side, n: int) -> int:
    """See :func:`tiles_of`."""
    expands = outs.index is not None and not outs.packed and outs.size > n
    return cdiv(outs.size, n - VECTOR.value if expands else n)


def is_read_often(taps: int, others: Side) -> bool:
    """True if a product reads a map at least twice: for each tap, and each tile of half of the other side's channels."""
    return taps > 1 or others.size > 256


def pack_weight(w: Tensor, ins: Side, outs: Side, jobs: int) -> Tensor:
    """The live part of ``w`` [O, taps, C/groups] for each job: ``[jobs, groups, out part, taps, in part]``."""
    parts = padded(ins.capacity), padded(outs.capacity)
    packed = torch.empty((jobs, ins.groups, parts[1], w.shape[1], parts[0]), dtype=w.dtype, device=w.device)
    taps = w.shape[1]
    w, tile = whole_rows(w, ins.size) or (words(w), tiling.direct_tile(parts[0]) | _SINGLE)
    grid = (jobs * cdiv(parts[1], tile["M"]) * cdiv(parts[0], tile["N"]), ins.groups * taps)
    with gemm.on_device(w):
        launch(pack_weight_kernel, *grid)(
            w, words(packed), **ins.arguments("in"), **outs.arguments("out"), in_size=ins.size,
            out_size=outs.size, in_part=parts[0], out_part=parts[1], TAPS=taps, **tile,
        )  # fmt: skip
    return packed


def slots(lists: Side) -> Tensor | None:
    """int32 ``[lists of the plan, groups, size]`` (heads: ``[lists of the plan, size]``): where in its group's
    part of the list a channel is, or -1; None where all channels are live."""
    index = lists.index
    if index is None:
        return None
    groups = 1 if lists.heads else lists.groups
    out = torch.empty((index.shape[0], groups, lists.size), dtype=torch.int32, device=index.device)
    arguments = lists.arguments("in") | {"IN_PARTS": "groups" if groups > 1 else "one"}
    del arguments["in_lists"]
    n = min(256, max(16, power_of_2(lists.size)))
    with gemm.on_device(out):
        launch(slots_kernel, index.shape[0], cdiv(lists.size, n), groups)(out, groups=groups, size=lists.size, N=n, **arguments)  # fmt: skip
    return out


def _tile(width: int, layout) -> dict:
    """2048 elements of a map, long in the direction that is contiguous."""
    if layout == torch.channels_last:
        return tiling.direct_tile(width)
    return {"M": 256, "N": 8, "num_warps": 4}


def map_strides(x: Tensor, layout) -> tuple[int, int, int]:
    """Strides of sample, pixel and channel."""
    plane = x.shape[2] * x.shape[3]
    step = (x.shape[1], 1) if layout == torch.channels_last else (1, plane)
    return (x.shape[1] * plane, *step)


def _named(name: str, strides) -> dict:
    return dict(zip((f"{name}_n", f"{name}_p", f"{name}_c"), strides, strict=True))
