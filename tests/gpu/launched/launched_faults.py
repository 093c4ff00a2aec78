"""Each check of the stand-in fails where there is something to find: planted faults, one for each."""

import ctypes
import threading
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from driver import machine
from driver.launches import Illegal
from driver.order import Race
from driver.watch import HostWaits, watch
from gpu_calls import LAUNCHES, check
from planted_kernels import product_kernel
from triton.runtime.errors import OutOfResources


@triton.jit
def copy_kernel(x, out, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


def floats(n: int = 4096, device: str = "cuda") -> torch.Tensor:
    return torch.zeros(n, device=device)


def copy(x, out, grid=(4,)):
    return copy_kernel[grid](x, out, 1024, N=256)


def test_a_sound_launch_is_recorded():
    library = machine.driver()
    before = library.standin_launch_count()
    copy(floats(), floats())
    assert library.standin_launch_count() == before + 1
    launch = library.standin_launch(before).contents
    assert launch.kernel == b"copy_kernel" and list(launch.grid) == [4, 1, 1] and launch.threads == 128


# ----------------------------------------------------------------------------------- descriptors

BFLOAT16, NO_SWIZZLE, SWIZZLE_128 = 9, 0, 3  # CUtensorMapDataType, CUtensorMapSwizzle


def encode(
    address: int,
    sizes=(64, 128),
    strides=(128,),
    box=(64, 64),
    swizzle=SWIZZLE_128,
    steps=(1, 1),
    type=BFLOAT16,
):
    """A descriptor of a matrix of bfloat16 by the driver: sizes and strides (in bytes) from the innermost on."""
    memory = (ctypes.c_byte * 256)()
    at = ctypes.c_void_p(-(-ctypes.addressof(memory) // 64) * 64)
    lists = (
        (ctypes.c_uint64, sizes),
        (ctypes.c_uint64, strides),
        (ctypes.c_uint32, box),
        (ctypes.c_uint32, steps),
    )
    arrays = [(kind * len(values))(*values) for kind, values in lists]
    library = machine.driver()
    error = library.cuTensorMapEncodeTiled(
        at, type, len(sizes), ctypes.c_void_p(address), *arrays, 0, swizzle, 0, 0
    )
    return library.standin_fault().decode() if error else ""


@pytest.mark.parametrize(
    "change,said",
    [
        ({}, ""),
        ({"strides": (136,)}, "not a multiple of 16"),
        ({"box": (64, 512)}, "a box of 512"),
        ({"box": (4, 64)}, "rows of a box have 8 bytes"),
        ({"box": (128, 64)}, "its swizzle spans 128"),
        ({"steps": (1, 9)}, "a step of 9"),
        ({"sizes": (0, 128)}, "size 0"),
        ({"sizes": (64, 129)}, "ends after the memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "sound",
)
def test_illegal_descriptors(change, said):
    matrix = torch.zeros(128, 64, dtype=torch.bfloat16, device="cuda")
    answer = encode(matrix.data_ptr(), **change)
    assert said in answer and bool(answer) == bool(said)


def test_a_descriptor_of_misaligned_memory_and_one_of_an_old_gpu():
    matrix = torch.zeros(129, 64, dtype=torch.bfloat16, device="cuda")
    assert "not at a multiple of 16 bytes" in encode(matrix.data_ptr() + 2)
    with torch.cuda.device(1):
        assert "9.0" in encode(matrix.data_ptr())


# ----------------------------------------------------------------------------- grids, memory


def test_illegal_grids():
    with pytest.raises(RuntimeError, match="of 65535"):
        copy(floats(), floats(), grid=(1, 65536))
    for grid in ((0,), (1 << 20, 1 << 12)):
        with pytest.raises(Illegal, match="which Triton skips"):
            copy(floats(), floats(), grid=grid)


def test_shared_memory_over_the_limit_of_the_device():
    def run(device):
        x = torch.zeros(4096, dtype=torch.bfloat16, device=device)
        product_kernel[(1,)](x, x, floats(device=device), 64, M=128, N=128, K=64, num_warps=8, num_stages=7)

    run("cuda:0")  # 192 KB
    with torch.cuda.device(1), pytest.raises(OutOfResources, match="shared memory"):
        run("cuda:1")


def test_the_driver_refuses_shared_memory_too():
    library, handle = machine.driver(), ctypes.c_void_p()
    library.cuModuleGetFunction(ctypes.byref(handle), None, b"kernel")
    with torch.cuda.device(1):
        assert library.cuFuncSetAttribute(handle, 8, 163 << 10) == 0
        assert (
            library.cuFuncSetAttribute(handle, 8, 164 << 10) != 0
            and b"shared memory" in library.standin_fault()
        )


def test_a_misaligned_pointer_where_the_code_is_for_aligned_ones():
    x, out = floats(), floats()
    copy(x[1:], out)  # has code of its own
    compiled = copy(x, out)
    with pytest.raises(Illegal, match=r"x = .*multiples of 16"):
        compiled[(4, 1, 1)](x[1:], out, 1024, 256)


def test_tensors_that_the_device_does_not_have():
    with pytest.raises((ValueError, RuntimeError)):
        copy(torch.zeros(4096), floats())
    with pytest.raises(RuntimeError, match="device 1 in a launch on 0"):
        copy(floats(device="cuda:1"), floats())


# ------------------------------------------------------------------------------ host, counts


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(8)),
        lambda x: x.unique(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
    ids=["item", "nonzero", "mask", "to-host", "from-host", "unique", "synchronize", "stream"],
)
def test_the_host_waits_in_a_capture(read):
    x = torch.arange(8.0, device="cuda")
    read(x)
    with pytest.raises(HostWaits), watch.capture():
        read(x)


def test_more_launches_than_documented():
    name = "gather_samples, scatter_samples"
    check(name, "exact", torch.bfloat16)
    for i in range(4):
        fewer = [most - (i == k) for k, most in enumerate(LAUNCHES[name]["exact"])]
        with mock.patch.dict(LAUNCHES[name], exact=fewer), pytest.raises(AssertionError, match="documented"):
            check(name, "exact", torch.bfloat16)


# ------------------------------------------------------------------------------------- order


def test_work_of_another_stream_that_nothing_waits_for():
    side = torch.cuda.Stream()
    with watch.fresh():
        x, out = floats(), floats()
        with pytest.raises(Race, match="still writes"), torch.cuda.stream(side):
            copy(x, out)
    with watch.fresh():
        x, out = floats(), floats()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy(x, out)
        with pytest.raises(Race, match="still reads"):
            x.add_(1)
        torch.cuda.current_stream().wait_event(side.record_event())
        x.add_(1)


def test_an_event_of_before_the_work_does_not_do():
    side = torch.cuda.Stream()
    with watch.fresh():
        early = torch.cuda.current_stream().record_event()
        x = floats()
        side.wait_event(early)
        with pytest.raises(Race), torch.cuda.stream(side):
            x + 1
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            x + 1


def test_memory_that_is_freed_while_another_stream_uses_it():
    side = torch.cuda.Stream()

    def use(keep):
        x = floats()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
        keep(x)

    with pytest.raises(Race, match="was freed"), watch.fresh():
        use(lambda x: None)
    with watch.fresh():
        use(lambda x: x.record_stream(side))
        use(lambda x: torch.cuda.current_stream().wait_stream(side))


def test_a_capture_that_does_not_join_a_side_stream():
    side = torch.cuda.Stream()
    with pytest.raises(Race, match="the capture ends"), watch.capture():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            floats()


def test_a_capture_that_waits_for_work_outside_of_it():
    outside = torch.cuda.Stream().record_event()
    with pytest.raises(Race, match="outside of the graph"), watch.capture():
        torch.cuda.current_stream().wait_event(outside)


def test_the_backward_follows_the_streams_of_the_forward():
    side, x = torch.cuda.Stream(), torch.ones(8, device="cuda", requires_grad=True)
    with watch.fresh():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        torch.cuda.current_stream().wait_stream(side)
        y.sum().backward()
        y.record_stream(torch.cuda.current_stream())
        assert x.grad.tolist() == [2.0] * 8


def test_streams_are_of_a_thread():
    side, seen = torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        assert torch.cuda.current_stream() == side and seen == [torch.cuda.default_stream()]


@triton.jit
def choosing_kernel(x, first, second, n, N: tl.constexpr):
    """Stores through an address that a condition chooses and a loop moves."""
    at = tl.arange(0, N)
    to = first + at
    if n > 3:
        to = second + at
    for start in range(0, n):
        tl.store(to, tl.load(x + start * N + at))
        to += N


def test_a_kernel_is_known_by_what_it_reads_and_writes():
    x, first, second = floats(), floats(), floats()
    with mock.patch.object(watch, "operation") as told:
        choosing_kernel[(1,)](x, first, second, 4, N=64)
    (_, _, reads, writes), _ = told.call_args
    assert [id(r) for r in reads] == [id(x)] and [id(w) for w in writes] == [id(first), id(second)]
