"""Time that the cores of a virtual machine had work, and the host gave to another one."""

from pathlib import Path

__all__ = ["STOLEN", "Ticks", "read_ticks", "stolen_share"]

STOLEN = 0.05
"""Share of the cores' time above which the numbers are the neighbours' as well."""

Ticks = tuple[int, int]  # stolen, and those in which cores had work, stolen ones included

_STAT = Path("/proc/stat")


def read_ticks(path: Path = _STAT) -> Ticks:
    """Return what the system has counted so far, over all cores; zeros where it counts nothing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, 0
    for line in text.splitlines():
        name, *fields = line.split()[:9] or [""]
        if name == "cpu" and len(fields) == 8 and all(field.isdecimal() for field in fields):
            # The guests' time, which follows, is in that of the user already.
            user, nice, system, _idle, _waiting, hard, soft, stolen = map(int, fields)
            return stolen, user + nice + system + hard + soft + stolen
    return 0, 0


def stolen_share(before: Ticks, after: Ticks) -> float:
    """Return the share that was stolen in between of the time that the cores had work."""
    stolen, wanted = after[0] - before[0], after[1] - before[1]
    return max(0, stolen) / wanted if wanted > 0 else 0.0
