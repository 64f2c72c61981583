"""The quality of what a bundle makes under many samplers.

Every sampler makes the same samples: the same seeds and, of class-conditional models, the same
classes in turn. A judge scores those of each seed, and the spread over the seeds says how far the
mean can be trusted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from mdexport.judge import Judge, load_judge, scores_of
from mdexport.study_store import Outcome, Store, replace_file
from mdruntime.bundle import MANIFEST, Bundle
from mdruntime.errors import BundleError, SamplingError
from mdruntime.manifest import Manifest, dump, parse
from mdruntime.passes import PassShape, cost
from mdruntime.pipeline import Pipeline
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL
from mdruntime.study import Study, presets_of
from mdruntime.text import TextPipeline

__all__ = ["Judge", "Progress", "Store", "load_judge", "measure", "sign"]


@dataclass(frozen=True, slots=True)
class Progress:
    """A run that begins, or one that is done."""

    run: int  # from 1
    runs: int  # that are still to be measured, this study's alone
    name: str
    seed: int
    seconds: float | None = None  # None while it has only begun
    quality: float | None = None


def measure(
    pipeline: Pipeline | TextPipeline,
    judge: Judge,
    plans: Mapping[str, Sampling],
    store: Store,
    *,
    samples: int = 620,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 62,
) -> Iterator[Progress]:
    """Measure samplers, yielding before and after each run; what the store has is left out.

    All plans run with one seed before any runs with the next, so that a study that is cut short
    has measured all alike. Sample i has class i modulo the number of classes.

    Args:
        pipeline: of a bundle that makes images, with or without classes, or texts.
        judge: says how good samples are.
        plans: samplers by name.
        store: keeps every result as soon as it is there.
        samples: made with every seed.
        seeds: of the pipeline's ``generate``.
        batch_size: largest number of samples that run together; changes no sample.

    Raises:
        SamplingError: a plan that this bundle cannot run, a store of something else, or a judge
            that fails.
    """
    manifest = pipeline.manifest
    store.check(manifest, judge.measure, samples)
    _check(manifest, plans)
    missing = _missing(plans, seeds, store)
    for number, (name, seed) in enumerate(missing, 1):
        yield Progress(number, len(missing), name, seed)
        began = time.perf_counter()
        outcome = _run(pipeline, judge, plans[name], samples, seed, batch_size)
        store.add(name, plans[name], seed, outcome)
        seconds, quality = time.perf_counter() - began, outcome.scores[judge.measure]
        yield Progress(number, len(missing), name, seed, seconds, quality)


def _missing(
    plans: Mapping[str, Sampling], seeds: Sequence[int], store: Store
) -> list[tuple[str, int]]:
    """Return names and seeds of what is to be measured; the same sampler never twice."""
    names: dict[Sampling, str] = {}
    for name, sampling in plans.items():
        names.setdefault(sampling, name)
    return [
        (name, seed)
        for seed in seeds
        for sampling, name in names.items()
        if not store.has(sampling, seed)
    ]


def _check(manifest: Manifest, plans: Mapping[str, Sampling]) -> None:
    """Refuse now what would fail after hours."""
    if manifest.prompt is not None:
        raise SamplingError("a study needs a model of classes or of texts; this one takes prompts")
    length = manifest.denoiser.length
    for name, sampling in plans.items():
        if sampling.rounds > length and sampling.schedule != ANCESTRAL:
            raise SamplingError(
                f"plan {name!r}: rounds must be at most {length} (the tokens of the canvas), "
                f"got {sampling.rounds}"
            )


def _run(
    pipeline: Pipeline | TextPipeline,
    judge: Judge,
    sampling: Sampling,
    samples: int,
    seed: int,
    batch_size: int,
) -> Outcome:
    """Make the samples of one seed and have them judged."""
    counted = pipeline.counted()
    before, began = len(counted.shapes), time.perf_counter()
    options = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    options |= {"seed": seed, "batch_size": batch_size}
    made, labels = _generate(pipeline, samples, options)
    seconds = time.perf_counter() - began
    shapes = counted.shapes[before:]
    return Outcome(
        scores=scores_of(judge, made, labels),
        passes=_passes(shapes) / samples,
        cost=cost(shapes, samples),
        seconds=seconds,
    )


def _generate(
    pipeline: Pipeline | TextPipeline, samples: int, options: dict[str, Any]
) -> tuple[Any, list[int] | None]:
    """Return samples, and their classes if they have any."""
    classes = pipeline.manifest.denoiser.classes
    if isinstance(pipeline, Pipeline) and classes:
        labels = [index % classes for index in range(samples)]
        return pipeline.generate(labels, **options), labels
    return pipeline.generate(count=samples, **options), None


def _passes(shapes: Sequence[PassShape]) -> int:
    return sum(shape.samples for shape in shapes)


def sign(bundle: Bundle, study: Study, *, presets: bool = True) -> Manifest:
    """Write a quality table into a bundle's manifest, and return the manifest.

    Graphs, weights and the record of their verification stay as they are.

    Args:
        bundle: as it was opened before the study.
        study: of this bundle's weights.
        presets: let the table decide ``fast``, ``balanced``, ``best`` and ``default``.

    Raises:
        BundleError: the bundle was written anew since it was opened.
    """
    path = bundle.folder / MANIFEST
    manifest = parse(path.read_bytes())
    if manifest.digest != bundle.manifest.digest:
        raise BundleError(
            f"{path} changed during the study; run the command again, which measures nothing twice"
        )
    decided = presets_of(study) if presets else {}
    raw = dump(replace(manifest, study=study, presets={**manifest.presets, **decided}))
    replace_file(path, raw)
    return parse(raw)
