"""How much memory building takes, and what a failed build's log says about it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "Need", "host_memory", "need", "out_of_memory", "require", "workspace"]

MIB = 1 << 20
_CONTEXT = 384 * MIB  # CUDA's context and TensorRT's libraries, on the device and on the host
_SMALLEST = 64 * MIB  # workspace below which most tactics fall away
_COPIES_ON_DEVICE = 2  # the network's weights, and those of the tactic that is being timed
_COPIES_ON_HOST = 3  # the parsed network, what the builder makes of it, and the plan
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_JETSON = Path("/etc/nv_tegra_release")

_SIGNS = re.compile(
    r"out ?of ?memory|insufficient memory|could not be allocated|bad_alloc|"
    r"decreasing the workspace|cudaErrorMemoryAllocation|failed to allocate",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Free bytes."""

    device: int
    host: int
    shared: bool = False  # device and host have the same memory, as on a Jetson


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that building a plan takes at least, without the workspace."""

    device: int
    host: int


def need(weights: int, tensors: int) -> Need:
    """Estimate what building a plan takes.

    Args:
        weights: bytes of the graph and its weights.
        tensors: bytes of all inputs of the largest profile.
    """
    device = _COPIES_ON_DEVICE * weights + 2 * tensors + _CONTEXT
    return Need(device, _COPIES_ON_HOST * weights + _CONTEXT)


def require(what: str, needed: Need, free: Memory, limit: int = 0) -> None:
    """Refuse early what cannot be built, before minutes are spent on it.

    Args:
        what: name of the graph.
        needed: of it.
        free: on this machine.
        limit: bytes of workspace that were asked for; 0 takes what is left.

    Raises:
        MemoryError: with what is needed, what is free, and what may help.
    """
    room = max(limit, _SMALLEST)
    pairs = [("device", needed.device + room, free.device), ("host", needed.host, free.host)]
    if free.shared:
        pairs = [("shared", needed.device + needed.host + room, min(free.device, free.host))]
    for name, wanted, found in pairs:
        if found < wanted:
            cure = "try a smaller --workspace, or" if limit > _SMALLEST else "try a smaller"
            raise MemoryError(
                f"building the plan of {what!r} takes about {wanted // MIB} MiB of {name} memory, "
                f"and {found // MIB} MiB are free; {cure} --max-batch, stop other processes, or "
                "add swap"
            )


def workspace(needed: Need, free: Memory) -> int:
    """Return how many bytes tactics may use: half of what is left beside the rest."""
    left = free.device - needed.device
    if free.shared:
        left = min(free.device, free.host) - needed.device - needed.host
    return max(_SMALLEST, left // 2)


def out_of_memory(lines: Iterable[str]) -> list[str]:
    """Return those lines of a builder's log that tell of a failed allocation."""
    return [line for line in lines if _SIGNS.search(line)]


def host_memory() -> tuple[int, bool]:
    """Return the bytes a process can still get, and whether the GPU shares them."""
    return min(_available(), _allowed()), _JETSON.exists()


def _available() -> int:
    for line in _lines(_MEMINFO):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 1 << 62


def _allowed() -> int:
    """Return what a container may still take."""
    limit, used = (_lines(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdecimal() and used[0].isdecimal():
        return max(0, int(limit[0]) - int(used[0]))
    return 1 << 62


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
