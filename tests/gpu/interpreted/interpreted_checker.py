"""The interpreter's own check of addresses (``interpreter.py``), on kernels that go wrong. Run by
``test_triton_interpreter.py``."""

import os
import re

import guards
import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter")
SIZE = 5


@triton.jit
def copy_kernel(x, out, first, last, SHIFT: tl.constexpr):
    """out[i] = x[i + SHIFT] for first <= i < last, in a block of 8."""
    i = tl.arange(0, 8)
    mask = (i >= first) & (i < last)
    tl.store(out + i, tl.load(x + i + SHIFT, mask=mask), mask=mask)


@triton.jit
def shifted_store_kernel(x, out, last, SHIFT: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out + i + SHIFT, tl.load(x + i, mask=i < last), mask=i < last)


@triton.jit
def indexed_kernel(x, index, out, rows, MASKED: tl.constexpr):
    """out[i] = x[index[i]], MASKED: where the index is not negative."""
    i = tl.arange(0, 8)
    at = tl.load(index + i, mask=i < rows, other=-1)
    mask = i < rows
    if MASKED:
        mask = mask & (at >= 0)
    tl.store(out + i, tl.load(x + at, mask=mask, other=0), mask=i < rows)


@triton.jit
def scalar_kernel(x, out, at):
    tl.store(out, tl.load(x + at))


@triton.jit
def neighbour_kernel(x, y, out, distance):
    """Reads y through a pointer to x."""
    tl.store(out, tl.load(x + distance))


@triton.jit
def add_kernel(out, last):
    i = tl.arange(0, 8)
    tl.atomic_add(out + i, 1.0, mask=i < last)


@triton.jit
def exchange_kernel(out, at):
    tl.atomic_cas(out + at, 0, 1)


@triton.jit
def box_kernel(x, out, row, M: tl.constexpr, N: tl.constexpr):
    """A box from a row on; the descriptor says which rows there are."""
    box = x.load([row, 0])
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, box)


def tensors(*sizes: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.arange(size).to(dtype) for size in sizes]


def wrong(kernel, argument: str, byte: int, lane: tuple, access: str = "load"):
    text = f"{kernel.__name__}, program (0, 0, 0): {access} of "
    where = f" at byte {byte} of {argument}, lane {lane}:"
    return pytest.raises(interpreter.OutOfRange, match=f"^{re.escape(text)}.*{re.escape(where)}")


def test_reads_inside_are_allowed():
    x, out = tensors(SIZE, SIZE)
    copy_kernel[(1,)](x, out.zero_(), 0, SIZE, SHIFT=0)
    assert out.equal(x)
    copy_kernel[(1,)](
        x, out, 1, SIZE, SHIFT=-1
    )  # lane 0 would be before the start, 5 to 7 past the end: all masked
    assert out.tolist() == [0, 0, 1, 2, 3]


def test_a_read_past_the_end():
    with wrong(copy_kernel, "x", 4 * SIZE, (SIZE,)):
        copy_kernel[(1,)](*tensors(SIZE, 8), 0, SIZE + 1, SHIFT=0)


def test_a_read_before_the_start():
    with wrong(copy_kernel, "x", -4, (0,)):
        copy_kernel[(1,)](*tensors(SIZE, 8), 0, SIZE, SHIFT=-1)


def test_a_write_past_the_end_and_before_the_start():
    with wrong(shifted_store_kernel, "out", 2 * SIZE, (SIZE - 1,), "store"):
        shifted_store_kernel[(1,)](*tensors(SIZE, SIZE, dtype=torch.float16), SIZE, SHIFT=1)
    with wrong(shifted_store_kernel, "out", -2, (0,), "store"):
        shifted_store_kernel[(1,)](*tensors(SIZE, SIZE, dtype=torch.bfloat16), SIZE, SHIFT=-1)


def test_an_index_of_minus_one():
    (x, out), index = tensors(SIZE, 3), torch.tensor([4, -1, 0], dtype=torch.int32)
    indexed_kernel[(1,)](x, index, out, 3, MASKED=True)
    assert out.tolist() == [4, 0, 0]
    with wrong(indexed_kernel, "x", -4, (1,)):
        indexed_kernel[(1,)](x, index, out, 3, MASKED=False)
    with wrong(indexed_kernel, "index", 12, (3,)):
        indexed_kernel[(1,)](x, index, torch.zeros(8), 4, MASKED=True)


def test_another_tensor_is_outside():
    """One memory, two arguments: what lies in the other is not reached through a pointer to this."""
    memory = torch.arange(2.0 * SIZE)
    out = torch.zeros(1)
    neighbour_kernel[(1,)](memory[:SIZE], memory[SIZE:], out, SIZE - 1)
    assert out == SIZE - 1
    with wrong(neighbour_kernel, "x", 4 * SIZE, (0,)):
        neighbour_kernel[(1,)](memory[:SIZE], memory[SIZE:], out, SIZE)


def test_between_the_elements_of_a_strided_tensor():
    x, out = torch.arange(10.0)[::2], torch.zeros(1)
    scalar_kernel[(1,)](x, out, 4)
    assert out == 4
    with wrong(scalar_kernel, "x", 12, (0,)):
        scalar_kernel[(1,)](x, out, 3)


def test_nothing_is_inside_an_empty_tensor():
    with pytest.raises(interpreter.OutOfRange, match=r"scalar_kernel.*of x, lane"):
        scalar_kernel[(1,)](torch.zeros(0), torch.zeros(1), 0)


def test_atomics():
    out = torch.zeros(SIZE)
    add_kernel[(2,)](out, SIZE)
    assert out.eq(2).all()
    with wrong(add_kernel, "out", 4 * SIZE, (SIZE,), "atomic"):
        add_kernel[(1,)](out, SIZE + 1)
    with wrong(exchange_kernel, "out", -4, (0,), "atomic"):
        exchange_kernel[(1,)](torch.zeros(1, dtype=torch.int32), -1)


def test_boxes_of_a_descriptor():
    """What its shape leaves out is masked; a shape that is larger than the tensor is not."""
    x, out = torch.arange(24.0).half().view(3, 8), torch.ones(4, 8).half()
    box_kernel[(1,)](TensorDescriptor.from_tensor(x, [4, 8]), out, 1, 4, 8)
    assert out[:2].equal(x[1:]) and not out[2:].any()
    with wrong(box_kernel, "x", 48, (3, 0)):
        box_kernel[(1,)](TensorDescriptor(x, [4, 8], [8, 1], [4, 8]), out, 0, 4, 8)


def test_a_grid_of_no_programs():
    with pytest.raises(AssertionError, match=r"scalar_kernel: launched without a program: \(0,\)"):
        scalar_kernel[(0,)](*tensors(1, 1), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64], ids=str)
def test_guards_are_poison_and_watched(dtype):
    """Without an interpreter: as what runs on a GPU would read and write."""
    x, y = tensors(SIZE, 3, dtype=dtype)
    with guards.around("kernel", {"x": x, "y": y}) as moved:
        assert moved["x"].equal(x) and moved["x"].data_ptr() % 256 == x.data_ptr() % 256
        before, after = (
            moved["x"].as_strided((1,), (1,), moved["x"].storage_offset() + at) for at in (-1, SIZE)
        )
        for value in (before, after):
            assert value.isnan() if dtype.is_floating_point else value > 100
        moved["y"].fill_(7)
    assert y.eq(7).all()
    for at in (-1, SIZE):
        text = f"^kernel wrote outside x: at byte {at * x.element_size()} of x$"
        with pytest.raises(AssertionError, match=text), guards.around("kernel", {"x": x}) as moved:
            moved["x"].as_strided((1,), (1,), moved["x"].storage_offset() + at).fill_(1)


def test_guards_of_tensors_that_share_memory():
    memory = torch.arange(12.0)
    with guards.around("kernel", {"even": memory[:8:2], "odd": memory[1:6:2], "whole": memory[8:]}) as moved:
        moved["even"].neg_()
        assert moved["even"].as_strided((1,), (1,), moved["even"].storage_offset() + 7).isnan()
    assert memory.tolist() == [0, 1, -2, 3, -4, 5, -6, *range(7, 12)]
