"""How much cheaper than MaskGIT at its best is equal quality?

Command   python examples/paper/headline.py
Time      ten minutes for each model on 2 CPU cores, after the other scripts
Result    results/headline.md

Hayakawa et al. 2025 promise up to 3.2 times fewer steps at equal quality. MaskGIT is tuned first:
guidance, alpha and rounds. For each of its settings that no other one of its own beats, the
cheapest of all other samplers with equal quality is looked up, by the mean and, more strictly, by
the upper end of its 95 % interval. Costs are compared in full-pass equivalents and in measured
milliseconds; all samplers were measured with the same seeds, classes and judge.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import grids
from lab import Lab, Script, main
from mdexport.study_store import interval
from mdruntime import Sampling, open_bundle
from mdruntime.manifest import Manifest
from mdruntime.passes import foreseen
from mdruntime.study import StudyRow, chosen, pareto
from page import Section, Verdict, quality, table
from stopwatch import milliseconds, ratio_of_medians
from tables import draw, plan_table

PROMISE = 3.2  # times fewer steps at equal quality
REPLICATES = 4000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times cheaper, with a 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the ratio with its interval."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Match:
    """A setting of MaskGIT, and the cheapest sampler that is as good; None where none is."""

    maskgit: StudyRow
    equal: StudyRow | None  # its mean is not worse
    strict: StudyRow | None  # the upper end of its interval is not worse than MaskGIT's mean
    ratio: Ratio  # of costs, to the equal one


def cheapest(rows: Iterable[StudyRow]) -> StudyRow | None:
    """Return the row of least cost, or None if there is no row."""
    return min(rows, key=lambda row: (row.cost, row.quality), default=None)


def match(maskgit: StudyRow, others: Sequence[StudyRow]) -> Match:
    """Return the cheapest samplers that are as good as a setting of MaskGIT."""
    equal = cheapest(row for row in others if row.quality <= maskgit.quality)
    strict = cheapest(row for row in others if row.high <= maskgit.quality)
    return Match(maskgit, equal, strict, cost_ratio(maskgit, equal, others))


def cost_ratio(maskgit: StudyRow, equal: StudyRow | None, others: Sequence[StudyRow]) -> Ratio:
    """Return how many times cheaper the cheapest equal sampler is.

    The interval draws the qualities of all samplers anew from what their own intervals say, and
    looks the cheapest one up again; where none is as good the ratio counts as 0.
    """
    rng = np.random.default_rng(0)
    theirs, ours = _drawn([maskgit], rng), _drawn(others, rng)
    costs = np.array([row.cost for row in others])
    ratios = (maskgit.cost / np.where(ours <= theirs, costs, np.inf)).max(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(maskgit.cost / equal.cost if equal is not None else 0.0, float(low), float(high))


def _drawn(rows: Sequence[StudyRow], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw means (replicates, rows) by Student's t, as wide as the rows' intervals."""
    columns = []
    for row in rows:
        half = (row.high - row.low) / 2
        if row.seeds == 1:  # nothing is known of its spread
            columns.append(np.full(REPLICATES, row.quality))
            continue
        scale = half / _quantile(row.seeds)
        columns.append(row.quality + scale * rng.standard_t(row.seeds - 1, REPLICATES))
    return np.stack(columns, axis=1)


def _quantile(seeds: int) -> float:
    """Return the quantile of Student's t that the interval of so many seeds is made with."""
    values = np.arange(seeds)
    low, high = interval(values.tolist())
    return (high - low) / 2 * float(np.sqrt(seeds) / values.std(ddof=1))


def settings(maskgit: Sequence[StudyRow]) -> dict[str, StudyRow]:
    """Return what counts as MaskGIT at its best: the best mean, and the cheapest as good."""
    found = chosen(maskgit)
    return {"best mean": found["best"], "cheapest not told from it": found["balanced"]}


def full_passes(manifest: Manifest, row: StudyRow) -> float:
    """Return the full passes of a sample."""
    if row.sampling.entropy_bound:
        return row.passes  # all of them are
    shapes = foreseen(manifest, row.sampling)
    return float(sum(shape.full for shape in shapes))


def verdict(name: str, found: Ratio | None) -> Verdict:
    """Judge whether a ratio reaches what the paper promises."""
    claim = f"{name}: {PROMISE} times cheaper at equal quality"
    if found is None:
        return Verdict(claim, 0, 1, note="No sampler is as good.")
    held, failed = found.low >= PROMISE, found.high < PROMISE
    note = f"Found {found}, which is {found.value / PROMISE:.0%} of it."
    return Verdict(claim, int(held), int(failed), int(not held and not failed), note)


def loss(manifest: Manifest, found: Match, times: Ratio) -> str:
    """Return what becomes of the saved full passes on their way to milliseconds."""
    assert found.equal is not None
    passes = full_passes(manifest, found.maskgit) / full_passes(manifest, found.equal)
    cost = found.ratio.value
    return (
        f"{found.maskgit.name} against {found.equal.name}: {passes:.2f} times fewer full passes; "
        f"rows of partial passes leave {cost:.2f} of it in cost ({cost / passes:.0%}); what does "
        "not shrink with the rows (decoder, and the own time of every pass) leaves "
        f"{times.value:.2f} in milliseconds ({times.value / cost:.0%})."
    )


def lines(matches: Sequence[Match], times: Mapping[tuple[Sampling, Sampling], Ratio]) -> str:
    """Return the headline table."""

    def line(found: Match) -> tuple[str, ...]:
        row, equal, strict = found.maskgit, found.equal, found.strict
        mine: list[str] = ["none", "", "", str(found.ratio), ""]
        if equal is not None:
            faster = times[row.sampling, equal.sampling]
            mine = [equal.name, quality(equal), f"{equal.cost:.2f}", str(found.ratio), str(faster)]
        last = ["none", ""]
        if strict is not None:
            last = [strict.name, f"{row.cost / strict.cost:.2f}"]
        return (row.name, quality(row), f"{row.cost:.2f}", *mine, *last)

    header = (
        *("MaskGIT", "quality", "cost", "cheapest as good by the mean", "quality", "cost"),
        *(
            "times cheaper (95 %)",
            "times faster (95 %)",
            "as good by the interval",
            "times cheaper",
        ),
    )
    return table(header, map(line, matches))


def timed(
    lab: Lab, model: str, matches: Sequence[Match]
) -> tuple[dict[Sampling, list[float]], dict[tuple[Sampling, Sampling], Ratio]]:
    """Measure the samplers that are compared.

    Returns:
        Milliseconds of a sample, run by run, and the ratios of pairs' medians.
    """
    pairs = [
        (found.maskgit.sampling, found.equal.sampling)
        for found in matches
        if found.equal is not None
    ]
    distinct = list(dict.fromkeys(sampling for pair in pairs for sampling in pair))
    with lab.open(model) as pipeline:
        batch, repeats = (4, 3) if lab.short else (16, 9)
        found = milliseconds(pipeline, distinct, batch, repeats)
    return found, {
        pair: Ratio(*ratio_of_medians(*(found[each] for each in pair))) for pair in pairs
    }


def findings(lab: Lab, model: str) -> Section:
    """Measure one model."""
    scale, base = lab.scale(model), lab.base(model)
    rows = lab.run(model, [*grids.tuning(scale), *grids.grid_of(scale, base)])
    maskgit = [row for row in rows.values() if row.sampling.order == "maskgit"]
    others = [row for row in rows.values() if row.sampling.order != "maskgit"]
    best = settings(maskgit)
    front = dict.fromkeys(row.sampling for row in (*pareto(maskgit), *best.values()))
    matches = [match(rows[sampling], others) for sampling in front]
    runs, times = timed(lab, model, matches)
    manifest = open_bundle(lab.bundle(model), check=False).manifest
    verdicts, losses = [], []
    for name, row in best.items():
        found = next(each for each in matches if each.maskgit is row)
        pair = (row.sampling, found.equal.sampling) if found.equal is not None else None
        verdicts.append(verdict(f"MaskGIT's {name}, cost", found.ratio if pair else None))
        verdicts.append(verdict(f"MaskGIT's {name}, milliseconds", times[pair] if pair else None))
        losses += [f"- {loss(manifest, found, times[pair])}"] if pair else []
    curves = {"MaskGIT": maskgit, "all others": others, "front of the others": pareto(others)}
    body = [
        draw(lab, f"headline-{model}", model, curves, against="cost", joined=False),
        lines(matches, times),
        f"The cheapest of {len(others)} samplers is chosen by the same numbers that it is judged "
        "by; the interval of the cost counts that in, as it chooses anew every time. "
        f"Milliseconds are medians of {len(next(iter(runs.values()), []))} interleaved runs.",
        "Where it is lost:",
        "\n".join(dict.fromkeys(losses)) or "No sampler is as good as MaskGIT at its best.",
        plan_table(lab, model, pareto([*maskgit, *others])),
    ]
    return Section(model, tuple(verdicts), "\n\n".join(body))


SCRIPT = Script(
    name="headline",
    title="How much cheaper than MaskGIT at its best is equal quality?",
    claim=f"the moment sampler, partial caching and the hybrid order together need up to {PROMISE} "
    "times fewer steps than MaskGIT at equal quality (Hayakawa et al. 2025).",
    findings=findings,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
