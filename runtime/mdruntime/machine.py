"""The machine that numbers were measured on, in words that go beside them."""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

from mdruntime.ort import available_threads

__all__ = ["Machine", "device_name", "peak_mb", "this_machine"]

_CPU = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_BOARD = Path("/proc/device-tree/model")
_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a measured time depends on besides the bundle."""

    device: str
    provider: str
    threads: int  # of the CPU that ONNX Runtime uses
    versions: dict[str, str]
    date: str  # year-month-day


def this_machine(provider: str, threads: int = 0) -> Machine:
    """Return what is known of this machine.

    Args:
        provider: execution provider in use.
        threads: CPU threads; 0 stands for as many as the process may use.
    """
    versions = {
        name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")
    }
    known = {name: found for name, found in versions.items() if found}
    return Machine(
        device_name(provider),
        provider,
        threads or available_threads(),
        {**known, "python": platform.python_version()},
        time.strftime("%Y-%m-%d"),
    )


def peak_mb() -> float:
    """Return the most memory that this process has held, in megabytes; 0 where it is not known."""
    kilobytes = _field(_STATUS, "VmHWM").split(" ")[0]
    return int(kilobytes) * 1024 / 1e6 if kilobytes.isdecimal() else 0.0


def device_name(provider: str) -> str:
    """Return the name of the processor that a provider computes on, as the system has it."""
    name = _gpu() if provider != "cpu" else ""
    return name or f"{_field(_CPU, 'model name') or _board() or 'CPU'} ({platform.machine()})"


def _gpu() -> str:
    for path in sorted(_GPUS.glob("*/information")):
        return _field(path, "Model")
    return ""


def _board() -> str:
    """Return the name of a single-board computer, which lists no model of its CPU."""
    return _read(_BOARD).strip("\0\n ")


def _field(path: Path, name: str) -> str:
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return " ".join(value.split())
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # as slow to import as the rest

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
