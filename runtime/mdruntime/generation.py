"""Whole samples, generated to be timed."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from mdruntime.probe import Clock, pipeline_of, request_of
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.timing import interleaved

__all__ = ["BatchTime", "generation", "time_batches", "time_samplings"]

_SHORTEST = 1.0
"""Seconds that samples are timed for at least."""


@dataclass(frozen=True, slots=True)
class BatchTime:
    """The time of samples that run together."""

    batch: int
    ms: float  # of the whole batch, median
    repeats: int

    @property
    def per_second(self) -> float:
        """Samples a second."""
        return 1000 * self.batch / self.ms if self.ms > 0 else 0.0


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
    jobs = {some: generation(runner, some, batch, clock, after) for some in samplings.values()}
    found = interleaved(jobs, repeats=repeats, seconds=seconds, shortest=_SHORTEST, clock=clock)
    return {name: found[some] for name, some in samplings.items()}


def generation(
    runner: Runner,
    sampling: Sampling,
    batch: int,
    clock: Clock,
    after: Callable[[Sampling], None] | None = None,
) -> Callable[[], float]:
    """Return what generates a batch and tells the milliseconds of one sample of it."""
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


def time_batches(
    runner: Runner,
    sampling: Sampling,
    batches: Sequence[int],
    *,
    repeats: int = 7,
    seconds: float = 60,
    clock: Clock = time.perf_counter,
) -> tuple[BatchTime, ...]:
    """Return the times of batches of these sizes, decoder included."""
    jobs = {batch: generation(runner, sampling, batch, clock) for batch in batches}
    found = interleaved(jobs, repeats=repeats, seconds=seconds, shortest=_SHORTEST, clock=clock)
    return tuple(
        BatchTime(batch, batch * float(np.median(times)), len(times))
        for batch, times in found.items()
    )
