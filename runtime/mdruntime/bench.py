"""How long a bundle takes on this device: to load, for a pass, and for a sample of each preset."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from mdruntime.costs import Costs
from mdruntime.machine import Machine, peak_mb, this_machine
from mdruntime.manifest import Manifest
from mdruntime.passes import PassShape
from mdruntime.probe import Clock, guidable, pipeline_of, request_of
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.timing import interleaved, measure, noise_of

__all__ = ["NOISY", "Bench", "PassTime", "Spread", "bench", "time_samplings"]

NOISY = 0.25
"""Share by which the slow repeats of an undisturbed machine hardly ever exceed the fastest one."""
_SHORTEST = 1.0
"""Seconds that samples are timed for at least."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The times of a sample, over repeats."""

    median_ms: float
    minimum_ms: float
    p90_ms: float  # 90th percentile
    repeats: int
    denoiser_ms: float  # of it, in the mean: in passes
    images_ms: float  # in the decoder
    host_ms: float  # in the sampler, and whatever else is done between the graphs


@dataclass(frozen=True, slots=True)
class PassTime:
    """The median time of passes of the whole batch that give logits of all their rows."""

    rows: int  # of a sequence; the most are those of a full pass
    guided: bool
    ms: float


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured."""

    model: str
    precision: str
    weights: str  # their origin
    machine: Machine
    batch: int
    load_ms: float
    passes: tuple[PassTime, ...]
    condition_ms: float  # of a batch
    decoder_ms: float  # of a sample
    presets: dict[str, Spread]
    peak_mb: float  # most memory that the process has held so far; 0 where it is not known
    noise: float  # by how much the slow repeats exceed the fastest one, as a share

    @property
    def noisy(self) -> bool:
        """Whether something else kept the machine busy."""
        return self.noise > NOISY


def bench(
    runner: Runner,
    presets: Iterable[str] = (),
    *,
    batch: int = 1,
    repeats: int = 7,
    load_ms: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Measure a bundle.

    Args:
        runner: of the bundle, on the provider and the threads in question.
        presets: names; none stands for all there are.
        batch: samples that run together.
        repeats: of each measurement, interleaved.
        load_ms: what loading took.
        clock: that tells the seconds.

    Raises:
        SamplingError: an unknown preset.
    """
    manifest = runner.manifest
    chosen = {name: runner.sampling(name, {}) for name in presets or runner.presets}
    costs = measure(runner, _sizes(manifest, batch), batch=batch, repeats=repeats, clock=clock)
    spent = runner.watched()
    parts: dict[Sampling, list[dict[str, float]]] = {}

    def part(sampling: Sampling) -> None:
        parts.setdefault(sampling, []).append(dict(spent))
        spent.clear()

    spent.clear()
    times = time_samplings(runner, chosen, batch=batch, repeats=repeats, clock=clock, after=part)
    return Bench(
        model=manifest.name,
        precision=runner.precision,
        weights=manifest.weights.origin,
        machine=this_machine(runner.provider, runner.threads),
        batch=batch,
        load_ms=load_ms,
        passes=tuple(_pass_times(costs)),
        condition_ms=costs.condition_ms,
        decoder_ms=costs.decoder_ms,
        presets={
            name: _spread(some, parts[chosen[name]][-len(some) :], batch)
            for name, some in times.items()
        },
        peak_mb=peak_mb(),
        noise=noise_of(times.values()),
    )


def time_samplings(
    runner: Runner,
    samplings: Mapping[str, Sampling],
    *,
    batch: int = 1,
    repeats: int = 7,
    seconds: float = 60,
    clock: Clock = time.perf_counter,
    after: Callable[[Sampling], None] | None = None,
) -> dict[str, list[float]]:
    """Return the time of a sample of each sampler, in milliseconds, repeat by repeat.

    Whole batches are generated, decoder included. Samplers that are the same run once. No further
    repeat begins after ``seconds``. ``after`` is called when a sampler has made a batch.
    """
    jobs = {some: _generation(runner, some, batch, clock, after) for some in samplings.values()}
    found = interleaved(jobs, repeats=repeats, seconds=seconds, shortest=_SHORTEST, clock=clock)
    return {name: found[some] for name, some in samplings.items()}


def _generation(
    runner: Runner,
    sampling: Sampling,
    batch: int,
    clock: Clock,
    after: Callable[[Sampling], None] | None,
) -> Callable[[], float]:
    pipeline, seeds = pipeline_of(runner), count()
    request: dict[str, Any] = {**request_of(runner.manifest, batch), **asdict(sampling)}

    def ms() -> float:
        began = clock()
        pipeline.generate(**request, batch_size=batch, seed=next(seeds))
        spent = 1000 * (clock() - began) / batch
        if after is not None:
            after(sampling)
        return spent

    return ms


def _sizes(manifest: Manifest, batch: int) -> Iterable[tuple[PassShape, bool]]:
    """Yield a full pass and passes of all buckets, under guidance too where there can be any."""
    canvas = manifest.denoiser.canvas
    for factor in (1, 2) if guidable(manifest) else (1,):
        for rows in {*manifest.buckets, canvas}:
            yield PassShape(batch, factor * batch, rows, rows, canvas), False


def _pass_times(costs: Costs) -> Iterable[PassTime]:
    for kind, surface in costs.surfaces.items():
        for rows in reversed(surface.rows):
            yield PassTime(rows, kind.guided, surface.ms(rows, rows))


def _spread(repeats: list[float], parts: list[dict[str, float]], batch: int) -> Spread:
    """Return the spread of some samples' times, and the mean of what they consist of."""

    def mean(*graphs: str) -> float:
        return float(np.mean([sum(one.get(name, 0.0) for name in graphs) for one in parts])) / batch

    denoiser, images = mean("denoiser", "condition"), mean("decoder", "encoder")
    host = max(0.0, float(np.mean(repeats)) - denoiser - images)
    return Spread(
        float(np.median(repeats)),
        min(repeats),
        float(np.percentile(repeats, 90)),
        len(repeats),
        denoiser,
        images,
        host,
    )
