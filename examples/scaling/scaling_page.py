"""The page of results: exponents, the times behind them, and charts."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from chart import Curve, chart
from experiments import Experiment, Line
from mdexport.study_store import replace_file
from page import table

__all__ = ["write"]

PAGE = "scaling.md"
_HEAD = (
    *("what grows", "what is timed", "sizes", "exponent", "at the end", "off the line"),
    *("arithmetic", "expected", "verdict"),
)
_LEGEND = (
    "Exponents are slopes of straight lines of least squares through the logarithms of sizes and "
    'median times. "At the end" is the slope between the two largest sizes, "off the line" by how '
    'much the worst time is off. "Arithmetic" is the slope of the operations of matrix products '
    "at the same sizes: what times would do if every operation took as long."
)


def write(folder: Path, context: str, found: Sequence[Experiment]) -> Iterator[str]:
    """Write the page and its charts; yield what to say of them, line by line.

    Args:
        folder: made if there is none.
        context: command, date, machine and versions, in Markdown.
        found: what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Does cost grow as it should?", context, table(_HEAD, _exponents(found)), _LEGEND]
    parts += ["Why:", "\n".join(_reasons(found))]
    for each in found:
        picture = folder / f"scaling-{each.name}.svg"
        chart(picture, [*map(_curve, each.lines)], x=each.grows, y="ms", logx=True, logy=True)
        parts += [f"## {each.grows.capitalize()}", each.model]
        parts += [f"![times against {each.grows}]({picture.name})", _times(each)]
    replace_file(folder / PAGE, ("\n\n".join(parts) + "\n").encode())
    for each in found:
        yield from (_short(each, line) for line in each.lines)
    yield f"wrote {folder / PAGE}"


def _exponents(found: Iterable[Experiment]) -> Iterator[Sequence[str]]:
    for each in found:
        for line in each.lines:
            fit, span = line.measured, line.expected
            yield (
                *(each.grows, line.label, f"{line.sizes[0]} to {line.sizes[-1]}"),
                *(f"{fit.exponent:.2f}", f"{fit.last:.2f}", f"{fit.off:.0%}"),
                *(f"{line.counted.exponent:.2f}", f"{span.low:g} to {span.high:g}"),
                span.verdict(fit),
            )


def _reasons(found: Iterable[Experiment]) -> Iterator[str]:
    for each in found:
        for line in each.lines:
            yield f"- {each.grows}, {line.label}: {line.expected.why}."


def _times(each: Experiment) -> str:
    """Return a table of median milliseconds by size; all lines have the same sizes."""
    head = [each.grows, *(f"{line.label}, ms" for line in each.lines)]
    cells = (
        [str(size), *(_cell(line, index) for line in each.lines)]
        for index, size in enumerate(each.lines[0].sizes)
    )
    return (
        f"{table(head, cells)}\n\nMedians; in brackets the runs, and the slowest over the fastest."
    )


def _cell(line: Line, index: int) -> str:
    runs = line.ms[index]
    ratio = f", {max(runs) / min(runs):.2f}" if len(runs) > 1 else ""
    return f"{line.medians[index]:.4g} ({len(runs)}{ratio})"


def _curve(line: Line) -> Curve:
    low, high = ([pick(runs) for runs in line.ms] for pick in (min, max))
    label = f"{line.label}\n(exponent {line.measured.exponent:.2f})"
    return Curve(label, line.sizes, line.medians, low, high)


def _short(each: Experiment, line: Line) -> str:
    """Return a line for a terminal."""
    span, fit = line.expected, line.measured
    what = f"{each.name}, {line.label}"
    return (
        f"{what:44} {fit.exponent:5.2f}  expected {span.low:g} to {span.high:g}: "
        f"{span.verdict(fit)}"
    )
