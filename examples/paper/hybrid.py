"""Does a hybrid of exploration and exploitation beat both of its parents?

Command   python examples/paper/hybrid.py
Time      ten minutes for each model on 2 CPU cores, after rounds.py
Result    results/hybrid.md

Hayakawa et al. 2025, section 4.2: of a round's positions some are taken from an order that
spreads over the canvas (Halton), the others from the moment sampler's. A share of 0 is the moment
sampler; a share of 1 has Halton's positions and the same tempered tokens, so that the parents and
their hybrids differ in positions alone. Shares are constant, or fall from round to round.
"""

import sys

import grids
from lab import Lab, Rows, Script, main
from mdruntime import Sampling
from mdruntime.order import HYBRID
from mdruntime.study import StudyRow
from page import Section, Verdict, beats, quality, table
from tables import draw, plan_table

Key = tuple[int, int]  # rounds, parts of a round


def families(rows: Rows) -> dict[Key, dict[tuple[float, float], StudyRow]]:
    """Return rows by rounds and parts, then by share of exploration in first and last round."""
    found: dict[Key, dict[tuple[float, float], StudyRow]] = {}
    for sampling, row in rows.items():
        share = sampling.exploration if sampling.order == HYBRID else (0.0, 0.0)
        found.setdefault((sampling.rounds, sampling.substeps), {})[share] = row
    return found


def against_parents(rows: Rows) -> Verdict:
    """Judge whether hybrids beat the better one of their parents."""
    pairs = []
    for family in families(rows).values():
        parents = [family[share] for share in ((0.0, 0.0), (1.0, 1.0)) if share in family]
        if len(parents) == 2:
            best = min(parents, key=lambda row: row.quality)
            pairs += [(row, best) for row in family.values() if row not in parents]
    return beats("hybrids beat the better one of their parents", pairs)


def best_against_parents(rows: Rows) -> Verdict:
    """Judge the same of the best hybrid of every number of rounds and parts."""
    pairs = []
    for family in families(rows).values():
        parents = [family[share] for share in ((0.0, 0.0), (1.0, 1.0)) if share in family]
        mixed = [row for row in family.values() if row not in parents]
        if len(parents) == 2 and mixed:
            pairs.append(
                (min(mixed, key=lambda row: row.quality), min(parents, key=lambda row: row.quality))
            )
    note = "The best of several is chosen by the same numbers, which favours it."
    return beats("the best hybrid beats the better one of its parents", pairs, note)


def falling(rows: Rows) -> Verdict:
    """Judge whether exploring first beats exploring all the way."""
    pairs = [
        (row, family[constant])
        for family in families(rows).values()
        for share, constant in (((1.0, 0.0), (0.5, 0.5)), ((0.75, 0.25), (0.5, 0.5)))
        if constant in family and (row := family.get(share)) is not None
    ]
    return beats("a share that falls beats a constant one of the same mean", pairs)


def shares(rows: Rows) -> str:
    """Return a table of quality by share of exploration."""
    found = families(rows)
    every = sorted({share for family in found.values() for share in family})
    header = ("exploration", *(f"{turns} rounds, {parts} part(s)" for turns, parts in found))
    return table(
        header,
        (
            (
                f"{share[0]:g}" if share[0] == share[1] else f"{share[0]:g} to {share[1]:g}",
                *(quality(family[share]) if share in family else "" for family in found.values()),
            )
            for share in every
        ),
    )


def parents(lab: Lab, model: str, base: Sampling) -> list[Sampling]:
    """Return the moment samplers to compare with."""
    scale = lab.scale(model)
    moment = base.but(order="moment")
    return [
        moment.but(rounds=scale.few),
        moment.but(rounds=scale.middle),
        moment.but(rounds=scale.few, substeps=2),
    ]


def findings(lab: Lab, model: str) -> Section:
    """Measure one model."""
    scale, base = lab.scale(model), lab.base(model)
    plans = parents(lab, model, base) + grids.hybrids(scale, base)
    rows = lab.run(model, plans)
    curves: dict[str, list[StudyRow]] = {}
    for share, row in ((s, r) for family in families(rows).values() for s, r in family.items()):
        first, last = share
        name = f"share {first:g}" if first == last else f"share {first:g} to {last:g}"
        curves.setdefault(name, []).append(row)
    picture = draw(lab, f"hybrid-{model}", model, curves, against="cost", joined=False)
    body = f"{picture}\n\n{shares(rows)}\n\n{plan_table(lab, model, rows.values())}"
    verdicts = (against_parents(rows), best_against_parents(rows), falling(rows))
    return Section(model, verdicts, body)


SCRIPT = Script(
    name="hybrid",
    title="Does a hybrid of exploration and exploitation beat both of its parents?",
    claim="mixing an order that explores with one that exploits beats either alone "
    "(Hayakawa et al. 2025, section 4.2).",
    findings=findings,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
