"""A stand-in for NVIDIA's CUDA runtime library: the functions that mdruntime calls, in Python."""

import ctypes
import threading

from tests.standin.device import Capture, Operation, Stream
from tests.standin.errors import CodeError, Cuda
from tests.standin.library import StandInLibrary
from tests.standin.memory import MisuseError, Range

__all__ = ["StandInCudart"]

_BYTES_PER_MS = 10_000_000.0
_KINDS = {1: (False, True), 2: (True, False), 3: (False, False)}  # target, source in host memory


class StandInCudart(StandInLibrary):
    """A stand-in for libcudart, which drives a stand-in device."""

    # What the library says of itself and of the device.

    def _get_error_name(self, code: int) -> bytes:
        return _error(code).label.encode()

    def _get_error_string(self, code: int) -> bytes:
        return b"stand-in: " + _error(code).name.lower().replace("_", " ").encode()

    def _get_last_error(self) -> int:
        return self.forget()

    def _runtime_get_version(self, out: ctypes.c_int) -> None:
        major, minor = self.device.options.runtime
        out.value = 1000 * major + 10 * minor

    def _driver_get_version(self, out: ctypes.c_int) -> None:
        major, minor = self.device.options.driver
        out.value = 1000 * major + 10 * minor

    def _get_device_count(self, out: ctypes.c_int) -> None:
        out.value = self.device.options.devices

    def _set_device(self, device: int) -> None:
        self._exists(device)

    def _device_get_attribute(self, out: ctypes.c_int, attribute: int, device: int) -> None:
        self._exists(device)
        major, minor = self.device.options.compute_capability
        if attribute not in (75, 76):
            raise CodeError(Cuda.INVALID_VALUE)
        out.value = major if attribute == 75 else minor

    def _get_device_properties(self, address: int, device: int) -> None:
        self._exists(device)
        name = self.device.options.name.encode()[:255] + b"\0"
        ctypes.memset(address, 0xAA, 1032)  # what cudaDeviceProp takes in CUDA 12
        ctypes.memmove(address, name, len(name))

    def _exists(self, device: int) -> None:
        if not 0 <= device < self.device.options.devices:
            raise CodeError(Cuda.INVALID_DEVICE)

    # Memory.

    def _mem_get_info(self, free: ctypes.c_size_t, total: ctypes.c_size_t) -> None:
        memory = self.device.memory
        free.value, total.value = memory.total - memory.used, memory.total

    def _malloc(self, out: ctypes.c_void_p, nbytes: int) -> None:
        self.device.forbid_in_capture()
        made = self.device.memory.device(nbytes)
        if made is None:
            raise CodeError(Cuda.MEMORY_ALLOCATION)
        out.value = made.address

    def _host_alloc(self, out: ctypes.c_void_p, nbytes: int, flags: int) -> None:
        self.device.forbid_in_capture()
        if flags not in range(8):
            raise CodeError(Cuda.INVALID_VALUE)
        out.value = self.device.memory.host(nbytes).address

    def _free(self, address: int) -> None:
        if address:
            self.device.forbid_in_capture()
            self.device.finish_all()  # cudaFree waits for the device
            if self.device.memory.free(address, host=False) is None:
                raise CodeError(Cuda.INVALID_VALUE)

    def _free_host(self, address: int) -> None:
        if address:
            self.device.forbid_in_capture()
            if self.device.pending_on(address):
                raise MisuseError("page-locked memory is freed while a stream still has to use it")
            if self.device.memory.free(address, host=True) is None:
                raise CodeError(Cuda.INVALID_VALUE)

    def _memcpy_async(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        if kind not in _KINDS:
            raise CodeError(Cuda.INVALID_VALUE)
        hosts = _KINDS[kind]
        to = Range(target, nbytes, True, hosts[0], "the target of a copy")
        frm = Range(source, nbytes, False, hosts[1], "the source of a copy")
        if to.clashes(frm):
            raise MisuseError("the source and the target of a copy overlap")

        def run() -> None:
            self.device.memory.view(to)[...] = self.device.memory.view(frm)
            self._count(kind, nbytes)

        if nbytes:
            self._enqueue(stream, Operation("a copy", (to, frm), run, nbytes / _BYTES_PER_MS))

    def _count(self, kind: int, nbytes: int) -> None:
        counters = self.device.counters
        if kind == 1:
            counters.uploads += 1
            counters.uploaded += nbytes
        elif kind == 2:
            counters.downloads += 1
            counters.downloaded += nbytes
        else:
            counters.copied += nbytes

    def _memset_async(self, address: int, value: int, nbytes: int, stream: int) -> None:
        used = Range(address, nbytes, True, False, "the target of a memset")

        def run() -> None:
            self.device.memory.view(used)[...] = value & 0xFF

        if nbytes:
            self._enqueue(stream, Operation("a memset", (used,), run, nbytes / _BYTES_PER_MS))

    def _enqueue(self, stream: int, operation: Operation) -> None:
        if stream == 0:  # the legacy default stream
            if any(other.capture is not None for other in self.device.streams.values()):
                raise CodeError(Cuda.STREAM_CAPTURE_IMPLICIT)
            raise MisuseError(f"{operation.name} is put on the legacy default stream")
        self.device.enqueue(stream, operation)

    # Streams, graphs and events.

    def _stream_create_with_flags(self, out: ctypes.c_void_p, flags: int) -> None:
        if flags not in (0, 1):
            raise CodeError(Cuda.INVALID_VALUE)
        out.value = self.device.handle()
        self.device.streams[out.value] = Stream(out.value)

    def _stream_synchronize(self, stream: int) -> None:
        self.device.synchronise(stream)

    def _stream_destroy(self, stream: int) -> None:
        self.device.finish(self.device.stream(stream))
        del self.device.streams[stream]

    def _stream_begin_capture(self, stream: int, mode: int) -> None:
        found = self.device.stream(stream)
        if mode not in (0, 1, 2):
            raise CodeError(Cuda.INVALID_VALUE)
        if found.capture is not None:
            raise CodeError(Cuda.STREAM_CAPTURE_UNSUPPORTED)
        found.capture = Capture(threading.get_ident())

    def _stream_end_capture(self, stream: int, out: ctypes.c_void_p) -> None:
        found = self.device.stream(stream)
        capture, found.capture = found.capture, None
        out.value = None
        if capture is None:
            raise CodeError(Cuda.STREAM_CAPTURE_UNMATCHED)
        if capture.broken:
            raise CodeError(Cuda.STREAM_CAPTURE_INVALIDATED)
        out.value = self.device.handle()
        self.device.graphs[out.value] = tuple(capture.operations)
        self.device.counters.captures += 1

    def _graph_instantiate_with_flags(self, out: ctypes.c_void_p, graph: int, flags: int) -> None:
        if graph not in self.device.graphs or flags:
            raise CodeError(Cuda.INVALID_VALUE)
        out.value = self.device.handle()
        self.device.runnable[out.value] = self.device.graphs[graph]

    def _graph_launch(self, graph: int, stream: int) -> None:
        if graph not in self.device.runnable:
            raise CodeError(Cuda.INVALID_VALUE)
        self.device.launch(stream, self.device.runnable[graph])

    def _graph_destroy(self, graph: int) -> None:
        if self.device.graphs.pop(graph, None) is None:
            raise CodeError(Cuda.INVALID_VALUE)

    def _graph_exec_destroy(self, graph: int) -> None:
        if self.device.runnable.pop(graph, None) is None:
            raise CodeError(Cuda.INVALID_VALUE)

    def _event_create(self, out: ctypes.c_void_p) -> None:
        out.value = self.device.handle()
        self.device.events[out.value] = None

    def _event_destroy(self, event: int) -> None:
        self._recorded(event)
        del self.device.events[event]

    def _event_record(self, event: int, stream: int) -> None:
        self._recorded(event)
        found = self.device.stream(stream)

        def run() -> None:
            self.device.events[event] = found.now

        self.device.events[event] = None
        self.device.enqueue(stream, Operation("an event", (), run))

    def _event_synchronize(self, event: int) -> None:
        self._recorded(event)
        self.device.forbid_in_capture()
        self.device.finish_all()

    def _event_elapsed_time(self, out: ctypes.c_float, start: int, end: int) -> None:
        times = self._recorded(start), self._recorded(end)
        if times[0] is None or times[1] is None:
            raise CodeError(Cuda.NOT_READY)
        out.value = times[1] - times[0]

    def _recorded(self, event: int) -> float | None:
        if event not in self.device.events:
            raise CodeError(Cuda.INVALID_RESOURCE_HANDLE)
        return self.device.events[event]


def _error(code: int) -> Cuda:
    return Cuda(code) if code in Cuda.__members__.values() else Cuda.UNKNOWN
