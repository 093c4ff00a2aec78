"""The one who is told of everything: the order of operations, waits of the host, and what is captured."""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from . import machine
from .order import Clock, Memory, Order, Race, Stream


class HostWaits(AssertionError):
    """The host waits for a device where a CUDA graph could be captured."""


_UNSEEN = ("torch.cuda.synchronize", "Event.synchronize")  # by torch's debug mode


class Moment(NamedTuple):
    """What is over once an event is, and whether it is part of a capture."""

    clock: Clock
    captured: bool


class Watch:
    """What the process did since :meth:`fresh`."""

    def __init__(self):
        self.order, self.counts = Order(), Counter()
        self.captured: set[Stream] = set()  # the streams whose work goes to a CUDA graph
        self.memories: dict[int, Memory] = {}  # by first address
        self.recorded: list | None = None  # the operations of the graph that is captured
        self.forbids_waits = False  # ``torch.cuda.set_sync_debug_mode("error")``

    # ------------------------------------------------------------------ where the process stands

    def device(self) -> int:
        return machine.guard().guard_device()

    def stream(self, device: int) -> tuple[int, int]:
        return device, machine.guard().guard_stream(device)

    def memory_of(self, x: Tensor) -> Memory | None:
        """The allocation that a tensor lies in; None for an empty one."""
        return self.memories.get(x.untyped_storage().data_ptr())

    # ---------------------------------------------------------------------------- what it does

    def operation(self, what: str, device: int, reads, writes, kernel: bool = False) -> None:
        """One operation of a device on its current stream, by tensors."""
        self.counts["kernels" if kernel else "torch"] += 1
        self.counts[what] += 1
        pairs = [[(m, x) for x in some if (m := self.memory_of(x)) is not None] for some in (reads, writes)]
        self.order.operation(what, self.stream(device), *pairs, kernel)
        if self.recorded is not None:
            self.recorded.append((what, device, *pairs, kernel))

    def replay(self, operations: list) -> None:
        """One launch of a CUDA graph: its operations, one after the other."""
        self.counts["replays"] += 1
        for what, device, reads, writes, kernel in operations:
            stream = self.stream(device)
            self.order.operation(what, stream, reads, writes, kernel)
            for memory, _ in (*reads, *writes):  # the graph's own is freed with it, after its work
                memory.also_used_on.add(stream)

    def host_reads(self, what: str, device: int) -> None:
        """The host waits for the current stream."""
        if self.forbids_waits and what not in _UNSEEN:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        if self.captured:
            raise HostWaits(f"{what}: the host waits for cuda:{device} while a CUDA graph is captured")
        self.counts["host"] += 1
        self.order.host_waits(self.order.record(self.stream(device)))

    def record(self, stream: Stream) -> "Moment":
        """An event."""
        return Moment(self.order.record(stream), stream in self.captured)

    def wait(self, stream: Stream, moment: "Moment") -> None:
        """A stream waits for an event, and so becomes part of a capture that the event is of."""
        if stream in self.captured and not moment.captured:
            raise Race(f"stream {stream[1]}, which is captured, waits for work outside of the graph")
        if moment.captured and self.captured:
            self.captured.add(stream)
        self.order.wait(stream, moment.clock)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """As in ``torch.cuda.graph``: the host must not wait, and side streams must be joined at the end."""
        stream = self.stream(self.device())
        self.captured.add(stream)
        machine.driver().standin_set_capturing(True)
        try:
            yield
            after = self.order.record(stream)
            for other in self.captured:
                if after.get(other, 0) < self.order.record(other)[other]:
                    raise Race(
                        f"the capture ends before the work of stream {other[1]}, which nothing waits for"
                    )
        finally:
            self.captured.clear()
            machine.driver().standin_set_capturing(False)

    @contextlib.contextmanager
    def fresh(self) -> Iterator["Watch"]:
        """Counts from here on; raises at the end what nobody could be told of."""
        gc.collect()  # what a caught error kept alive is freed here, and not told of later
        self.counts = Counter()
        self.order.late.clear()
        yield self
        if self.order.late:
            raise Race("; ".join(self.order.late))


watch = Watch()
