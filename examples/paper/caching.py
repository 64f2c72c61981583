"""Does partial caching buy long trajectories for little?

Command   python examples/paper/caching.py
Time      ten minutes for each model on 2 CPU cores, after rounds.py and orders.py
Result    results/caching.md

Hayakawa et al. 2025, section 4.1: a round's positions are revealed in c parts, of which only the
first needs a full pass; the others recompute few rows against cached keys and values. If that
approximates a trajectory of c times as many rounds, a sampler with c parts is as good as one with
c times the rounds, and better than a plain one of its own cost. Orders that are known beforehand
share full passes among several rounds of the schedule in the same way.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

import grids
from lab import Lab, Rows, Script, main
from mdruntime import Sampling
from mdruntime.study import StudyRow
from page import Section, Verdict, beats, coincide, quality, table, told
from staleness import measured, stale_table, verdict
from tables import draw, plan_table

SHARED_ROWS = "recent"


def plain(sampling: Sampling) -> Sampling:
    """Return a sampler with as many steps, all of them full passes."""
    steps = sampling.rounds * sampling.substeps
    return sampling.but(rounds=steps, substeps=1, refresh_interval=1, refresh="chosen")


def is_cached(sampling: Sampling) -> bool:
    """Whether a sampler makes partial passes."""
    return sampling.substeps > 1 or sampling.refresh_interval > 1


def family(sampling: Sampling) -> Sampling:
    """Return what samplers have in common that differ in rounds and plan alone."""
    return plain(sampling).but(rounds=1)


def at_cost(cost: float, line: Sequence[StudyRow]) -> StudyRow | None:
    """Return what a line of samplers would have at a cost between its own.

    Qualities and intervals are interpolated, linear in the logarithm of the cost.

    Args:
        cost: in full-pass equivalents.
        line: samplers that differ in their rounds.
    """
    known = sorted(line, key=lambda row: row.cost)
    if len(known) < 2 or not known[0].cost <= cost <= known[-1].cost:
        return None
    x = np.log([row.cost for row in known])

    def between(values: list[float]) -> float:
        return float(np.interp(np.log(cost), x, values))

    return replace(
        known[0],
        name="plain, interpolated",
        quality=between([row.quality for row in known]),
        low=between([row.low for row in known]),
        high=between([row.high for row in known]),
        cost=cost,
    )


def pairs_by(
    rows: Rows, partner: Callable[[Sampling, StudyRow], StudyRow | None]
) -> list[tuple[StudyRow, StudyRow]]:
    """Return cached samplers with what each is compared with."""
    found = ((row, partner(sampling, row)) for sampling, row in rows.items() if is_cached(sampling))
    return [(row, other) for row, other in found if other is not None]


def equal_steps(rows: Rows) -> list[tuple[StudyRow, StudyRow]]:
    """Return cached samplers with those of as many steps without a cache."""
    return pairs_by(rows, lambda sampling, _: rows.get(plain(sampling)))


def equal_cost(rows: Rows) -> list[tuple[StudyRow, StudyRow]]:
    """Return cached samplers with what plain ones of the same order have at their cost."""

    def partner(sampling: Sampling, row: StudyRow) -> StudyRow | None:
        line = [
            other
            for each, other in rows.items()
            if not is_cached(each) and family(each) == family(sampling)
        ]
        return at_cost(row.cost, line)

    return pairs_by(rows, partner)


def verdicts(rows: Rows) -> tuple[Verdict, ...]:
    """Judge both claims."""
    return (
        coincide("caching is as good as as many steps of full passes", equal_steps(rows)),
        beats("caching is better than full passes alone at equal cost", equal_cost(rows)),
    )


def comparison(rows: Rows) -> str:
    """Return a table of cached samplers beside plain ones of as many steps, and of their cost."""
    steps, costs = dict(_named(equal_steps(rows))), dict(_named(equal_cost(rows)))

    def beside(row: StudyRow, other: StudyRow | None) -> str:
        return f"{quality(other)}, {told(row, other)}" if other is not None else ""

    return table(
        ("sampler", "cost", "quality", "as many full passes", "their cost", "plain at its cost"),
        (
            (
                *(row.name, f"{row.cost:.2f}", quality(row)),
                *(beside(row, steps.get(row.name)), _cost(steps.get(row.name))),
                beside(row, costs.get(row.name)),
            )
            for sampling, row in rows.items()
            if is_cached(sampling)
        ),
    )


def _named(pairs: list[tuple[StudyRow, StudyRow]]) -> list[tuple[str, StudyRow]]:
    return [(row.name, other) for row, other in pairs]


def _cost(row: StudyRow | None) -> str:
    return f"{row.cost:.2f}" if row is not None else ""


def stale_plans(lab: Lab, model: str, base: Sampling) -> list[Sampling]:
    """Return the samplers whose conditionals are looked at."""
    scale = lab.scale(model)
    moment = base.but(order="moment", rounds=scale.few)
    parts = [moment.but(substeps=parts) for parts in (2, 4, 8)]
    recent = [plan.but(refresh=SHARED_ROWS) for plan in parts[1:]]
    spread = base.but(order="halton", rounds=scale.many, refresh=SHARED_ROWS)
    return [*parts, *recent, spread.but(refresh_interval=4)]


def plans(lab: Lab, model: str, base: Sampling) -> list[Sampling]:
    """Return all cached samplers, and the plain ones to compare with."""
    scale = lab.scale(model)
    cached = grids.cached(scale, base) + grids.known(scale, base)
    families = {family(plan) for plan in cached}
    compared = grids.rounds(scale, base) + grids.orders(scale, base)
    return cached + [plan for plan in compared if family(plan) in families]


def findings(lab: Lab, model: str) -> Section:
    """Measure one model."""
    base = lab.base(model)
    rows = lab.run(model, plans(lab, model, base))
    samples = 4 if lab.short else 16
    stale = [
        each
        for plan in stale_plans(lab, model, base)
        for each in measured(lab.bundle(model), plan, samples, threads=lab.threads)
    ]
    body = [
        draw(lab, f"caching-{model}", model, _curves(rows), against="cost"),
        comparison(rows),
        "Stale conditionals, in nats (mean over rounds, positions and "
        f"{samples} samples ± one standard error). Of orders that are known beforehand no pass "
        "looks ahead, so there is nothing before to compare with.",
        stale_table(stale),
        plan_table(lab, model, rows.values()),
    ]
    return Section(model, (*verdicts(rows), verdict(stale)), "\n\n".join(body))


def _curves(rows: Rows) -> dict[str, list[StudyRow]]:
    curves: dict[str, list[StudyRow]] = {}
    for sampling, row in rows.items():
        name = sampling.order
        if sampling.tokens != "order":
            name += f", {sampling.tokens}"
        if sampling.schedule == "ancestral":
            name += ", ancestral"
        if is_cached(sampling):
            shared = sampling.refresh_interval > 1
            name += ", rounds share full passes" if shared else f", {sampling.substeps} parts"
            name += f", {sampling.refresh}" * (sampling.substeps > 2)
        curves.setdefault(name, []).append(row)
    return curves


SCRIPT = Script(
    name="caching",
    title="Does partial caching buy long trajectories for little?",
    claim="revealing a round's positions in c parts, with one full pass and c - 1 partial ones, "
    "approximates a trajectory c times as long at little more than the cost of the short one "
    "(Hayakawa et al. 2025, section 4.1).",
    findings=findings,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
