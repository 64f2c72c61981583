"""Is MaskGIT the moment sampler, and is its alpha a temperature?

Command   python examples/paper/rounds.py
Time      half an hour for each model on 2 CPU cores; what was measured before is not run again
Result    results/rounds.md

Hayakawa et al. 2025, section 3: MaskGIT's Gumbel noise of scale alpha lowers the temperature of
its tokens to alpha / (1 + alpha). If so, the moment sampler, which chooses positions first, has
MaskGIT's quality at every alpha and number of rounds, and random positions with tokens of this
temperature differ from plain tokens in the same direction as MaskGIT does.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise

import grids
from lab import Lab, Rows, Script, main
from mdruntime.study import StudyRow
from page import Section, Verdict, coincide, compare
from tables import draw, plan_table

SPREAD = ("coverage", "entropy")
"""Scores that say how varied samples are, one for images and one for texts; larger is more."""


def paired(rows: Rows, order: str, other: str) -> list[tuple[StudyRow, StudyRow]]:
    """Return rows that differ in the order alone, as pairs of these orders."""
    some = [(sampling, row) for sampling, row in rows.items() if sampling.order == order]
    twins = ((row, rows.get(sampling.but(order=other))) for sampling, row in some)
    return [(row, twin) for row, twin in twins if twin is not None]


def temperature(rows: Rows) -> Verdict:
    """Judge whether MaskGIT differs from plain random sampling as temperature alone does."""
    held = failed = tied = 0
    for tempered, maskgit in paired(rows, "temperature", "maskgit"):
        plain = [
            row
            for row in rows.values()
            if row.sampling.order == "vanilla" and row.sampling.rounds == tempered.sampling.rounds
        ]
        for row in plain:
            signs = compare(tempered, row), compare(maskgit, row)
            tied += "tied" in signs
            held += "tied" not in signs and signs[0] == signs[1]
            failed += "tied" not in signs and signs[0] != signs[1]
    return Verdict(
        "MaskGIT differs from random positions with plain tokens in the same direction as random "
        "positions with tokens of temperature alpha / (1 + alpha)",
        held,
        failed,
        tied,
    )


def _alphas(rows: Rows, order: str) -> Iterator[tuple[StudyRow, StudyRow]]:
    """Yield rows of an order with neighbouring alphas and equal rounds, smaller alpha first."""
    some = [row for row in rows.values() if row.sampling.order == order]
    for turns in sorted({row.sampling.rounds for row in some}):
        line = [row for row in some if row.sampling.rounds == turns]
        yield from pairwise(sorted(line, key=lambda row: row.sampling.alpha))


def spread(rows: Rows) -> Verdict:
    """Judge whether a smaller alpha makes samples less varied, as a lower temperature would."""
    orders = ("maskgit", "moment", "temperature")
    pairs = [pair for order in orders for pair in _alphas(rows, order)]
    found = [
        low.scores[name] < high.scores[name]
        for low, high in pairs
        for name in SPREAD
        if name in low.scores and name in high.scores
    ]
    return Verdict(
        f"the smaller alpha is, the less varied are the samples (by {' or '.join(SPREAD)})",
        sum(found),
        len(found) - sum(found),
        note="Means over the seeds are compared, without intervals.",
    )


def findings(lab: Lab, model: str) -> Section:
    """Measure one model."""
    scale, base = lab.scale(model), lab.base(model)
    rows = lab.run(model, grids.rounds(scale, base))
    curves: dict[str, list[StudyRow]] = {}
    for row in rows.values():
        tempered = row.sampling.order != "vanilla"
        name = f"{row.sampling.order} {row.sampling.alpha:g}" if tempered else "vanilla"
        curves.setdefault(name, []).append(row)
    picture = draw(lab, f"rounds-{model}", model, curves, against="rounds")
    verdicts = (
        coincide(
            "MaskGIT and the moment sampler of the same alpha and rounds are equally good",
            paired(rows, "maskgit", "moment"),
        ),
        temperature(rows),
        spread(rows),
    )
    return Section(model, verdicts, f"{picture}\n\n{plan_table(lab, model, rows.values())}")


SCRIPT = Script(
    name="rounds",
    title="Is MaskGIT the moment sampler, and is its alpha a temperature?",
    claim="MaskGIT samples tokens of the temperature alpha / (1 + alpha) without saying so, and "
    "the moment sampler, which chooses positions first, is as good (Hayakawa et al. 2025, "
    "section 3).",
    findings=findings,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
