"""One table, made in one run: passes of published sizes on every backend that is here.

Weights are random: nothing here speaks of quality. Times of the runtime are those a pipeline
sees, feeds, transfers and NumPy included; those of PyTorch are of the module alone, its inputs on
the device already.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from mdruntime.bundle import Bundle
from mdruntime.cli import main
from mdruntime.costs import Kind
from mdruntime.errors import MdruntimeError
from mdruntime.probe import Probe
from mdruntime.runner import Runner

pytestmark = pytest.mark.gpu

MODELS = ("maskgit256", "halton-base-256")
BATCHES = (1, 8, 64)
PART = 32  # rows of a partial pass
REPEATS = 20
ASKED = "MDRUNTIME_GPU_SPEED"

Bundles = Callable[[str, str], Bundle]
Say = Callable[[str], None]
Job = Callable[[], float]


@pytest.fixture(scope="module", autouse=True)
def asked() -> None:
    if not os.environ.get(ASKED):
        pytest.skip("takes half an hour: run it with bash tests/gpu.sh")


@pytest.mark.parametrize("name", MODELS)
def test_passes_are_timed(bundle_of: Bundles, say: Say, name: str) -> None:
    bundle = bundle_of(name, "fp16")
    say(f"\n### {name}, fp16, random weights, ms per pass (median of {REPEATS}, interleaved)\n")
    say("| batch | pass | " + " | ".join(COLUMNS) + " |")
    say("| --- | --- | " + " | ".join("---" for _ in COLUMNS) + " |")
    notes: list[str] = []
    rows = [row for batch in BATCHES for row in _rows(bundle, name, batch, notes)]
    for row in rows:
        say(row)
    for note in dict.fromkeys(notes):
        say(f"- {note}")
    assert any(
        "|" in row and any(cell.strip()[:1].isdigit() for cell in row.split("|")[3:])
        for row in rows
    ), notes


def _rows(bundle: Bundle, name: str, batch: int, notes: list[str]) -> Iterator[str]:
    canvas = bundle.manifest.denoiser.canvas
    jobs: dict[str, dict[int, Job]] = {}
    for column, make in COLUMNS.items():
        try:
            jobs[column] = make(bundle, name, batch)
        except (MdruntimeError, MemoryError, ImportError, RuntimeError) as error:
            notes.append(f"{column}, batch {batch}: {' '.join(str(error).split())[:300]}")
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(REPEATS + 3):  # what is cold, and captured, first
        for column, sizes in jobs.items():
            for size, job in sizes.items():
                ms = job()
                if turn >= 3:
                    times.setdefault((column, size), []).append(ms)
    for size in (canvas, PART):
        label = "full" if size == canvas else f"partial, {size} rows"
        found = [times.get((column, size)) for column in COLUMNS]
        cells = ["-" if some is None else f"{statistics.median(some):.2f}" for some in found]
        yield f"| {batch} | {label} | {' | '.join(cells)} |"


def _runtime(provider: str) -> Callable[[Bundle, str, int], dict[int, Job]]:
    """Return what times the passes of a pipeline on a provider."""

    def make(bundle: Bundle, name: str, batch: int) -> dict[int, Job]:
        if provider == "tensorrt":
            code = main(["build", str(bundle.folder), "--max-batch", str(max(BATCHES))])
            if code:
                raise RuntimeError(f"mdruntime build ended with exit code {code}")
        runner = Runner(bundle, provider)
        canvas = bundle.manifest.denoiser.canvas
        probe = Probe(runner, Kind(batch, False, False), [PART], time.perf_counter)
        spec = bundle.manifest.denoiser
        return {
            canvas: lambda: probe.ms(0, spec.length // spec.slots),
            PART: lambda: probe.ms(PART, PART),
        }

    return make


def _torch(*, compiled: bool) -> Callable[[Bundle, str, int], dict[int, Job]]:
    """Return what times the traced module itself, in half precision on the GPU."""

    def make(bundle: Bundle, name: str, batch: int) -> dict[int, Job]:
        import torch

        import mdzoo
        from mdexport.denoiser import DenoiserGraph
        from mdexport.precision import cast

        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        model = mdzoo.load(mdzoo.CATALOGUE[name], mdzoo.Sources(random_seed=0))
        denoiser: Any = cast(model.denoiser, "fp16")
        denoiser = denoiser.cuda().eval()
        canvas = denoiser.spec.canvas
        with torch.no_grad():
            extras = denoiser.condition(torch.zeros(batch, dtype=torch.int32, device="cuda"))
        graph: Any = DenoiserGraph(denoiser, list(extras))
        if compiled:  # with CUDA graphs
            graph = torch.compile(graph, mode="reduce-overhead", dynamic=False)
        caches = [cache.cuda() for cache in denoiser.empty_caches(batch, canvas).values()]
        return {
            size: _timed(graph, _inputs(batch, size, extras, caches)) for size in (canvas, PART)
        }

    return make


def _inputs(batch: int, m: int, extras: Any, caches: Any) -> dict[str, Any]:
    import torch

    rows = torch.arange(m, dtype=torch.int32, device="cuda").repeat(batch, 1)
    one = torch.arange(batch, dtype=torch.int32, device="cuda")
    controls = ("guidance", "temperature", "beta", "token_beta")
    return {
        "tokens": torch.zeros_like(rows),
        "positions": rows,
        "columns": rows,
        "conditional": one,
        "unconditional": one,
        **{name: torch.ones(batch, device="cuda") for name in controls},
        "uniforms": torch.full((batch, m), 0.5, device="cuda"),
        "extras": list(extras.values()),
        "caches": caches,
    }


def _timed(graph: Any, inputs: dict[str, Any]) -> Job:
    import torch

    def ms() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            graph(**inputs)
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    ms()  # compiles, and says so if it cannot
    return ms


COLUMNS: dict[str, Callable[[Bundle, str, int], dict[int, Job]]] = {
    "torch eager": _torch(compiled=False),
    "torch.compile": _torch(compiled=True),
    "ONNX Runtime CUDA": _runtime("cuda"),
    "TensorRT": _runtime("tensorrt"),
}


def test_samples_are_timed(bundle_of: Bundles, say: Say) -> None:
    from mdruntime.bench import bench

    for provider in ("cuda", "tensorrt"):
        bundle = bundle_of("maskgit256", "fp16")
        try:
            with closing(Runner(bundle, provider)) as runner:
                found = bench(runner, ["fast", "balanced"], repeats=5)
        except MdruntimeError as error:
            say(f"- images on {provider}: {error}")
            continue
        for preset, spread in found.presets.items():
            say(f"- one image of maskgit256, {preset}, on {provider}: {spread.median_ms:.1f} ms")
        assert found.presets
