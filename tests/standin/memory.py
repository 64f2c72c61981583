"""The memory of a stand-in device: made-up addresses, every access checked."""

import bisect
import ctypes
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "Allocation", "Memory", "MisuseError", "Range"]

ALIGNMENT = 512  # of cudaMalloc's addresses
_FIRST = 0x7A00_0000_0000  # of device memory; nothing is mapped there
_PAGE = 4096
_POISON = 0xFF  # fresh and freed memory: NaN as a float, -1 as an integer
_QUIET = ("standin", "cuda.py", "cuda_resources.py", "cudart.py")  # not where a test calls from


class MisuseError(AssertionError):
    """What a program must not do, and a real device would do without a word."""


@dataclass(frozen=True)
class Range:
    """Memory that an operation uses: bytes from an address on.

    Attributes:
        address: first byte.
        nbytes: how many.
        write: whether it is written.
        host: whether it is page-locked host memory.
        label: what it is, for messages.
    """

    address: int
    nbytes: int
    write: bool
    host: bool = False
    label: str = ""

    def clashes(self, other: "Range") -> bool:
        """Return whether their order matters."""
        apart = (
            self.address + self.nbytes <= other.address
            or other.address + other.nbytes <= self.address
        )
        return not apart and (self.write or other.write)


@dataclass
class Allocation:
    """Memory between its allocation and its end, remembered after that too."""

    address: int
    nbytes: int
    host: bool
    origin: str  # file and line that asked for it
    data: NDArray[np.uint8] | None  # None: counted, but never looked at
    keep: Any = None
    freed: str = ""

    def __str__(self) -> str:
        """Say where and what it is."""
        kind = "page-locked host" if self.host else "device"
        return f"{self.nbytes} bytes of {kind} memory at {self.address:#x} (from {self.origin})"


class Memory:
    """All allocations of a device. An address is never used twice, and freed memory is kept."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._next = _FIRST
        self._sorted: list[int] = []
        self._all: dict[int, Allocation] = {}

    def device(self, nbytes: int, *, backed: bool = True) -> Allocation | None:
        """Allocate device memory; None where it does not fit."""
        if self.used + nbytes > self.total:
            return None
        data = np.full(nbytes, _POISON, np.uint8) if backed else None
        made = Allocation(self._next, nbytes, False, _origin(), data)
        # At least a page between two allocations: whatever runs over an end meets nothing.
        self._next += -(-(nbytes + _PAGE) // ALIGNMENT) * ALIGNMENT
        self.used += nbytes
        return self._keep(made)

    def host(self, nbytes: int) -> Allocation:
        """Allocate page-locked host memory."""
        keep = (ctypes.c_ubyte * (nbytes + 2 * _PAGE))()
        start = -(-ctypes.addressof(keep) // _PAGE) * _PAGE
        data = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(start))
        data[...] = _POISON
        return self._keep(Allocation(start, nbytes, True, _origin(), data, keep))

    def free(self, address: int, *, host: bool) -> Allocation | None:
        """End an allocation; None where none begins at the address."""
        found = self._all.get(address)
        if found is None or found.host != host:
            return None
        if found.freed:
            raise MisuseError(f"{found} was freed twice, before at {found.freed}")
        found.freed = _origin()
        if found.data is not None:
            found.data[...] = _POISON
        self.used -= 0 if host else found.nbytes
        return found

    def check(self, used: Range) -> Allocation:
        """Return the live allocation that a range lies in.

        Raises:
            MisuseError: there is none.
        """
        what = f"{used.label or 'memory'}: {used.nbytes} bytes at {used.address:#x}"
        place = bisect.bisect_right(self._sorted, used.address) - 1
        found = self._all[self._sorted[place]] if place >= 0 else None
        if found is None or used.address >= found.address + max(1, found.nbytes):
            raise MisuseError(f"{what} belong to no allocation")
        if found.host != used.host:
            wanted = "page-locked host memory" if used.host else "device memory"
            raise MisuseError(f"{what} are not {wanted}, but lie in {found}")
        if found.freed:
            raise MisuseError(f"{what} are used after they were freed at {found.freed}: {found}")
        if used.address + used.nbytes > found.address + found.nbytes:
            raise MisuseError(f"{what} run over the end of {found}")
        return found

    def view(self, used: Range) -> NDArray[np.uint8]:
        """Return the bytes (nbytes,) of a range, not a copy."""
        found = self.check(used)
        if found.data is None:
            raise MisuseError(f"{found} is TensorRT's own")
        start = used.address - found.address
        return found.data[start : start + used.nbytes]

    def live(self) -> list[Allocation]:
        """Return what was not freed."""
        return [one for one in self._all.values() if not one.freed]

    def _keep(self, made: Allocation) -> Allocation:
        bisect.insort(self._sorted, made.address)
        self._all[made.address] = made
        return made


def _origin() -> str:
    for frame in reversed(traceback.extract_stack(limit=24)):
        path = Path(frame.filename)
        if not any(part in _QUIET for part in path.parts):
            return f"{path.name}:{frame.lineno}"
    return "?"
