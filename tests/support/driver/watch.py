"""The one who is told of everything: the order of operations, waits of the host, and what is captured."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from . import machine
from .order import Memory, Order, Race


class HostWaits(AssertionError):
    """The host waits for a device where a CUDA graph could be captured."""


class Watch:
    """What the process did since :meth:`fresh`."""

    def __init__(self):
        self.order, self.capturing, self.counts = Order(), False, Counter()
        self.memories: dict[int, Memory] = {}  # by first address

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

    def host_reads(self, what: str, device: int) -> None:
        """The host waits for the current stream."""
        if self.capturing:
            raise HostWaits(f"{what}: the host waits for cuda:{device} while a CUDA graph is captured")
        self.counts["host"] += 1
        self.order.host_waits(self.order.record(self.stream(device)))

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """As in ``torch.cuda.graph``: the host must not wait, and side streams must be joined at the end."""
        device = self.device()
        before = self.order.everything(device)
        self._captures(True)
        try:
            yield
        finally:
            self._captures(False)
        after = self.order.record(self.stream(device))
        for stream, time in self.order.everything(device).items():
            if time > before.get(stream, 0) and after.get(stream, 0) < time:
                raise Race(f"the capture ends before the work of stream {stream[1]}, which nothing waits for")

    def _captures(self, now: bool) -> None:
        self.capturing = now
        machine.driver().standin_set_capturing(now)

    @contextlib.contextmanager
    def fresh(self) -> Iterator["Watch"]:
        """Counts from here on; raises at the end what nobody could be told of."""
        self.counts = Counter()
        self.order.late.clear()
        yield self
        if self.order.late:
            raise Race("; ".join(self.order.late))


watch = Watch()
