"""What is known of a model's quality under different samplers, and what follows for a choice.

``mdexport study`` measures it once, on any machine; ``mdruntime tune`` combines it with what passes
cost on a device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mdruntime.sampling import Sampling

__all__ = ["Study", "StudyRow", "chosen", "pareto", "presets_of", "ties"]


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A sampler and the quality of what it makes."""

    name: str
    sampling: Sampling
    quality: float  # mean over the seeds of the study's measure; smaller is better
    low: float  # its 95 % confidence interval
    high: float
    scores: dict[str, float]  # whatever else was measured, means over the seeds
    passes: float  # of a sample, in the mean
    cost: float  # rows computed for a sample, guidance included, over the rows of a full pass
    samples: int  # in all
    seeds: int


@dataclass(frozen=True, slots=True)
class Study:
    """The quality table of a model."""

    measure: str  # what ``quality`` is
    weights: dict[str, str]  # name of a weight file to its SHA-256: the table belongs to these
    rows: tuple[StudyRow, ...]


Cost = Callable[[StudyRow], float]


def _cost(row: StudyRow) -> float:
    return row.cost


def pareto(rows: Iterable[StudyRow], cost: Cost = _cost) -> list[StudyRow]:
    """Return the rows that no other one beats in both cost and quality, cheapest first."""
    front: list[StudyRow] = []
    for row in sorted(rows, key=lambda row: (cost(row), row.quality)):
        if not front or row.quality < front[-1].quality:
            front.append(row)
    return front


def ties(rows: Iterable[StudyRow]) -> list[StudyRow]:
    """Return the rows that cannot be told from the best one: their intervals reach its mean."""
    known = list(rows)
    best = min(row.quality for row in known)
    return [row for row in known if row.low <= best]


def chosen(rows: Sequence[StudyRow], cost: Cost = _cost) -> dict[str, StudyRow]:
    """Return the rows that presets are made of.

    ``best`` has the best quality; ``balanced`` costs least of all that cannot be told from it; and
    ``fast`` has the best quality of all that cost at most two thirds of ``balanced``: half of few
    rounds would leave one, which is no sampler to offer.
    """
    best = min(rows, key=lambda row: row.quality)
    balanced = min(ties(rows), key=lambda row: (cost(row), row.quality))
    cheap = [row for row in rows if cost(row) <= cost(balanced) * 2 / 3]
    fast = min(cheap, key=lambda row: row.quality) if cheap else min(rows, key=cost)
    return {"fast": fast, "balanced": balanced, "best": best}


def presets_of(study: Study) -> dict[str, Sampling]:
    """Return the presets that a quality table decides: ``default`` is ``balanced``."""
    presets = {name: row.sampling for name, row in chosen(study.rows).items()}
    return {"default": presets["balanced"], **presets}
