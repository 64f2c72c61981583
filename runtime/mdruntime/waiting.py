"""Time that this process's threads were ready to run, and waited for a core that others had."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["WAITED", "Waits", "read_waits", "waited_share"]

WAITED = 0.1
"""Share of the threads' time above which other processes take part in what is measured."""

Waits = Mapping[str, tuple[int, int]]  # by thread: nanoseconds that it ran, and that it waited

_THREADS = Path("/proc/self/task")


def read_waits(folder: Path = _THREADS) -> Waits:
    """Return what Linux has counted so far for each thread; nothing where it counts nothing."""
    found = {}
    for path in folder.glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, path.read_text(encoding="ascii").split())
        except (OSError, ValueError):  # a thread that ended meanwhile
            continue
        found[path.parent.name] = (ran, waited)
    return found


def waited_share(before: Waits, after: Waits) -> float:
    """Return the share of waiting in what threads did in between; those that ended do not count."""
    ran = waited = 0
    for thread, (runs, waits) in after.items():
        begun = before.get(thread, (0, 0))
        ran, waited = ran + runs - begun[0], waited + waits - begun[1]
    return max(0, waited) / (ran + waited) if ran + waited > 0 else 0.0
