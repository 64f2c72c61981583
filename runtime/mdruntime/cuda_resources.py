"""What lives on a CUDA device or beside it, and is given back by hand: memory, streams, graphs."""

import ctypes
import math
from ctypes import c_float
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mdruntime.cudart import Calls
from mdruntime.errors import ProviderError

__all__ = ["Capture", "DeviceBuffer", "Event", "Graph", "PinnedArray", "Stream"]

_NON_BLOCKING = 1  # cudaStreamNonBlocking: never waits for the legacy default stream
_Own = TypeVar("_Own", bound="_Resource")


class _Resource:
    """What a library created under a handle or address, and must be told to destroy once."""

    _destroy = ""

    def __init__(self, calls: Calls, handle: int) -> None:
        self._calls = calls
        self._handle = handle

    def close(self) -> None:
        """Give it back; doing so again does nothing."""
        handle, self._handle = self._handle, 0
        if handle:
            self._calls(self._destroy, handle)

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        if not self._handle:
            raise ProviderError(f"this {type(self).__name__} is closed; make another one")
        return self._handle


class DeviceBuffer(_Resource):
    """Device memory, which the host cannot read.

    Attributes:
        nbytes: its size.
    """

    _destroy = "cudaFree"

    def __init__(self, calls: Calls, nbytes: int) -> None:
        """Allocate; see ``Cuda.allocate``."""
        super().__init__(calls, calls.new("cudaMalloc", max(1, nbytes)))
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        """Where it begins; aligned to 256 bytes or more."""
        return self._open()

    free = _Resource.close


class PinnedArray(_Resource):
    """An array in page-locked host memory, which the device can copy to and from on its own.

    NumPy does not know when the memory is freed: use no view of ``array`` after ``free``, and
    write or read nothing that a stream has not finished with.
    """

    _destroy = "cudaFreeHost"

    def __init__(self, calls: Calls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Allocate; see ``Cuda.pinned``."""
        self.nbytes = math.prod(shape) * dtype.itemsize
        super().__init__(calls, calls.new("cudaHostAlloc", max(1, self.nbytes), 0))
        memory = (ctypes.c_ubyte * self.nbytes).from_address(self._handle)
        self._array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        self._array.fill(0)

    @property
    def array(self) -> NDArray[Any]:
        """The memory as an array of the shape and dtype asked for."""
        self._open()
        return self._array

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._open()

    free = _Resource.close


class Stream(_Resource):
    """A queue of work on the device, done in order."""

    _destroy = "cudaStreamDestroy"

    def __init__(self, calls: Calls) -> None:
        """Create it; see ``Cuda.stream``."""
        super().__init__(calls, calls.new("cudaStreamCreateWithFlags", _NON_BLOCKING))

    @property
    def handle(self) -> int:
        """What TensorRT calls the stream."""
        return self._open()

    def synchronize(self) -> None:
        """Wait until all work on it is done.

        Raises:
            CudaError: some of the work failed.
        """
        self._calls("cudaStreamSynchronize", self._open())


class Graph(_Resource):
    """Recorded work that is launched as one; it uses the addresses it was recorded with."""

    _destroy = "cudaGraphExecDestroy"

    def __init__(self, calls: Calls, recorded: int) -> None:
        """Make recorded work ready to run; see ``Cuda.capture``."""
        super().__init__(calls, calls.new("cudaGraphInstantiateWithFlags", recorded, 0))

    def launch(self, stream: Stream) -> None:
        """Put all of it on a stream."""
        self._calls("cudaGraphLaunch", self._open(), stream.handle)


class Capture:
    """What a block under ``Cuda.capture`` recorded."""

    def __init__(self) -> None:
        """Begin with nothing: the graph comes when the block is left."""
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        """The graph, once the block is left without an exception."""
        if self._graph is None:
            raise ProviderError("nothing was captured yet; leave the block of capture() first")
        return self._graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        self._graph = graph


class Event(_Resource):
    """A point in time of a stream."""

    _destroy = "cudaEventDestroy"

    def __init__(self, calls: Calls) -> None:
        """Create it; see ``Cuda.event``."""
        super().__init__(calls, calls.new("cudaEventCreate"))

    def record(self, stream: Stream) -> None:
        """Let it be the moment when the stream gets here."""
        self._calls("cudaEventRecord", self._open(), stream.handle)

    def milliseconds_since(self, other: "Event") -> float:
        """Wait for it, and return how long after another event it happened."""
        self._calls("cudaEventSynchronize", self._open())
        out = c_float()
        self._calls("cudaEventElapsedTime", ctypes.byref(out), other._open(), self._open())
        return out.value
