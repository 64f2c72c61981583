"""Shows whether the processor itself is steady: full passes in fp32 and int8, second by second.

Command   python examples/measure_states.py BUNDLE [--seconds 60] [--threads N]
Needs     a bundle that was built with --int8
Result    a line for each turn, and by how much each kind of work varies. Some processors slow
          down the dense arithmetic of int8 for seconds to minutes, and hardly anything else.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.costs import Kind
from mdruntime.probe import Probe
from mdruntime.runner import Runner

NUMBERS = 64_000_000  # float32, more than caches hold


def jobs_of(bundle: Bundle, threads: int) -> dict[str, Callable[[], float]]:
    """Return what is timed; each returns milliseconds."""
    jobs: dict[str, Callable[[], float]] = {}
    everywhere = bundle.manifest.denoiser.length // bundle.manifest.denoiser.slots
    for precision in ("fp32", "int8"):
        runner = Runner(bundle, threads=threads, precision=precision)
        probe = Probe(runner, Kind(1, False, False), [], time.perf_counter)
        jobs[precision] = lambda probe=probe: probe.ms(0, everywhere)  # type: ignore[misc]
    memory = np.ones(NUMBERS, np.float32)

    def read() -> float:
        began = time.perf_counter()
        memory.max()
        return 1000 * (time.perf_counter() - began)

    return {**jobs, "reading": read}


def main() -> None:
    """Measure, turn by turn, and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    jobs = jobs_of(open_bundle(options.bundle, check=False), options.threads)
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # cold
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < options.seconds:
        for name, job in jobs.items():
            found[name].append(job())
        cells = "  ".join(f"{name} {times[-1]:7.1f}" for name, times in found.items())
        print(f"{now:6.1f} s  {cells}", flush=True)
    for name, times in found.items():
        low, middle, high = min(times), statistics.median(times), float(np.percentile(times, 90))
        print(f"{name:8} {low:.1f} ms at least, {middle:.1f} median, {high / low:.2f} times p90")


if __name__ == "__main__":
    main()
