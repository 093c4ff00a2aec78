"""Values of the CUDA C++ kernels of pixel plans and rows on a CPU; every buffer lies between guards.

Kernels with barriers run with the threads of a block in ascending and in descending order.
"""

import ctypes
import mmap

import pytest
import torch
from cuda_on_host import NARROW, build, int64, needs_nvcc, numbers, pointer
from guards import between_guards, guards_are_whole

from dynops.geometry import ConvGeometry
from dynops.ops import index as reference
from dynops.ops.pixels import rows as rows_reference
from dynops.testing import random_mask, random_tensor

pytestmark = [needs_nvcc, pytest.mark.usefixtures("poisoned")]

THREADS, PARTS = 256, 1024  # csrc/cuda/select.cuh
FLOATS = {  # the bits that a value has, and those of infinity: csrc/cuda/pixels.cu
    torch.float16: (0x7FFF, 0x7C00),
    torch.bfloat16: (0x7FFF, 0x7F80),
    torch.float32: (0x7FFFFFFF, 0x7F800000),
    torch.float64: (2**63 - 1, 0x7FF << 52),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    library = build("pixels", tmp_path_factory.mktemp("host"))
    for bits in (8, 16, 32, 64):
        getattr(library, f"parts_{bits}").restype = ctypes.c_int64
    return library


def guarded(shape, dtype) -> torch.Tensor:
    return between_guards(shape, torch.empty(shape, dtype=dtype, device="meta").stride(), dtype, "cpu")


class Selection:
    """The launchers of ``csrc/cuda/select.cuh`` on one mask."""

    def __init__(self, library, mask: torch.Tensor, descending: bool):
        bits = 8 * mask.element_size()
        value, largest = FLOATS.get(mask.dtype, (2**bits - 1, 2**bits - 1))
        self.run = lambda name, *a: getattr(library, f"{name}_{bits}")(
            ctypes.c_int(descending), *self.mask, *a
        )
        self.parts = getattr(library, f"parts_{bits}")(pointer(mask), int64(mask.numel()))
        self.mask = (pointer(mask), int64(mask.numel()), ctypes.c_uint64(value), ctypes.c_uint64(largest))

    def counts(self) -> torch.Tensor:
        counts = guarded((self.parts,), torch.int64)
        self.run("count", pointer(counts))
        assert guards_are_whole(counts)
        return counts

    def compact(self, counts: torch.Tensor) -> torch.Tensor:
        index = guarded((int((counts & 0xFFFFFFFF).sum()),), torch.int32)
        self.run("compact", pointer(counts), int64(len(index)), pointer(index))
        return index

    def capacity(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = guarded((self.parts,), torch.int64)
        index, count = guarded((capacity,), torch.int32), guarded((1,), torch.int32)
        self.run("capacity", pointer(counts), int64(capacity), pointer(index), pointer(count))
        assert guards_are_whole(counts)
        return index, count


def mask_of(pixels: int, density: float, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Random values of both signs, both zeros where floating, `offset` elements past a multiple of 16 bytes."""
    active = torch.rand(pixels) < density
    signs = torch.where(torch.rand(pixels) < 0.5, -1.0, 1.0)
    values = signs * (torch.rand(pixels) * 50 + 1) * active
    memory = between_guards((pixels,), (1,), dtype, "cpu", offset=64 + offset)
    return memory.copy_(values.abs() if dtype == torch.uint8 else values)


SIZES = (1, 7, 17, THREADS * 2 - 1, THREADS * 2, THREADS * 2 + 1, 4096, 4097, 20_000)
MASKS = [(pixels, dtype) for pixels in SIZES for dtype in (torch.bool, *FLOATS)]


@pytest.mark.parametrize("pixels,dtype", MASKS + [(4097, dtype) for dtype in INTEGERS])
def test_mask_to_index(pixels, dtype, library):
    for k, density in enumerate((0.0, 0.02, 0.5, 1.0)):
        mask = mask_of(pixels, density, dtype, offset=k)
        expected = (mask != 0).nonzero()[:, 0].int()
        selection = Selection(library, mask, descending=k % 2 == 1)
        index = selection.compact(selection.counts())
        assert torch.equal(index, expected) and guards_are_whole(index)
        active = len(expected)
        less_and_more = {active // 2, active + 1, pixels + 300}
        for capacity in less_and_more if pixels > 5000 else less_and_more | {1, active - 1, active, pixels}:
            if capacity < 1:  # mask_to_index_capacity launches nothing
                continue
            index, count = selection.capacity(capacity)
            for got, value in zip(
                (index, count), reference._mask_to_index_capacity(mask, capacity), strict=True
            ):
                assert torch.equal(got, value) and guards_are_whole(got)


def test_parts_of_several_tiles(library):
    pixels = PARTS * THREADS * 2 + 1000  # int64, two of which are a vector: two tiles a part
    mask = mask_of(pixels, 0.3, torch.int64, offset=1)
    selection = Selection(library, mask, descending=True)
    assert PARTS / 2 < selection.parts <= PARTS
    index = selection.compact(selection.counts())
    assert torch.equal(index, mask.nonzero()[:, 0].int()) and guards_are_whole(index)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_nan(dtype, library):
    mask = mask_of(5000, 0.2, dtype, offset=3)
    nan = torch.randperm(5000)[:17]
    mask[nan] = float("nan")
    mask[nan[0]] = -mask[nan[0]]
    mask[::1000] = float("-inf")
    counts = Selection(library, mask, False).counts()
    assert int((counts >> 32).sum()) == mask.isnan().sum()
    assert int((counts & 0xFFFFFFFF).sum()) == (mask != 0).sum()


def test_most_pixels(library):
    """The last part of 2**31 - 1 pixels, of which only one page is not the page of zeros."""
    pixels = 2**31 - 1
    memory = mmap.mmap(-1, pixels, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mask = torch.frombuffer(memory, dtype=torch.uint8)
    at = torch.tensor([pixels - 2000, pixels - 3, pixels - 1])
    mask[at] = 1
    parts = library.parts_8(pointer(mask), int64(pixels))
    assert parts == PARTS
    counts = torch.zeros(parts, dtype=torch.int64)
    counts[0], counts[-1] = 2, 99
    index = guarded((5,), torch.int32).fill_(-7)
    library.last_part(pointer(mask), int64(pixels), pointer(counts), int64(5), pointer(index))
    assert counts[-1] == 3 and index.tolist() == [-7, -7, *at.tolist()] and guards_are_whole(index)


def test_inverse_index(library):
    for pixels in (1, 300, 5000):
        index, count = reference._mask_to_index_capacity((torch.rand(pixels) < 0.4), pixels)
        inverse = guarded((1, 1, pixels), torch.int32)
        inverse.fill_(-1)
        library.inverse(pointer(index), int64(pixels), pointer(inverse))
        assert torch.equal(inverse, reference._inverse_index(index, count, [1, 1, pixels]))
        assert guards_are_whole(inverse)


CONVOLUTIONS = [  # N, in, kernel, stride, padding, dilation, transposed
    (2, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 0),
    (1, (8, 8), (3, 2), (2, 1), (0, 3), (1, 2), 0),
    (2, (5, 6), (4, 3), (2, 3), (1, 0), (1, 1), 1),
    (1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 0),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_needed_mask(case, library):
    n, size, kernel, stride, padding, dilation, transposed = case
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        out = [(i - 1) * s - 2 * p + r + 1 for i, s, p, r in zip(size, stride, padding, reach, strict=True)]
    else:
        out = [(i + 2 * p - r - 1) // s + 1 for i, s, p, r in zip(size, stride, padding, reach, strict=True)]
    g = ConvGeometry(n, *size, *out, *kernel, *stride, *padding, *dilation, 1, transposed)
    index, count = reference._mask_to_index_capacity(random_mask((n, *out), 0.2), 50)
    mask = guarded((n, *size), torch.bool).fill_(False)
    library.needed(pointer(index), int64(len(index)), numbers(*g), pointer(mask))
    assert torch.equal(mask, reference._needed_mask(index, count, list(g))) and guards_are_whole(mask)


def channels_last(n, c, h, w):
    return (n, c, h, w), (h * w * c, 1, w * c, c)


MAPS = {
    "channels_last": channels_last(2, 64, 5, 7),
    "channels_last-odd": channels_last(2, 13, 5, 7),
    "channels_last-40": channels_last(1, 40, 9, 9),
    "nchw": ((2, 70, 5, 7), (70 * 35, 35, 7, 1)),
    "nchw-few": ((3, 3, 9, 5), (135, 45, 5, 1)),
    "nchw-one": ((3, 1, 9, 5), (45, 45, 5, 1)),
    "channels-of-more": ((2, 32, 4, 6), (4 * 6 * 48, 1, 6 * 48, 48)),
    "crop": ((2, 24, 4, 6), (8 * 9 * 24, 1, 9 * 24, 24)),
    "expanded": ((2, 33, 4, 6), (24, 0, 6, 1)),
    "one-pixel": channels_last(1, 8, 1, 1),
}
ROW_DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.complex128, torch.uint8)


def strided(shape, stride, dtype, offset) -> torch.Tensor:
    """Random values in memory that ends with the map."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = between_guards((last + 1,), (1,), dtype, "cpu", offset=64 + offset)
    memory.copy_(random_tensor(last + 1) * 100)
    return memory.as_strided(shape, stride, memory.storage_offset())


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", MAPS)
def test_gather_rows(name, dtype, library):
    shape, stride = MAPS[name]
    pixels = shape[0] * shape[2] * shape[3]
    for k, (density, spare) in enumerate(((0.4, 0), (1.0, 0), (0.4, 33), (0.0, 5))):
        x = strided(shape, stride, dtype, offset=k)
        mask = torch.rand(pixels) < density
        index, count = reference._mask_to_index_capacity(mask, int(mask.sum()) + spare)
        if len(index) == 0:
            continue
        out = guarded((len(index), shape[1]), dtype)
        about = numbers(shape[0], *shape[1:], *stride, x.element_size())
        limit = int64(0 if k == 2 else NARROW)
        library.gather(
            ctypes.c_int(k % 2), limit, int64(len(index)), about, pointer(x), pointer(index), pointer(out)
        )
        assert torch.equal(out, rows_reference._gather_rows(x, index, count)) and guards_are_whole(out)


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("channels", [1, 3, 40, 64])
def test_scatter_rows(channels, dtype, library):
    shape = [2, 5, 7]
    for k, (density, spare) in enumerate(((0.4, 0), (1.0, 0), (0.4, 33))):
        mask = torch.rand(70) < density
        index, count = reference._mask_to_index_capacity(mask, int(mask.sum()) + spare)
        rows = strided((len(index), channels), (channels, 1), dtype, offset=k)
        base = strided(*channels_last(2, channels, 5, 7), dtype, offset=k)
        expected = rows_reference._scatter_rows(rows, index, count, shape, base)
        out, limit = base.clone(memory_format=torch.preserve_format), int64(0 if k == 2 else NARROW)
        out = between_guards(out.shape, base.stride(), dtype, "cpu", offset=64 + k).copy_(base)
        size = int64(channels * rows.element_size())
        library.scatter(
            limit, int64(len(index)), int64(70), size, pointer(rows), pointer(index), pointer(out)
        )
        assert torch.equal(out, expected) and guards_are_whole(out)
