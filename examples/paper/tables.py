"""Rows of a study as a table and as a chart."""

from collections.abc import Iterable, Mapping, Sequence

from chart import Curve, chart
from lab import Lab
from mdruntime.study import StudyRow
from page import quality, table

__all__ = ["draw", "plan_table"]

AXES = {
    "rounds": "rounds",
    "cost": "cost of a sample (full-pass equivalents)",
}


def plan_table(lab: Lab, model: str, rows: Iterable[StudyRow]) -> str:
    """Return a Markdown table of samplers with all that was measured of them."""
    known = list(rows)
    scores = sorted(set.intersection(*(set(row.scores) for row in known)))
    header = ("sampler", "passes", "cost", lab.judge(model).measure, *scores)
    lines = (
        (
            *(row.name, f"{row.passes:.4g}", f"{row.cost:.2f}", quality(row)),
            *(f"{row.scores[name]:.3g}" for name in scores),
        )
        for row in known
    )
    numbers = sorted({(row.samples, row.seeds) for row in known})
    how = " or ".join(f"{samples} samples of {seeds} seeds" for samples, seeds in numbers)
    legend = (
        "Names: a alpha, r rounds, c parts of a round, f rounds that share a full pass, "
        "w guidance; `chosen` and `recent` are the rows that a partial pass recomputes."
    )
    return (
        f"{table(header, lines)}\n\n{how} for each sampler; ± is half the width of the 95 % "
        f"interval over the seeds (Student's t). Cost is in full-pass equivalents. {legend}"
    )


def draw(
    lab: Lab,
    name: str,
    model: str,
    curves: Mapping[str, Sequence[StudyRow]],
    *,
    against: str,
    joined: bool = True,
) -> str:
    """Draw quality against rounds or cost; return the Markdown that shows the chart.

    Args:
        lab: where it is kept.
        name: of the file.
        model: whose samples they are.
        curves: rows by the label of their curve.
        against: ``rounds`` or ``cost``.
        joined: whether lines connect the points.
    """

    def place(row: StudyRow) -> float:
        return row.cost if against == "cost" else row.sampling.rounds

    drawn = []
    for label, rows in curves.items():
        line = sorted(rows, key=place)
        drawn.append(
            Curve(
                label,
                [place(row) for row in line],
                [row.quality for row in line],
                [row.low for row in line],
                [row.high for row in line],
                joined,
            )
        )
    path = lab.results / f"{name}.svg"
    chart(path, drawn, x=AXES[against], y=lab.measure_of(model), logx=True)
    return f"![quality of {model} against {against}]({path.name})"
