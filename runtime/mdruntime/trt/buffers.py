"""Device memory of a session: what crosses in one piece, and caches that never cross.

Everything lies at addresses that depend on shapes only, until a block has to grow: CUDA graphs are
recorded with addresses.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.cuda import Cuda, DeviceBuffer, PinnedArray, Stream
from mdruntime.manifest import GraphSpec
from mdruntime.trt.device import rounded
from mdruntime.trt.profiles import Shape

__all__ = ["Block", "CacheSets", "Place", "arrange", "numpy_type"]

_TYPES = {"bfloat16": np.uint16}  # NumPy lacks it; its bits are only carried to and fro


def numpy_type(name: str) -> np.dtype[Any]:
    """Return NumPy's type for an element type of the manifest."""
    return np.dtype(_TYPES.get(name, name))


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a block a tensor lies."""

    offset: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def arrange(
    tensors: Iterable[tuple[str, Shape, np.dtype[Any]]], start: int = 0
) -> tuple[dict[str, Place], int]:
    """Lay tensors out one behind the other, and return their places and where they end."""
    places: dict[str, Place] = {}
    for name, shape, dtype in tensors:
        places[name] = Place(start, shape, dtype)
        start = rounded(start + places[name].nbytes)
    return places, start


class Block:
    """Device memory, and page-locked host memory whose first bytes go over in one piece."""

    def __init__(self, cuda: Cuda) -> None:
        """Begin with no memory."""
        self._cuda = cuda
        self._device: DeviceBuffer | None = None
        self._host: PinnedArray | None = None

    def reserve(self, device: int, host: int) -> bool:
        """Provide for so many bytes on both sides; return whether anything was moved.

        What the block held is lost then, and nothing may be using it.
        """
        moved = False
        if self._device is None or device > self._device.nbytes:
            moved = True
            self._free_device()  # before there is a larger one: both may not fit
            self._device = self._cuda.allocate(device)
        if self._host is None or host > self._host.nbytes:
            moved = True
            self._free_host()
            self._host = self._cuda.pinned((host,), np.uint8)
        return moved

    def address(self, place: Place) -> int:
        """Return where a tensor lies on the device."""
        assert self._device is not None
        return self._device.address + place.offset

    def view(self, place: Place) -> NDArray[Any]:
        """Return a tensor's page-locked memory as an array."""
        assert self._host is not None
        part = self._host.array[place.offset : place.offset + place.nbytes]
        array: NDArray[Any] = part.view(place.dtype).reshape(place.shape)
        return array

    def upload(self, offset: int, nbytes: int, stream: Stream) -> None:
        """Send a part of the host's memory to the same part of the device's."""
        assert self._device is not None
        assert self._host is not None
        begin, end = self._host.address + offset, self._device.address + offset
        self._cuda.upload(end, begin, nbytes, stream)

    def download(self, nbytes: int, stream: Stream) -> None:
        """Fetch the first bytes of the device's memory."""
        assert self._device is not None
        assert self._host is not None
        self._cuda.download(self._host.address, self._device.address, nbytes, stream)

    def free(self) -> None:
        """Give both memories back."""
        self._free_device()
        self._free_host()

    def _free_device(self) -> None:
        memory, self._device = self._device, None
        if memory is not None:
            memory.free()

    def _free_host(self) -> None:
        memory, self._host = self._host, None
        if memory is not None:
            memory.free()


@dataclass(frozen=True, slots=True)
class _Cache:
    before: str
    after: str
    inner: tuple[int | str, ...]  # shape of one sequence's part
    itemsize: int

    def shape(self, canvas: int) -> Shape:
        """Shape of one sequence's part; its only free axis is the canvas."""
        return tuple(size if isinstance(size, int) else canvas for size in self.inner)

    def row(self, canvas: int) -> int:
        """Bytes of one sequence's part."""
        return math.prod(self.shape(canvas)) * self.itemsize


class CacheSets:
    """The caches of a graph, twice: a pass reads one set and writes the other, in turn.

    One buffer for a cache's input and output would save memory, and works in ONNX Runtime. TensorRT
    does not promise that its scattering works in place (only KVCacheUpdate does, which is for
    consecutive rows), so that it is not relied on.
    """

    def __init__(self, cuda: Cuda, spec: GraphSpec) -> None:
        """Begin with no memory."""
        tensors = {tensor.name: tensor for tensor in spec.inputs}
        self._cuda = cuda
        self._caches = [
            _Cache(
                before, after, tensors[before].shape[1:], numpy_type(tensors[before].dtype).itemsize
            )
            for before, after in spec.caches
        ]
        self._sets: list[DeviceBuffer] = []
        self._room: list[int] = [0] * len(self._caches)  # bytes for each cache
        self._canvas = self._alive = 0
        self.side = 0  # of the two, the set to be read next

    def start(self, canvas: int) -> None:
        """Forget what is cached; the canvases have this many rows from now on."""
        self._canvas, self._alive = canvas, 0

    def make_room(self, rows: int) -> bool:
        """Provide for so many sequences; return whether the sets were moved."""
        needed = [rounded(rows * cache.row(self._canvas)) for cache in self._caches]
        if self._sets and all(need <= room for need, room in zip(needed, self._room, strict=True)):
            return False
        self.free()  # before there are new ones: both may not fit
        self._room = [max(pair) for pair in zip(needed, self._room, strict=True)]
        for _ in range(2):
            self._sets.append(self._cuda.allocate(sum(self._room)))
        self._alive = self.side = 0
        return True

    def shapes(self, rows: int) -> dict[str, Shape]:
        """Return the shapes of the caches' inputs."""
        return {cache.before: (rows, *cache.shape(self._canvas)) for cache in self._caches}

    def addresses(self) -> Mapping[str, int]:
        """Return where the next pass reads and writes every cache."""
        read, write = self._sets[self.side].address, self._sets[1 - self.side].address
        found = {}
        for cache, offset in zip(self._caches, self._offsets(), strict=True):
            found[cache.before], found[cache.after] = read + offset, write + offset
        return found

    def keep(self, rows: int, stream: Stream) -> None:
        """Copy those sequences that a pass over the first ``rows`` of them leaves as they are."""
        read, write = self._sets[self.side].address, self._sets[1 - self.side].address
        for cache, offset in zip(self._caches, self._offsets(), strict=True):
            begin, count = rows * cache.row(self._canvas), self._alive - rows
            if count > 0:
                nbytes = count * cache.row(self._canvas)
                self._cuda.copy(write + offset + begin, read + offset + begin, nbytes, stream)

    def turn(self, rows: int) -> None:
        """Say that a pass over ``rows`` sequences is done: the next reads what it wrote."""
        self._alive = max(self._alive, rows)
        self.side = 1 - self.side

    def free(self) -> None:
        """Give the memory back."""
        for buffer in self._sets:
            buffer.free()
        self._sets = []

    def _offsets(self) -> Sequence[int]:
        return [sum(self._room[:index]) for index in range(len(self._room))]
