"""What this machine's cores can do at best: multiply matrices, and read memory.

NumPy's library of products takes its number of threads from the environment, before it is loaded:
so both are measured by ``python -m mdruntime.ceiling THREADS SECONDS``, a process of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdruntime.errors import ProviderError
from mdruntime.records import from_json

__all__ = ["Ceiling", "better", "measure_ceiling"]

_LIBRARIES = ("OPENBLAS", "OMP", "MKL", "BLIS")
_SIDE = 1536  # of the matrices: large enough to be read once, small enough for slow machines
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FEWEST = 3  # times that each is measured, however slow
_LIMIT = 120  # seconds that a process may take


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best that was measured."""

    gigaflops: float  # a second, of float32 products
    gigabytes: float  # a second, read from arrays that no cache holds
    threads: int


def measure_ceiling(threads: int, seconds: float = 0.5) -> Ceiling:
    """Measure this machine with so many threads, for about so many seconds each.

    Raises:
        ProviderError: the process died.
    """
    names = [f"{library}_NUM_THREADS" for library in _LIBRARIES]
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    # The very package that is running, whatever was installed or the folder holds.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONSAFEPATH"] = "1"
    command = [sys.executable, "-m", "mdruntime.ceiling", str(threads), str(seconds)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=_LIMIT
        )
        return from_json(Ceiling, json.loads(done.stdout), "it")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = (str(getattr(error, "stderr", "") or error).strip().splitlines() or ["?"])[-1]
        raise ProviderError(
            f"what this machine can do at best could not be measured ({reason}); "
            "leave it out with --no-roofline"
        ) from None


def better(one: Ceiling, other: Ceiling) -> Ceiling:
    """Return the better of two measurements: whatever disturbs a machine, it only slows it."""
    return Ceiling(
        max(one.gigaflops, other.gigaflops), max(one.gigabytes, other.gigabytes), one.threads
    )


def _fastest(job: Callable[[], object], seconds: float) -> float:
    """Return the least seconds that a job takes; the first time, which is cold, does not count."""
    job()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _FEWEST or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def _gigaflops(seconds: float) -> float:
    left, right = np.random.default_rng(0).random((2, _SIDE, _SIDE), np.float32)
    product = np.empty_like(left)
    return 2e-9 * _SIDE**3 / _fastest(lambda: np.matmul(left, right, out=product), seconds)


def _gigabytes(threads: int, seconds: float) -> float:
    """Return what is read a second; NumPy lets other threads run while it goes over an array."""
    count = _array_bytes() // 4 // threads
    parts = [np.ones(count, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        fastest = _fastest(lambda: list(pool.map(np.max, parts)), seconds)
    return 4e-9 * count * threads / fastest


def _array_bytes() -> int:
    """Return four times what the largest cache holds, between 64 and 512 MB."""
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CACHES.glob("index*/size")]
    kilobytes = [int(size[:-1]) for size in sizes if size.endswith("K") and size[:-1].isdecimal()]
    return min(max(4 * 1024 * max(kilobytes, default=0), 64_000_000), 512_000_000)


def _measured(threads: int, seconds: float) -> dict[str, float]:
    return {
        "gigaflops": _gigaflops(seconds),
        "gigabytes": _gigabytes(threads, seconds),
        "threads": threads,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measured(int(sys.argv[1]), float(sys.argv[2]))))
