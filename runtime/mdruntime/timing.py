"""Measure what passes cost on this device."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mdruntime.costs import Costs, Kind
from mdruntime.passes import PassShape
from mdruntime.probe import Clock, Probe, denoiser_of, pipeline_of
from mdruntime.runner import Runner
from mdruntime.text import TextPipeline

__all__ = ["interleaved", "measure", "noise_of"]

Key = TypeVar("Key")

_ENOUGH = 3  # repeats that are made however long they take
_MORE = 10  # times the repeats are made where they are over too soon


def interleaved(
    jobs: Mapping[Key, Callable[[], float]],
    *,
    repeats: int,
    seconds: float,
    shortest: float = 0.0,
    clock: Clock = time.perf_counter,
) -> dict[Key, list[float]]:
    """Run jobs in turn, again and again, and return what each repeat returned.

    What disturbs the machine for a while then disturbs all jobs alike. The first turn, which finds
    everything cold, does not count.

    Args:
        jobs: each returns its time.
        repeats: that count; fewer, but 3, where ``seconds`` have passed before.
        seconds: after which no further repeat begins.
        shortest: seconds before which jobs go on although ``repeats`` are made, up to ten times as
            many: what is over in an instant shows the machine of that instant.
        clock: that tells the seconds.
    """
    found: dict[Key, list[float]] = {key: [] for key in jobs}
    began = clock()
    for turn in range(_MORE * repeats + 1):
        spent = clock() - began
        if (turn > _ENOUGH and spent > seconds) or (turn > repeats and spent >= shortest):
            break
        for key, job in jobs.items():
            ms = job()
            if turn:
                found[key].append(ms)
    return found


def noise_of(repeats: Iterable[Sequence[float]]) -> float:
    """Return by how much the 90th percentile exceeds the minimum: the median over all jobs."""
    shares = [float(np.percentile(some, 90)) / max(min(some), 1e-9) - 1 for some in repeats if some]
    return float(np.median(shares)) if shares else 0.0


def measure(
    runner: Runner,
    needed: Iterable[tuple[PassShape, bool]],
    *,
    batch: int,
    repeats: int = 7,
    seconds: float = 30,
    clock: Clock = time.perf_counter,
) -> Costs:
    """Measure what passes cost here, at sizes between which the needed ones lie.

    Args:
        runner: of the bundle, on the provider and the threads in question.
        needed: passes that are to be foreseen, and whether their logits are wanted.
        batch: samples that run together.
        repeats: of each measurement; medians count.
        seconds: after which no further repeat begins.
        clock: that tells the seconds.
    """
    rows: dict[Kind, set[int]] = {}
    for shape, logits in needed:
        kind = Kind(shape.samples, shape.sequences > shape.samples, logits)
        rows.setdefault(kind, set()).add(shape.rows)
    probes = {
        kind: Probe(runner, kind, sorted(sizes), clock) for kind, sizes in _outer(rows).items()
    }
    jobs: dict[tuple[Kind | None, Any], Callable[[], float]] = {
        (kind, point): partial(probe.ms, *point)
        for kind, probe in probes.items()
        for point in probe.points
    }
    if "condition" in runner.manifest.graphs:
        jobs[None, "condition"] = partial(_condition_ms, runner, batch, clock)
    jobs[None, "decoder"] = _decoder(runner, clock)
    found = interleaved(jobs, repeats=repeats, seconds=seconds, clock=clock)
    medians = {key: float(np.median(values)) for key, values in found.items()}
    surfaces = {
        kind: probe.surface({point: medians[kind, point] for point in probe.points})
        for kind, probe in probes.items()
    }
    noise = noise_of([values for (kind, _), values in found.items() if kind is not None])
    condition_ms = medians.get((None, "condition"), 0.0)
    return Costs(batch, surfaces, condition_ms, medians[None, "decoder"], noise)


def _outer(rows: Mapping[Kind, set[int]]) -> dict[Kind, set[int]]:
    """Keep the smallest and the largest number of samples of what is alike but for it."""
    kept: dict[Kind, set[int]] = {}
    for kind in rows:
        alike = [other for other in rows if other[1:] == kind[1:]]
        if kind.samples in (min(alike).samples, max(alike).samples):
            kept[kind] = set().union(*(rows[other] for other in alike))
    return kept


def _condition_ms(runner: Runner, batch: int, clock: Clock) -> float:
    """Return what is computed once for a batch, before its first pass."""
    session = runner.session("denoiser")
    began = clock()
    denoiser_of(runner, session, batch)
    return 1000 * (clock() - began)


def _decoder(runner: Runner, clock: Clock) -> Callable[[], float]:
    """Return what decodes one sample and tells its time."""
    spec, pipeline = runner.manifest.denoiser, pipeline_of(runner)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, spec.codebook, (1, spec.length)).astype(np.int32)

    def ms() -> float:
        began = clock()
        if isinstance(pipeline, TextPipeline):
            pipeline.decode(tokens[0])
        else:
            pipeline.decode(tokens)
        return 1000 * (clock() - began)

    return ms
