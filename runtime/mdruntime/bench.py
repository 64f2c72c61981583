"""How long a bundle takes on this device: to load, for a pass, and for a sample of each preset."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mdruntime.costs import Costs
from mdruntime.generation import BatchTime, generation, time_batches, time_samplings
from mdruntime.machine import Machine, peak_mb, this_machine
from mdruntime.manifest import Manifest
from mdruntime.passes import PassShape
from mdruntime.probe import Clock, guidable
from mdruntime.roofline import Roofline
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.steal import STOLEN, read_ticks, stolen_share
from mdruntime.timing import measure, noise_of
from mdruntime.waiting import WAITED, read_waits, waited_share
from mdruntime.watch import Spent

__all__ = ["NOISY", "Bench", "Copied", "PassTime", "Spread", "bench"]

NOISY = 0.25
"""Share by which the slow repeats of an undisturbed machine hardly ever exceed the fastest one."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that went to and from the graphs for a batch, in the mean over repeats."""

    passes: float
    to_passes: float  # all of them together
    from_passes: float
    others: float  # to and from the other graphs
    caches: float  # of all these: keys and values, which should stay where they are


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
    copied: Copied | None = None  # None in files of older versions


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
    steal: float = 0.0  # share of the cores' time that the host gave to others
    waited: float = 0.0  # share of this process's time that its threads waited for a core
    first_ms: float = 0.0  # from the beginning of loading to the first sample of the default preset
    batches: tuple[BatchTime, ...] = ()
    roofline: Roofline | None = None

    @property
    def noisy(self) -> bool:
        """Whether something else kept the machine busy."""
        return self.noise > NOISY or self.steal > STOLEN or self.waited > WAITED


def bench(
    runner: Runner,
    presets: Iterable[str] = (),
    *,
    batch: int = 1,
    repeats: int = 7,
    load_ms: float = 0.0,
    batches: Sequence[int] = (),
    clock: Clock = time.perf_counter,
) -> Bench:
    """Measure a bundle.

    Args:
        runner: of the bundle, on the provider and the threads in question.
        presets: names; none stands for all there are.
        batch: samples that run together.
        repeats: of each measurement, interleaved.
        load_ms: what loading took.
        batches: numbers of samples to time the first of the presets with; ``default``, if none.
        clock: that tells the seconds.

    Raises:
        SamplingError: an unknown preset.
    """
    manifest, ticks, waits = runner.manifest, read_ticks(), read_waits()
    names = list(presets)
    chosen = {name: runner.sampling(name, {}) for name in names or runner.presets}
    first_ms = load_ms + generation(runner, runner.sampling("default", {}), 1, clock)()
    costs = measure(runner, _sizes(manifest, batch), batch=batch, repeats=repeats, clock=clock)
    spent = runner.watched()
    parts: dict[Sampling, list[dict[str, Spent]]] = {}

    def part(sampling: Sampling) -> None:
        parts.setdefault(sampling, []).append(dict(spent))
        spent.clear()

    spent.clear()
    times = time_samplings(runner, chosen, batch=batch, repeats=repeats, clock=clock, after=part)
    of_batches = runner.sampling(names[0] if names else "default", {})
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
            name: _spread(some, parts[chosen[name]][-len(some) :], batch, _caches(manifest))
            for name, some in times.items()
        },
        batches=time_batches(runner, of_batches, batches, repeats=repeats, clock=clock),
        peak_mb=peak_mb(),
        noise=noise_of(times.values()),
        steal=stolen_share(ticks, read_ticks()),
        waited=waited_share(waits, read_waits()),
        first_ms=first_ms,
    )


def _sizes(manifest: Manifest, batch: int) -> Iterable[tuple[PassShape, bool]]:
    """Yield a full pass and passes of all buckets, under guidance too where there can be any."""
    canvas = manifest.denoiser.canvas
    for factor in (1, 2) if guidable(manifest) else (1,):
        for rows in {*manifest.buckets, canvas}:
            yield PassShape(batch, factor * batch, rows, rows, canvas), False


def _caches(manifest: Manifest) -> set[str]:
    """Return the names of all caches, as inputs and as outputs."""
    return {name for pair in manifest.graphs["denoiser"].caches for name in pair}


def _pass_times(costs: Costs) -> Iterable[PassTime]:
    for kind, surface in costs.surfaces.items():
        for rows in reversed(surface.rows):
            yield PassTime(rows, kind.guided, surface.ms(rows, rows))


def _spread(
    repeats: list[float], parts: list[dict[str, Spent]], batch: int, caches: set[str]
) -> Spread:
    """Return the spread of some samples' times, and the mean of what they consist of."""

    def mean(*graphs: str) -> float:
        return _mean([sum(one[name].ms for name in graphs if name in one) for one in parts]) / batch

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
        _copied(parts, caches),
    )


def _copied(parts: list[dict[str, Spent]], caches: set[str]) -> Copied:
    passes = [one["denoiser"] for one in parts]
    others = [[spent for name, spent in one.items() if name != "denoiser"] for one in parts]
    return Copied(
        _mean([one.runs for one in passes]),
        _mean([one.sent for one in passes]),
        _mean([one.fetched for one in passes]),
        _mean([sum(one.sent + one.fetched for one in some) for some in others]),
        _mean([sum(one.tensors.get(name, 0) for name in caches) for one in passes]),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
