"""The sampler for a device: qualities as they were studied, times as they are measured here."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdruntime.costs import Costs
from mdruntime.errors import SamplingError
from mdruntime.generation import time_samplings
from mdruntime.manifest import Manifest
from mdruntime.passes import PassShape, foreseen
from mdruntime.probe import Clock
from mdruntime.runner import Runner
from mdruntime.study import Study, StudyRow, chosen, pareto
from mdruntime.timing import measure

__all__ = [
    "QUALITIES",
    "Estimate",
    "Forecast",
    "Tuning",
    "calibrated",
    "forecast",
    "pick",
    "settled",
    "tune",
]


QUALITIES = ("fast", "balanced", "best")

_DIGITS = 6  # of milliseconds: rows that cost the same must not differ by a rounding


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a batch of samples will have to run."""

    shapes: tuple[PassShape, ...]
    logits: bool  # whether the passes' logits are wanted
    host_ms: float  # of the sampler itself, between the passes
    share: float = 1.0  # passes that really run for each of these

    @property
    def passes(self) -> float:
        """Passes of the batch, in the mean."""
        return self.share * len(self.shapes)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A row of the study and what a sample of it takes here."""

    row: StudyRow
    ms: float  # decoder included
    foreseen: bool  # False: how many passes it takes is known in the mean only
    measured: bool = False  # whether ms is the median of whole samples, not a prediction


@dataclass(frozen=True, slots=True)
class Tuning:
    """All rows of a study, on this device."""

    estimates: tuple[Estimate, ...]  # fastest first
    front: tuple[str, ...]  # rows that no other one beats in both time and quality
    noise: float  # of the measurement

    def ms(self, row: StudyRow) -> float:
        """Return what a sample of a row takes."""
        return next(estimate.ms for estimate in self.estimates if estimate.row.name == row.name)


def check_quality(name: str) -> None:
    """Refuse what is none of ``QUALITIES``."""
    if name not in QUALITIES:
        raise SamplingError(f"quality must be one of {', '.join(QUALITIES)}, got {name!r}")


def study_of(manifest: Manifest) -> Study:
    """Return the quality table of a bundle.

    Raises:
        SamplingError: it has none.
    """
    if manifest.study is None or not manifest.study.rows:
        raise SamplingError(
            "this bundle has no quality table to choose from; where it was built, measure one "
            "with: mdexport study BUNDLE --judge FILE.py:NAME"
        )
    return manifest.study


def forecast(
    manifest: Manifest, row: StudyRow, *, batch: int = 1, clock: Clock = time.perf_counter
) -> Forecast:
    """Return what a batch will have to run, found by running its sampler without the model.

    How many passes an entropy bound takes depends on the model. Such a row is taken for as many
    full passes as the study counted, with fewer and fewer positions to draw tokens at.
    """
    sampling = row.sampling.but(entropy_bound=0.0)
    foreseen(manifest, sampling, batch=batch)  # the first time fills tables that are then kept
    began = clock()
    shapes = foreseen(manifest, sampling, batch=batch)
    host_ms = 1000 * (clock() - began)
    if not row.sampling.entropy_bound:
        return Forecast(tuple(shapes), sampling.exact, host_ms)
    passes = max(1, round(row.passes))
    spec = manifest.denoiser
    rows = spec.length // spec.slots
    full = [
        replace(shapes[0], columns=max(1, round(rows * (1 - index / passes))))
        for index in range(passes)
    ]
    return Forecast(
        tuple(full), sampling.exact, host_ms * passes / len(shapes), row.passes / passes
    )


def predicted_ms(costs: Costs, plan: Forecast) -> float:
    """Return what a sample takes, in milliseconds."""
    passes = costs.passes_ms(plan.shapes, logits=plan.logits)
    batch = plan.share * (passes + plan.host_ms) + costs.condition_ms
    return batch / costs.batch + costs.decoder_ms


def tune(
    runner: Runner,
    *,
    batch: int = 1,
    repeats: int = 7,
    seconds: float = 30,
    clock: Clock = time.perf_counter,
) -> Tuning:
    """Measure what passes cost here and foresee how long every row of the study takes.

    Whole samples of three rows are measured too, to calibrate the predictions of the others.

    Args:
        runner: of the bundle, on the provider and the threads in question.
        batch: samples that run together.
        repeats: of each measurement.
        seconds: after which no further repeat of the passes begins, nor of the whole samples.
        clock: that tells the seconds.

    Raises:
        SamplingError: the bundle has no study.
    """
    manifest = runner.manifest
    rows = study_of(manifest).rows
    plans = {row.name: forecast(manifest, row, batch=batch, clock=clock) for row in rows}
    needed = [(shape, plan.logits) for plan in plans.values() for shape in plan.shapes]
    costs = measure(runner, needed, batch=batch, repeats=repeats, seconds=seconds, clock=clock)
    ms = {name: predicted_ms(costs, plan) for name, plan in plans.items()}
    some = {row.name: row.sampling for row in _typical(rows, ms, plans)}
    times = time_samplings(runner, some, batch=batch, repeats=repeats, seconds=seconds, clock=clock)
    measured = {name: float(np.median(runs)) for name, runs in times.items()}
    ms = calibrated(ms, plans, measured)
    found = (
        Estimate(row, round(ms[row.name], _DIGITS), not row.sampling.entropy_bound) for row in rows
    )
    return _tuning((_known(estimate, measured) for estimate in found), costs.noise)


def settled(
    runner: Runner,
    tuning: Tuning,
    choose: Callable[[Tuning], Estimate],
    *,
    batch: int = 1,
    repeats: int = 7,
    seconds: float = 30,
    clock: Clock = time.perf_counter,
) -> tuple[Tuning, Estimate]:
    """Choose, but only a row of which whole samples were measured.

    Those of the first choice are measured if need be; if another row is the choice at that time,
    those of this one, and so on.

    Args:
        runner: see ``tune``, as for the arguments below.
        tuning: what is known so far.
        choose: returns one of its estimates; see ``pick``.
        batch: samples that run together.
        repeats: of each measurement.
        seconds: after which no further repeat begins.
        clock: that tells the seconds.

    Returns:
        What is known now, and the choice.
    """
    while not (choice := choose(tuning)).measured:
        name, some = choice.row.name, {choice.row.name: choice.row.sampling}
        times = time_samplings(
            runner, some, batch=batch, repeats=repeats, seconds=seconds, clock=clock
        )
        measured = {name: float(np.median(times[name]))}
        estimates = (_known(estimate, measured) for estimate in tuning.estimates)
        tuning = _tuning(estimates, tuning.noise)
    return tuning, choice


def _known(estimate: Estimate, measured: Mapping[str, float]) -> Estimate:
    """Return an estimate with the measured time in place of the predicted one, if there is any."""
    if estimate.row.name not in measured:
        return estimate
    ms = round(measured[estimate.row.name], _DIGITS)
    return replace(estimate, ms=ms, foreseen=True, measured=True)


def _tuning(estimates: Iterable[Estimate], noise: float) -> Tuning:
    found = sorted(estimates, key=lambda estimate: estimate.ms)
    ms = {estimate.row.name: estimate.ms for estimate in found}
    front = pareto([estimate.row for estimate in found], lambda row: ms[row.name])
    return Tuning(tuple(found), tuple(row.name for row in front), noise)


def _typical(
    rows: Sequence[StudyRow], ms: Mapping[str, float], plans: Mapping[str, Forecast]
) -> list[StudyRow]:
    """Return rows with short, middling and long passes, of those that do not take long."""
    known = sorted((r for r in rows if not r.sampling.entropy_bound), key=lambda r: ms[r.name])
    quick = known[: len(known) // 2 + 1]
    quick.sort(key=lambda row: (ms[row.name] / plans[row.name].passes, ms[row.name]))
    places = {0, len(quick) // 2, len(quick) - 1} if quick else set()
    return [quick[place] for place in sorted(places)]


def calibrated(
    ms: Mapping[str, float], plans: Mapping[str, Forecast], measured: Mapping[str, float]
) -> dict[str, float]:
    """Return predictions corrected by rows of which whole samples were measured.

    Between passes the caches of the CPU go to other work and threads fall asleep, which passes
    that are run for nothing but their time do not show; and a machine may be faster or slower by
    now. So times are stretched by a factor and something is added for each pass, with the least
    squares of the relative errors; what is added must not be negative.
    """
    names = [name for name in measured if measured[name] > 0]
    if not names:
        return dict(ms)
    terms = np.array([(ms[name], plans[name].passes) for name in names], np.float64)
    terms /= np.array([[measured[name]] for name in names])
    ones = np.ones(len(names))
    factor, added = np.linalg.lstsq(terms, ones, rcond=None)[0]
    if added < 0 or factor <= 0 or len(names) == 1:
        (factor,), added = np.linalg.lstsq(terms[:, :1], ones, rcond=None)[0], 0.0
    return {name: float(factor * ms[name] + added * plans[name].passes) for name in ms}


def pick(tuning: Tuning, *, budget_ms: float = 0.0, quality: str = "") -> Estimate:
    """Return the row with the best quality within a budget, or one of the study's three choices.

    Args:
        tuning: the rows on this device.
        budget_ms: of a sample, decoder included; 0 to go by ``quality``.
        quality: ``best``, ``balanced`` or ``fast``, as ``study.chosen`` has them.

    Raises:
        SamplingError: nothing fits the budget, or an unknown name.
    """
    if budget_ms:
        return _within(tuning.estimates, budget_ms)
    check_quality(quality)
    name = chosen([estimate.row for estimate in tuning.estimates], tuning.ms)[quality].name
    return next(estimate for estimate in tuning.estimates if estimate.row.name == name)


def _within(estimates: Sequence[Estimate], budget_ms: float) -> Estimate:
    fitting = [estimate for estimate in estimates if estimate.ms <= budget_ms]
    if not fitting:
        cheapest = estimates[0]
        raise SamplingError(
            f"no sampler of the study fits {budget_ms:g} ms a sample here: the fastest, "
            f"{cheapest.row.name!r}, takes {cheapest.ms:.1f} ms; pass --budget "
            f"{math.ceil(cheapest.ms)}ms or more"
        )
    return min(fitting, key=lambda estimate: (estimate.row.quality, estimate.ms))
