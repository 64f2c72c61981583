"""What this machine offers, what is wrong with it, and the command that mends it."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from mdruntime.errors import ProviderError
from mdruntime.ort import available_threads, import_onnxruntime

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report; ``cure`` is empty where all is well."""

    name: str
    value: str
    cure: str = ""
    fatal: bool = False  # nothing can be generated before it is cured


def examine() -> Iterator[Finding]:
    """Yield findings about this machine."""
    yield Finding("system", f"{platform.system()} {platform.machine()}")
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("numpy", version("numpy"))
    yield Finding("cpu threads", f"{available_threads()} usable of {os.cpu_count()}")
    yield _memory()
    yield from _onnxruntime()
    yield _pillow()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", f"{available / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB")


def _onnxruntime() -> Iterator[Finding]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        yield Finding(
            "packages",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            "python -m pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )
    try:
        runtime = import_onnxruntime()
    except ProviderError as error:
        yield Finding("onnxruntime", str(error), "python -m pip install onnxruntime", fatal=True)
        return
    yield Finding("onnxruntime", runtime.__version__)
    # What a wheel was built with, not what works here: a session tells, and is made to tell.
    yield Finding("providers built in", ", ".join(runtime.get_available_providers()))


def _pillow() -> Finding:
    found = _installed("pillow")
    return Finding("pillow", found or "missing", "" if found else "python -m pip install pillow")
