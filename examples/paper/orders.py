"""Which positions first?

Command   python examples/paper/orders.py
Time      twenty minutes for each model on 2 CPU cores, after rounds.py
Result    results/orders.md

Hayakawa et al. 2025, section 4: the order in which positions are revealed matters, and once a
sampler chooses positions before tokens, any order can be used. Every comparison here changes the
order alone and keeps the law of the tokens: tempered (moment, temperature), plain (u-moment,
halton, vanilla and the orders by confidence).
"""

import sys

import grids
from lab import Lab, Rows, Script, main
from mdruntime.study import StudyRow
from page import Section, Verdict, beats, coincide, quality, table, told
from rounds import paired
from tables import draw, plan_table

CONFIDENT = ("top-probability", "margin", "entropy")


def verdicts(rows: Rows) -> tuple[Verdict, ...]:
    """Judge the orders, one change at a time."""
    confident = [pair for order in CONFIDENT for pair in paired(rows, order, "vanilla")]
    return (
        coincide(
            "choosing positions first can have MaskGIT's law (maskgit-exact)",
            paired(rows, "maskgit-exact", "maskgit"),
        ),
        beats(
            "with tempered tokens, positions by moment beat random ones",
            paired(rows, "moment", "temperature"),
        ),
        beats(
            "with plain tokens, positions by moment beat random ones",
            paired(rows, "u-moment", "vanilla"),
        ),
        beats("with plain tokens, positions by confidence beat random ones", confident),
        beats(
            "with plain tokens, spread positions (halton) beat random ones",
            paired(rows, "halton", "vanilla"),
        ),
        beats(
            "tempered tokens beat plain ones at the positions of the moment sampler",
            paired(rows, "moment", "u-moment"),
        ),
    )


def ranking(rows: Rows) -> str:
    """Return the samplers from best to worst, with what sets each apart from the best."""
    line = sorted(rows.values(), key=lambda row: row.quality)
    return table(
        ("sampler", "cost", "quality", "beside the best"),
        ((row.name, f"{row.cost:.2f}", quality(row), told(row, line[0])) for row in line),
    )


def findings(lab: Lab, model: str) -> Section:
    """Measure one model."""
    scale, base = lab.scale(model), lab.base(model)
    rows = lab.run(model, grids.orders(scale, base))
    curves: dict[str, list[StudyRow]] = {}
    for row in rows.values():
        name = "entropy bound" if row.sampling.entropy_bound else row.sampling.order
        name += " ancestral" * (row.sampling.schedule == "ancestral")
        curves.setdefault(name, []).append(row)
    picture = draw(lab, f"orders-{model}", model, curves, against="cost")
    body = f"{picture}\n\n{ranking(rows)}\n\n{plan_table(lab, model, rows.values())}"
    return Section(model, verdicts(rows), body)


SCRIPT = Script(
    name="orders",
    title="Which positions first?",
    claim="which positions are revealed first decides the quality, and the moment sampler's "
    "order is a good one (Hayakawa et al. 2025, section 4).",
    findings=findings,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
