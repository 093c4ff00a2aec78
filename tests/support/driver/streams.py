"""``torch.cuda`` in a PyTorch without CUDA: devices, streams and events, as far as this package uses them."""

import contextlib
import ctypes
import itertools
import time
import types

import torch

from . import machine
from .watch import Moment, watch

_numbers = itertools.count(1)  # 0: the default stream
_CUDA = 1  # c10::DeviceType::CUDA


class Stream(torch.Stream):
    """``torch.cuda.Stream``."""

    def __new__(cls, device=None, priority: int = 0, number: int | None = None):
        index = _index(device)
        number = next(_numbers) if number is None else number
        return super().__new__(cls, stream_id=number, device_index=index, device_type=_CUDA)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @property
    def _place(self) -> tuple[int, int]:
        return self.device_index, self.stream_id

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if event.moment is not None:
            watch.wait(self._place, event.moment)

    def wait_stream(self, stream: "Stream") -> None:
        watch.wait(self._place, watch.record(stream._place))

    def synchronize(self) -> None:
        watch.host_reads("Stream.synchronize", self.device_index)
        watch.order.host_waits(watch.order.record(self._place))

    def query(self) -> bool:
        return True


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, *arguments, **named):
        self.moment: Moment | None = None
        self.recorded = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.moment, self.recorded = watch.record((stream or current_stream())._place), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        watch.host_reads("Event.synchronize", watch.device())
        if self.moment is not None:
            watch.order.host_waits(self.moment.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of the host: a device takes none."""
        return 1e3 * (end.recorded - self.recorded)


class CUDAGraph:
    """``torch.cuda.CUDAGraph``. A replay does to memory what the capture did, and leaves its values as they are."""

    def capture_begin(self, pool=None, capture_error_mode: str = "global") -> None:
        self._operations, self._capture = [], watch.capture()
        self._capture.__enter__()
        watch.recorded = self._operations

    def capture_end(self) -> None:
        watch.recorded = None
        self._capture.__exit__(None, None, None)

    def replay(self) -> None:
        watch.replay(self._operations)


class Generator(torch.Generator):
    """``torch.Generator``: numbers are made on the host."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def _index(device) -> int:
    """The ordinal of a device, by default the current one."""
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    return watch.device() if index is None else index


def set_device(device) -> None:
    machine.guard().guard_set_device(_index(device))


def exchange_device(index: int) -> int:
    before = watch.device()
    if index >= 0:
        machine.guard().guard_set_device(index)
    return before


def current_stream(device=None) -> Stream:
    index = _index(device)
    return Stream(index, number=watch.stream(index)[1])


def set_stream(stream: Stream) -> None:
    machine.guard().guard_set_stream(*stream._place)


@contextlib.contextmanager
def stream(given: Stream | None):
    """``torch.cuda.stream``."""
    if given is None:
        yield
        return
    before, device = current_stream(given.device_index), exchange_device(given.device_index)
    set_stream(given)
    try:
        yield
    finally:
        set_stream(before)
        set_device(device)


def synchronize(device=None) -> None:
    watch.host_reads("torch.cuda.synchronize", _index(device))
    watch.order.host_waits(watch.order.everything(_index(device)))


def properties(device=None) -> types.SimpleNamespace:
    gpu = machine.GPUS[_index(device)]
    major, minor = gpu.capability
    return types.SimpleNamespace(
        name=gpu.name, major=major, minor=minor, multi_processor_count=gpu.processors
    )


def install() -> None:
    """From now on ``torch.cuda`` speaks of the stand-in's devices."""
    own = {
        "_lazy_init": lambda: None,
        "device_count": lambda: len(machine.GPUS),
        "current_device": watch.device,
        "set_device": set_device,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "get_device_capability": lambda device=None: machine.GPUS[_index(device)].capability,
        "get_device_properties": properties,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(device, number=0),
        "set_stream": set_stream,
        "stream": stream,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 0),
        "get_sync_debug_mode": lambda: 2 * watch.forbids_waits,
        "set_sync_debug_mode": lambda mode: setattr(watch, "forbids_waits", mode in (2, "error")),
        "is_current_stream_capturing": lambda: current_stream()._place in watch.captured,
    }
    for name, value in own.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    machine.guard().guard_tell(_of_records, _of_waits, _of_uses, machine.driver().standin_set_device)


# Backward passes record, wait and hold memory in C++.
_moments: dict[int, Moment] = {}  # by event
_call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int, ctypes.c_int64)


@_call
def _of_records(event: int, device: int, stream: int) -> None:
    _moments[event] = watch.record((device, stream))


@_call
def _of_waits(event: int, device: int, stream: int) -> None:
    watch.wait((device, stream), _moments[event])


@_call
def _of_uses(address: int, device: int, stream: int) -> None:
    watch.memories[address].also_used_on.add((device, stream))
