"""Measures what a condition graph saves: the part of a denoiser that stays the same all along.

Command   python examples/measure_conditions.py BUNDLE [BUNDLE ...]   (of halton-... or amused-...)
Time      about a minute for each bundle, on 2 CPU cores
Result    a table: weights that leave the denoiser's graph, and the time that every pass but the
          first one saves (median of 7 runs, batch 1, ONNX Runtime on the CPU)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.conditions import Conditions
from mdruntime.denoiser import Denoiser, conditioner
from mdruntime.head import Controls
from mdruntime.sampler import Pass
from mdruntime.session import open_session

RUNS = 7
HEAD = ("bundle", "denoiser", "condition", "full pass", "condition", "share of a pass")


def median_ms(run: Callable[[], object]) -> float:
    """Return the median time of a call in milliseconds, after one that warms up."""
    run()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def measure(bundle: Bundle) -> str:
    """Return a line of the table."""
    spec, manifest = bundle.manifest.denoiser, bundle.manifest
    if "condition" not in manifest.graphs:
        raise SystemExit(f"{manifest.name} has no condition graph; take a halton or amused bundle")
    graph = manifest.graphs["condition"]
    condition = conditioner(open_session(bundle, "condition", "cpu"), graph)
    conditions = Conditions.of([1])
    if manifest.prompt is not None:
        ids = np.full((1, manifest.prompt.length), manifest.prompt.end, np.int32)
        conditions = Conditions(np.array([-1]), ids, ids)
    session = open_session(bundle, "denoiser", "cpu")
    denoiser = Denoiser(session, spec, conditions, condition=condition)
    one = np.ones(1, np.float32)
    everywhere = np.arange(spec.length)[None]
    request = Pass(
        samples=np.array([0]),
        positions=None,
        tokens=np.full((1, spec.length), spec.mask_token, np.int32),
        wanted=everywhere,
        controls=Controls(0 * one, one, one, one),
        uniforms=np.zeros((1, spec.length), np.float32),
        logits=False,
    )
    full = median_ms(lambda: denoiser(request))
    once = median_ms(lambda: condition(conditions.inputs()[:1]))
    cells = (
        manifest.name,
        f"{_megabytes(bundle, 'denoiser'):.0f} MB",
        f"{_megabytes(bundle, 'condition'):.0f} MB",
        f"{full:.0f} ms",
        f"{once:.0f} ms",
        f"{once / full:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def _megabytes(bundle: Bundle, graph: str) -> float:
    return bundle.manifest.files[f"{graph}.weights"].bytes / 1e6


def main() -> None:
    """Measure the bundles and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    folders = parser.parse_args().bundles
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    for folder in folders:
        print(measure(open_bundle(folder)), flush=True)


if __name__ == "__main__":
    main()
