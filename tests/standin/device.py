"""A stand-in device: streams that are only worked on when somebody waits, captures, a clock."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.standin.errors import CodeError, Cuda
from tests.standin.memory import Memory, MisuseError, Range
from tests.standin.options import Options

__all__ = ["Capture", "Counters", "Device", "Operation", "Stream"]


@dataclass(frozen=True)
class Operation:
    """Work for a stream.

    Attributes:
        name: of it, for messages.
        ranges: all memory it uses; looked up when it runs, not before.
        run: does it.
        ms: how long it takes on the device's clock.
        recheck: called before it runs as part of a graph.
    """

    name: str
    ranges: tuple[Range, ...]
    run: Callable[[], None]
    ms: float = 0.0
    recheck: Callable[[], None] | None = None


@dataclass
class Capture:
    """What is recorded on a stream in place of being run."""

    thread: int
    operations: list[Operation] = field(default_factory=list)
    broken: bool = False


@dataclass
class Stream:
    """Work waiting, in order; ``now`` is its time in milliseconds."""

    handle: int
    pending: deque[Operation] = field(default_factory=deque)
    capture: Capture | None = None
    now: float = 0.0


@dataclass
class Counters:
    """What a program did with a device. Bytes are counted when they move."""

    uploaded: int = 0
    downloaded: int = 0
    copied: int = 0
    uploads: int = 0
    downloads: int = 0
    enqueues: int = 0  # of engines, captured ones included
    launches: int = 0  # of graphs
    captures: int = 0
    passes: int = 0  # of engines that ran
    synchronisations: int = 0


class Device:
    """Memory, streams and handles of one device."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.memory = Memory(options.memory)
        self.counters = Counters()
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, tuple[Operation, ...]] = {}
        self.runnable: dict[int, tuple[Operation, ...]] = {}
        self.events: dict[int, float | None] = {}
        self._handles = itertools.count(0x5EED_0010, 16)

    def handle(self) -> int:
        """Return a handle that was never used."""
        return next(self._handles)

    def stream(self, handle: int) -> Stream:
        """Return a stream that lives."""
        if handle not in self.streams:
            raise CodeError(Cuda.INVALID_RESOURCE_HANDLE)
        return self.streams[handle]

    def enqueue(self, handle: int, operation: Operation) -> None:
        """Put work on a stream, or record it where the stream is being captured."""
        stream = self.stream(handle)
        if stream.capture is not None:
            if stream.capture.broken:
                raise CodeError(Cuda.STREAM_CAPTURE_INVALIDATED)
            stream.capture.operations.append(operation)
            return
        for used in operation.ranges:
            self.memory.check(used)
        self._race(stream, operation)
        stream.pending.append(operation)

    def _race(self, stream: Stream, operation: Operation) -> None:
        """Refuse work that another stream's unfinished work may overtake."""
        for other in self.streams.values():
            for waiting in other.pending if other is not stream else ():
                for mine, its in itertools.product(operation.ranges, waiting.ranges):
                    if mine.clashes(its):
                        raise MisuseError(
                            f"{operation.name} uses {mine.label or hex(mine.address)} while "
                            f"{waiting.name} on another stream has not finished with it"
                        )

    def launch(self, handle: int, operations: Sequence[Operation]) -> None:
        """Put the work of a graph on a stream, with the addresses it was recorded with."""
        if self.stream(handle).capture is not None:
            raise CodeError(Cuda.STREAM_CAPTURE_UNSUPPORTED)
        for operation in operations:
            if operation.recheck is not None:
                operation.recheck()
            self.enqueue(handle, operation)
        self.counters.launches += 1

    def synchronise(self, handle: int) -> None:
        """Do all the work of a stream."""
        self.forbid_in_capture(handle)
        self.counters.synchronisations += 1
        self.finish(self.stream(handle))

    def finish(self, stream: Stream) -> None:
        """Do all the work of a stream, in order."""
        while stream.pending:
            operation = stream.pending.popleft()
            for used in operation.ranges:
                self.memory.check(used)
            operation.run()
            stream.now += operation.ms

    def finish_all(self) -> None:
        """Do all work there is."""
        for stream in self.streams.values():
            self.finish(stream)

    def forbid_in_capture(self, handle: int = 0) -> None:
        """Refuse what must not happen while a stream is captured, and break the capture.

        Args:
            handle: of the stream that is meant; 0 is the device as a whole, for this thread.
        """
        for stream in self.streams.values():
            capture = stream.capture
            if capture is None:
                continue
            if handle == stream.handle or (not handle and capture.thread == threading.get_ident()):
                capture.broken = True
                raise CodeError(Cuda.STREAM_CAPTURE_UNSUPPORTED)

    def pending_on(self, address: int) -> bool:
        """Return whether unfinished work uses the allocation that begins at an address."""
        return any(
            self.memory.check(used).address == address
            for stream in self.streams.values()
            for waiting in stream.pending
            for used in waiting.ranges
        )

    def leaks(self) -> list[str]:
        """Say what was not given back."""
        left = [str(one) for one in self.memory.live()]
        for name, handles in (
            ("stream", self.streams),
            ("event", self.events),
            ("graph", self.graphs),
            ("graph ready to run", self.runnable),
        ):
            left += [f"a {name}, {handle:#x}" for handle in handles]
        return left
