"""CUDA for one pipeline: device memory, page-locked memory, streams, graphs and events.

A thin typed layer over the CUDA runtime library by ctypes, of versions 12 and 13. Nothing is freed
behind the caller's back: what is allocated is freed by ``free`` or ``close``, which may be called
twice.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_size_t, c_void_p
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mdruntime import cudart
from mdruntime.cuda_resources import Capture, DeviceBuffer, Event, Graph, PinnedArray, Stream
from mdruntime.cudart import SIGNATURES, Calls, CudaError, load_library
from mdruntime.errors import ProviderError

__all__ = [
    "SIGNATURES",
    "Capture",
    "Cuda",
    "CudaError",
    "DeviceBuffer",
    "Event",
    "Graph",
    "PinnedArray",
    "Stream",
    "load_library",
    "open_cuda",
]

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads do is their business
_CC_MAJOR, _CC_MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and Minor
_NAME_BYTES = 256  # at the head of cudaDeviceProp, in every version
_PROPERTIES_BYTES = 16384  # more than cudaDeviceProp takes in any version (about 1 kB)
_MIB = 1 << 20


class Cuda:
    """A CUDA runtime library at work, on the current device of the calling thread."""

    def __init__(self, library: Any) -> None:
        """Take a loaded library: see ``load_library``.

        Raises:
            ProviderError: it lacks a function, or is neither of CUDA 12 nor 13.
        """
        self._calls = Calls(library)

    @property
    def runtime_version(self) -> tuple[int, int]:
        """Version of the library."""
        return self._calls.version("cudaRuntimeGetVersion")

    @property
    def driver_version(self) -> tuple[int, int]:
        """Newest CUDA version that the driver serves; (0, 0) where there is no driver."""
        return self._calls.version("cudaDriverGetVersion")

    def devices(self) -> int:
        """Return how many devices there are.

        Raises:
            CudaError: none, or no driver.
        """
        return self._calls.number("cudaGetDeviceCount")

    def name(self, device: int = 0) -> str:
        """Return a device's name, such as ``Orin`` or ``NVIDIA H100 80GB HBM3``."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._calls("cudaGetDeviceProperties", ctypes.addressof(properties), device)
        return properties.raw[:_NAME_BYTES].split(b"\0")[0].decode(errors="replace")

    def compute_capability(self, device: int = 0) -> tuple[int, int]:
        """Return a device's compute capability, such as (8, 7)."""
        major = self._calls.number("cudaDeviceGetAttribute", _CC_MAJOR, device)
        return major, self._calls.number("cudaDeviceGetAttribute", _CC_MINOR, device)

    def memory(self) -> tuple[int, int]:
        """Return the current device's free and total memory, in bytes."""
        free, total = c_size_t(), c_size_t()
        self._calls("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def use(self, device: int) -> None:
        """Make a device the current one of the calling thread."""
        self._calls("cudaSetDevice", device)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Allocate device memory; its content is undefined.

        Raises:
            MemoryError: it does not fit.
        """
        try:
            return DeviceBuffer(self._calls, nbytes)
        except MemoryError as error:
            free, total = self.memory()
            raise MemoryError(
                f"{nbytes / _MIB:.1f} MiB of device memory were asked for, and {free / _MIB:.1f} "
                f"of {total / _MIB:.1f} MiB are free: {error}"
            ) from None

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> PinnedArray:
        """Allocate an array of zeros in page-locked host memory.

        Raises:
            MemoryError: it does not fit.
        """
        return PinnedArray(self._calls, tuple(shape), np.dtype(dtype))

    def stream(self) -> Stream:
        """Create a stream that does not wait for the default stream."""
        return Stream(self._calls)

    def event(self) -> Event:
        """Create an event, a point in time of a stream."""
        return Event(self._calls)

    def upload(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy page-locked host memory at ``source`` to the device, when the stream gets there."""
        self._copy(target, source, nbytes, _HOST_TO_DEVICE, stream)

    def download(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy device memory to page-locked host memory at ``target``, in the stream's turn."""
        self._copy(target, source, nbytes, _DEVICE_TO_HOST, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy device memory to device memory, when the stream gets there."""
        self._copy(target, source, nbytes, _DEVICE_TO_DEVICE, stream)

    def zero(self, address: int, nbytes: int, stream: Stream) -> None:
        """Set device memory to zeros, when the stream gets there."""
        self._calls("cudaMemsetAsync", address, 0, nbytes, stream.handle)

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[Capture]:
        """Record what the block puts on a stream, in place of running it.

        After the block, ``graph`` of what is yielded is ready to be launched.

        Raises:
            CudaError: the block did what cannot be captured; the stream is usable again then.
        """
        self._calls("cudaStreamBeginCapture", stream.handle, _THREAD_LOCAL)
        captured = Capture()
        try:
            yield captured
        except BaseException:
            with suppress(CudaError):  # the block's own error says why
                self._calls("cudaGraphDestroy", self._recorded(stream))
            raise
        recorded = self._recorded(stream)
        try:
            captured.graph = Graph(self._calls, recorded)
        finally:
            self._calls("cudaGraphDestroy", recorded)

    def _recorded(self, stream: Stream) -> int:
        """End a capture and return the handle of what was recorded, not to be run as it is."""
        out = c_void_p()
        self._calls("cudaStreamEndCapture", stream.handle, ctypes.byref(out))
        return out.value or 0

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: Stream) -> None:
        self._calls("cudaMemcpyAsync", target, source, nbytes, kind, stream.handle)


def open_cuda() -> Cuda:
    """Return CUDA where a device answers.

    A runtime library newer than the driver cannot be used: an older one is taken where there is
    one.

    Raises:
        ProviderError: no library, no driver or no device.
    """
    errors = []
    for library in cudart.libraries():
        answer = _opened(library)
        if isinstance(answer, Cuda):
            return answer
        errors.append(answer)
    raise errors[0] if errors else cudart.missing()


def _opened(library: Any) -> Cuda | ProviderError:
    try:
        cuda = Cuda(library)
        cuda.devices()
    except ProviderError as error:
        return error
    return cuda
