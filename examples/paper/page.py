"""A page of results: Markdown tables, and whether claims held, computed from the numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdexport.study_store import replace_file
from mdruntime.study import StudyRow

__all__ = ["Section", "Verdict", "beats", "coincide", "compare", "page", "quality", "table", "told"]

Pair = tuple[StudyRow, StudyRow]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, and how many comparisons bore it out."""

    claim: str
    held: int
    failed: int
    tied: int = 0  # comparisons that could not be told from noise
    note: str = ""

    @property
    def word(self) -> str:
        """The result in a word or two; what cannot be told from noise is no support."""
        if not self.held + self.failed + self.tied:
            return "not tested"
        if not self.held:
            return "failed" if self.failed else "undecided"
        return "held" if not self.failed + self.tied else "held in part"

    @property
    def line(self) -> str:
        """The verdict as a line of Markdown."""
        counts = f"{self.held} of {self.held + self.failed + self.tied} comparisons bear it out"
        if self.tied:
            counts += f", {self.tied} cannot be told from noise"
        if self.failed:
            counts += f", {self.failed} contradict it"
        note = f" {self.note}" if self.note else ""
        return f"- **{self.word}**: {self.claim} ({counts}).{note}"


@dataclass(frozen=True, slots=True)
class Section:
    """What was found on one model, or without any."""

    title: str
    verdicts: tuple[Verdict, ...]
    body: str  # Markdown


def compare(one: StudyRow, other: StudyRow) -> str:
    """Return whether the quality of ``one`` is ``better``, ``worse`` or ``tied``.

    Two samplers are told apart if the difference of their means is larger than the half width of
    its own 95 % interval, the root of the sum of the squares of theirs (as in Welch's test).
    """
    difference = one.quality - other.quality
    if abs(difference) <= _half_width(one, other):
        return "tied"
    return "better" if difference < 0 else "worse"


def _half_width(one: StudyRow, other: StudyRow) -> float:
    return math.hypot(one.high - one.low, other.high - other.low) / 2


def beats(claim: str, pairs: Iterable[Pair], note: str = "") -> Verdict:
    """Judge the claim that the first of every pair is better."""
    found = [compare(*pair) for pair in pairs]
    return Verdict(claim, found.count("better"), found.count("worse"), found.count("tied"), note)


def coincide(claim: str, pairs: Sequence[Pair]) -> Verdict:
    """Judge the claim that both of every pair are equally good.

    Equal is what cannot be told apart, so the note says how coarse the comparison is.
    """
    ties = [compare(*pair) == "tied" for pair in pairs]
    return Verdict(claim, sum(ties), len(ties) - sum(ties), note=_coarseness(pairs))


def _coarseness(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    largest = max(abs(one.quality - other.quality) / _mean(one, other) for one, other in pairs)
    seen = max(_half_width(*pair) / _mean(*pair) for pair in pairs)
    return (
        f"The largest difference is {largest:.0%} of the mean; "
        f"one below {seen:.0%} could go unseen in the noisiest pair."
    )


def _mean(one: StudyRow, other: StudyRow) -> float:
    return max((one.quality + other.quality) / 2, 1e-12)


def told(one: StudyRow, other: StudyRow) -> str:
    """Return ``compare`` in words for a table."""
    return {"better": "better", "worse": "worse", "tied": "not told apart"}[compare(one, other)]


def quality(row: StudyRow) -> str:
    """Return the quality with half the width of its interval."""
    if row.seeds == 1:
        return f"{row.quality:.4g} (one seed)"
    return f"{row.quality:.4g} ± {(row.high - row.low) / 2:.2g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(path: Path, title: str, claim: str, context: str, sections: Sequence[Section]) -> None:
    """Write a page of results; the file is written whole or not at all.

    Args:
        path: of the file.
        title: the question.
        claim: what the paper says.
        context: command, date, machine and versions, in Markdown.
        sections: what was found.
    """
    parts = [f"# {title}", f"The claim: {claim}", context]
    for section in sections:
        verdicts = "\n".join(verdict.line for verdict in section.verdicts)
        parts += [part for part in (f"## {section.title}", verdicts, section.body) if part]
    replace_file(path, ("\n\n".join(parts) + "\n").encode())
