"""What was measured so far: runs of samplers in a JSON file, so that a study can be resumed.

A *run* is a sampler with some seeds. It is found again by its options, not by its name: studies
whose plans are named differently share runs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mdruntime.errors import BundleError, SamplingError
from mdruntime.manifest import Manifest
from mdruntime.records import from_json, to_json
from mdruntime.sampling import Sampling
from mdruntime.study import Study, StudyRow

__all__ = ["Outcome", "Store", "interval", "replace_file", "weights_of"]

FORMAT = 1

_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom."""
_NORMAL = 1.959964  # the same for infinitely many


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sampler made with one seed, and what that took."""

    scores: dict[str, float]
    passes: float  # of a sample, in the mean
    cost: float  # full-pass equivalents of a sample
    seconds: float  # of generating all samples, on the machine that did


@dataclass(frozen=True, slots=True)
class _Run:
    name: str  # under which it was measured first
    sampling: Sampling
    seeds: dict[str, Outcome] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _File:
    format: int
    weights: dict[str, str]  # name of a file to its SHA-256
    measure: str
    samples: int  # of every seed
    runs: tuple[_Run, ...] = ()


class Store:
    """Results so far. They belong to one model's weights, one measure and one sample number."""

    def __init__(self, path: Path | None, manifest: Manifest, measure: str, samples: int) -> None:
        """Read the results of earlier studies, if there are any.

        Args:
            path: JSON file, made when the first result comes; None keeps results in memory.
            manifest: of the bundle.
            measure: name of the score that is the quality.
            samples: made with every seed.

        Raises:
            SamplingError: the file is no store, or one of other weights, measure or samples.
        """
        self.path = path
        self._empty = _File(FORMAT, weights_of(manifest), measure, samples)
        self._runs = self._read()

    @property
    def measure(self) -> str:
        """Name of the score that is the quality."""
        return self._empty.measure

    def check(self, manifest: Manifest, measure: str, samples: int) -> None:
        """Refuse results that belong to something else.

        Raises:
            SamplingError: other weights, measure or samples.
        """
        found = _File(FORMAT, weights_of(manifest), measure, samples)
        _compare(self._empty, found, self._where)

    def has(self, sampling: Sampling, seed: int) -> bool:
        """Whether a sampler was measured with a seed."""
        run = self._runs.get(sampling)
        return run is not None and str(seed) in run.seeds

    def add(self, name: str, sampling: Sampling, seed: int, outcome: Outcome) -> None:
        """Keep a result, in the file too, which is whole at any time."""
        run = self._runs.setdefault(sampling, _Run(name, sampling))
        run.seeds[str(seed)] = outcome
        self._write()

    def study(self, plans: Mapping[str, Sampling] | None = None) -> Study:
        """Return the quality table of the given plans, or of all that were measured.

        Args:
            plans: samplers by name.

        Raises:
            SamplingError: a plan was not measured.
        """
        if plans is None:
            runs = [(run.name, run) for run in self._runs.values()]
        else:
            runs = [(name, self._run(name, sampling)) for name, sampling in plans.items()]
        rows = tuple(self._row(name, run) for name, run in runs)
        return Study(self.measure, dict(self._empty.weights), rows)

    def _run(self, name: str, sampling: Sampling) -> _Run:
        run = self._runs.get(sampling)
        if run is None:
            raise SamplingError(f"plan {name!r} was not measured yet; run the study to its end")
        return run

    def _row(self, name: str, run: _Run) -> StudyRow:
        outcomes = list(run.seeds.values())
        shared = set.intersection(*(set(outcome.scores) for outcome in outcomes))
        means = {
            score: float(np.mean([outcome.scores[score] for outcome in outcomes]))
            for score in outcomes[0].scores
            if score in shared
        }
        quality = means.pop(self.measure)
        low, high = interval([outcome.scores[self.measure] for outcome in outcomes])
        return StudyRow(
            name=name,
            sampling=run.sampling,
            quality=quality,
            low=low,
            high=high,
            scores=means,
            passes=float(np.mean([outcome.passes for outcome in outcomes])),
            cost=float(np.mean([outcome.cost for outcome in outcomes])),
            samples=self._empty.samples * len(outcomes),
            seeds=len(outcomes),
        )

    @property
    def _where(self) -> str:
        return "the store" if self.path is None else str(self.path)

    def _read(self) -> dict[Sampling, _Run]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            found = from_json(_File, data, "store")
        except (ValueError, RecursionError, BundleError) as error:
            raise SamplingError(
                f"{self._where} is no store of a study ({error}); "
                "delete it, or pass another --store"
            ) from None
        _compare(found, self._empty, self._where)
        for run in found.runs:
            _check_run(run, self.measure, self._where)
        return {run.sampling: run for run in found.runs}

    def _write(self) -> None:
        if self.path is None:
            return
        for sampling, run in self._read().items():  # another study may share the file
            mine = self._runs.setdefault(sampling, run)
            for seed, outcome in run.seeds.items():
                mine.seeds.setdefault(seed, outcome)
        data = to_json(self._empty) | {"runs": to_json(list(self._runs.values()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that its name always stands for a whole one, the old or the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:  # an interrupt, too, must leave nothing behind
        partial.unlink(missing_ok=True)
        raise


def weights_of(manifest: Manifest) -> dict[str, str]:
    """Return what a study belongs to: files by name, and their SHA-256 sums.

    These are the weights and, of text models, the tokenizer. Random weights come from no file:
    the bundle's own files stand for them.
    """
    if not manifest.weights.files:
        graphs = (name for name in manifest.files if not name.startswith(("verify/", "report")))
        return {name: manifest.files[name].sha256 for name in graphs}
    tokenizer = manifest.text.tokenizer if manifest.text is not None else ""
    named = {tokenizer: manifest.files[tokenizer].sha256} if tokenizer in manifest.files else {}
    return {**manifest.weights.files, **named}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of seeds (Student's t).

    One value says nothing of its spread: then both ends are that value.
    """
    known = np.array(list(values), np.float64)
    mean, count = float(known.mean()), len(known)
    if count == 1:
        return mean, mean
    half = _quantile(count - 1) * float(known.std(ddof=1)) / count**0.5
    return mean - half, mean + half


def _quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Many degrees of freedom take the expansion around the normal quantile (Abramowitz and Stegun
    1964, equation 26.7.5), here within 2e-4.
    """
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = _NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _compare(stored: _File, wanted: _File, where: str) -> None:
    """Refuse results of something else, naming what differs."""
    differing = [
        f"{name} {found} and not {expected}"
        for name, found, expected in (
            ("format", stored.format, wanted.format),
            ("weights", _named(stored.weights), _named(wanted.weights)),
            ("measure", repr(stored.measure), repr(wanted.measure)),
            ("samples", stored.samples, wanted.samples),
        )
        if found != expected
    ]
    if differing:
        raise SamplingError(
            f"{where} holds results of {', '.join(differing)}; pass another --store, or delete it"
        )


def _named(weights: Mapping[str, str]) -> str:
    """Return weights as text that is short and differs where they do."""
    return ", ".join(f"{name} ({digest[:12]})" for name, digest in weights.items()) or "no file"


def _check_run(run: _Run, measure: str, where: str) -> None:
    """Refuse runs that no study wrote."""
    if not run.seeds or any(measure not in outcome.scores for outcome in run.seeds.values()):
        raise SamplingError(
            f"{where}: run {run.name!r} lacks {measure!r}; delete the file, or pass another --store"
        )
