"""Jetson boards: which JetPack is installed, what it brings, and what power mode is on.

The table is of NVIDIA's release notes of JetPack and Jetson Linux (L4T).
"""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Board", "JetPack", "board", "power_mode", "power_modes"]

_MODEL = "proc/device-tree/model"
_RELEASE = "etc/nv_tegra_release"
_MODE = "var/lib/nvpmodel/status"
_MODES = "etc/nvpmodel.conf"


@dataclass(frozen=True, slots=True)
class JetPack:
    """A row of the table of releases."""

    name: str
    since: tuple[int, int]  # first version of Jetson Linux
    python: tuple[int, int]  # of Ubuntu, which the system's TensorRT module is made for
    cuda: str
    tensorrt: str
    cure: str = ""  # where engines of mdruntime cannot be built with it


_TOO_OLD = (
    "its TensorRT is older than 10.3: install JetPack 6.2 or 7, or run a container with its own "
    "TensorRT (examples/jetson)"
)
_RELEASES = (
    JetPack("4", (32, 1), (3, 6), "10.2", "7.1 to 8.2", "out of support: use --provider cpu"),
    JetPack("5", (35, 1), (3, 8), "11.4", "8.5", _TOO_OLD),
    JetPack("6.0 preview", (36, 2), (3, 10), "12.2", "8.6", _TOO_OLD),
    JetPack("6.0", (36, 3), (3, 10), "12.2", "8.6", _TOO_OLD),
    JetPack("6.1 or 6.2", (36, 4), (3, 10), "12.6", "10.3"),
    JetPack("7.0", (38, 2), (3, 12), "13.0", "10.13"),
    JetPack("7.1", (38, 4), (3, 12), "13.0", "10.13"),
    JetPack("7.2", (39, 0), (3, 12), "13.2", "10.16"),
)


@dataclass(frozen=True, slots=True)
class Board:
    """A Jetson and what is installed on it."""

    model: str
    linux: tuple[int, ...]  # version of Jetson Linux; () where the file is missing
    jetpack: JetPack | None  # None: older or unknown

    @property
    def linux_text(self) -> str:
        """The version of Jetson Linux in words."""
        return f"L4T {'.'.join(map(str, self.linux))}" if self.linux else "no L4T release file"


def board(root: Path = Path("/")) -> Board | None:
    """Return the Jetson this is, None elsewhere.

    Args:
        root: folder taken for the root of the file system.
    """
    model, linux = _read(root / _MODEL).strip("\0\n "), _linux(_read(root / _RELEASE))
    if "NVIDIA" not in model and not linux:
        return None
    rows = [row for row in _RELEASES if row.since <= linux[:2]]
    return Board(model or "a Jetson", linux, rows[-1] if rows else None)


def power_mode(root: Path = Path("/")) -> str:
    """Return the name of the power mode that is on, "" where it cannot be told."""
    match = re.search(r"pmode:(\d+)", _read(root / _MODE))
    return power_modes(root).get(int(match[1]), f"mode {int(match[1])}") if match else ""


def power_modes(root: Path = Path("/")) -> dict[int, str]:
    """Return the names of the board's power modes, by number."""
    lines = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _read(root / _MODES))
    return {int(number): name for number, name in lines}


def _linux(text: str) -> tuple[int, ...]:
    """Return (36, 4, 3) of ``# R36 (release), REVISION: 4.3, ...``."""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return (int(match[1]), *(int(part) for part in match[2].split(".") if part)) if match else ()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
