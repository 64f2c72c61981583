"""Milliseconds of samplers, run in turns so that a busy machine slows all of them alike."""

import time
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from mdruntime import Pipeline, Sampling, TextPipeline

__all__ = ["milliseconds", "ratio_of_medians"]

REPLICATES = 4000  # of the bootstrap


def milliseconds(
    pipeline: Pipeline | TextPipeline, samplings: Sequence[Sampling], batch: int, repeats: int
) -> dict[Sampling, list[float]]:
    """Return milliseconds of a sample, decoding included, of every run.

    Args:
        pipeline: of the model.
        samplings: to be timed.
        batch: samples that run together.
        repeats: timed runs of each; one more warms up.
    """
    runs: dict[Sampling, list[float]] = {sampling: [] for sampling in samplings}
    for repeat in range(repeats + 1):
        for sampling, found in runs.items():
            began = time.perf_counter()
            _generate(pipeline, sampling, batch, repeat)
            found.append((time.perf_counter() - began) * 1000 / batch)
    return {sampling: found[1:] for sampling, found in runs.items()}


def _generate(pipeline: Pipeline | TextPipeline, sampling: Sampling, batch: int, seed: int) -> None:
    options = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    options |= {"seed": seed, "batch_size": batch}
    classes = pipeline.manifest.denoiser.classes
    if isinstance(pipeline, Pipeline) and classes:
        pipeline.generate([index % classes for index in range(batch)], **options)
    else:
        pipeline.generate(count=batch, **options)


def ratio_of_medians(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two medians and its 95 % interval, by a bootstrap over the runs."""
    rng = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> NDArray[np.float64]:
        return np.asarray(np.median(rng.choice(values, (REPLICATES, len(values))), axis=1))

    low, high = np.quantile(medians(slow) / medians(fast), (0.025, 0.975))
    return float(np.median(slow) / np.median(fast)), float(low), float(high)
