"""How much of the CPU a container or service may use, which is not how many cores there are."""

from collections.abc import Iterator
from pathlib import Path

__all__ = ["quota"]

_SELF = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_CPU = "cpu"  # controller of version 1


def quota(groups: Path = _SELF, mount: Path = _MOUNT) -> float | None:
    """Return the cores that this process's control groups allow, None where there is no limit.

    Groups are nested, and the least of their limits holds. Versions 1 and 2 of control groups are
    read (Linux kernel documentation, admin-guide/cgroup-v2 and scheduler/sched-bwc).

    Args:
        groups: the kernel's list of the groups of a process.
        mount: where control groups are mounted.
    """
    limits = [limit for folder in _folders(groups, mount) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of the CPU's groups of this process, each with those around it."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in (*lines, "0::/"):  # a container may see its own group as the root
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and _CPU not in controllers.split(","):
            continue
        for root in [mount / controllers, mount / _CPU] if controllers else [mount]:
            folder = root / path.lstrip("/")
            yield folder
            yield from (outer for outer in folder.parents if outer.is_relative_to(root))


def _limit(folder: Path) -> float | None:
    """Return the cores that one group allows."""
    try:
        if (folder / "cpu.max").is_file():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        cores = int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no limit
