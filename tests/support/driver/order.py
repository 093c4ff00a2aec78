"""Finds work that runs on a stream before the work of another stream that it depends on.

A clock counts, for each stream, the operations that are known to be over: that of a stream when its next operation
starts, that of an event when it was recorded, that of the host after it waited. An operation may touch what another
one wrote only if that other one is in its stream's clock.

Two kernels that write one piece of memory at once are not reported: they may write different elements of it, as a
convolution and the fill beside it do.
"""

import collections
import dataclasses

from guards import span

Stream = tuple[int, int]  # device, number
Clock = dict[Stream, int]


class Race(AssertionError):
    """An operation that another one must come before, and nothing sees to it."""


@dataclasses.dataclass
class Access:
    """What an operation did to bytes of a memory."""

    what: str
    stream: Stream
    time: int  # of the stream's clock
    first: int
    end: int
    writes: bool
    kernel: bool  # which may touch only some elements of the range

    def conflicts(self, other: "Access") -> bool:
        if self.end <= other.first or other.end <= self.first or not (self.writes or other.writes):
            return False
        return not (self.writes and other.writes and self.kernel and other.kernel)


class Memory:
    """An allocation on a device, and who touched it since."""

    def __init__(self, first: int, size: int, device: int, stream: Stream):
        self.first, self.size, self.device, self.stream = first, size, device, stream
        self.accesses: list[Access] = []
        self.also_used_on: set[Stream] = set()  # ``record_stream``


class Order:
    """The clocks of all streams of the machine."""

    def __init__(self):
        self._clocks: collections.defaultdict[Stream, Clock] = collections.defaultdict(dict)
        self._host: Clock = {}
        self.late: list[str] = []  # faults that nobody was there to be told of

    def operation(self, what: str, stream: Stream, reads, writes, kernel: bool = False) -> None:
        """Notes an operation; ``reads`` and ``writes`` are pairs of a memory and a tensor in it.

        Raises:
            Race: an earlier operation that it must come after may still run.
        """
        clock = self._clocks[stream]
        _merge(clock, self._host)
        time = clock[stream] = clock.get(stream, 0) + 1
        for memory, x, written in [*((*r, False) for r in reads), *((*w, True) for w in writes)]:
            first, end = span(x) if x.numel() else (0, 0)
            access = Access(what, stream, time, first, end, written, kernel)
            for other in memory.accesses:
                if other.conflicts(access) and not _over(other, clock):
                    done = "writes" if other.writes else "reads"
                    raise Race(
                        f"{what} on stream {stream[1]} {'writes' if written else 'reads'} what {other.what} on stream "
                        f"{other.stream[1]} still {done}: no event or synchronisation is between them"
                    )
            kept = [a for a in memory.accesses if not _replaces(access, a)]
            memory.accesses = [*kept, access]

    def record(self, stream: Stream) -> Clock:
        """The clock of an event."""
        return {**self._clocks[stream], **{stream: self._clocks[stream].get(stream, 0)}}

    def wait(self, stream: Stream, clock: Clock) -> None:
        """The stream goes on after an event."""
        _merge(self._clocks[stream], clock)

    def host_waits(self, clock: Clock) -> None:
        """The host, and whatever it launches from now on, goes on after these operations."""
        _merge(self._host, clock)

    def everything(self, device: int) -> Clock:
        """The clock of an event after all work of a device."""
        clock: Clock = {}
        for stream in list(self._clocks):
            if stream[0] == device:
                _merge(clock, self.record(stream))
        return clock

    def freed(self, memory: Memory) -> None:
        """Memory goes back to the stream that it was allocated on, whose next tensor may get it."""
        clock = {**self._clocks[memory.stream]}
        _merge(clock, self._host)
        known = {memory.stream, *memory.also_used_on}
        self.late += [
            f"{access.what} on stream {access.stream[1]} may still use memory of stream {memory.stream[1]} that was "
            "freed: neither record_stream nor an event keeps it"
            for access in memory.accesses
            if access.stream not in known and not _over(access, clock)
        ]


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(time, clock.get(stream, 0))


def _over(access: Access, clock: Clock) -> bool:
    return clock.get(access.stream, 0) >= access.time


def _replaces(new: Access, old: Access) -> bool:
    """A later access of one stream stands for an earlier one of the same kind to the same bytes."""
    return (new.stream, new.first, new.end, new.writes) == (old.stream, old.first, old.end, old.writes)
