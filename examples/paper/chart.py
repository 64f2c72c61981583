"""Line charts with error bars, as SVG files that are the same for the same numbers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mdexport.study_store import replace_file

__all__ = ["Curve", "chart"]

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its pale yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_LINES = ("-", "--", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",  # fonts of readers differ
    "svg.hashsalt": "paper",  # otherwise names in the file are random
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Points with 95 % intervals; all arrays are (points,)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    joined: bool = True  # whether a line connects the points


def chart(
    path: Path, curves: Sequence[Curve], *, x: str, y: str, logx: bool = False, logy: bool = False
) -> None:
    """Draw curves into an SVG file.

    Args:
        path: of the file; written whole or not at all.
        curves: at least one.
        x: label of the axis, with its unit.
        y: label of the other one.
        logx: whether the axis is logarithmic.
        logy: whether the other one is.
    """
    image = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            _draw(axes, curve, index)
        _scale(axes, curves, logx=logx, logy=logy)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(image, format="svg", metadata={"Date": None})
    replace_file(path, image.getvalue())


def _draw(axes: Any, curve: Curve, index: int) -> None:
    below = [max(value - low, 0) for value, low in zip(curve.y, curve.low, strict=True)]
    above = [max(high - value, 0) for value, high in zip(curve.y, curve.high, strict=True)]
    axes.errorbar(
        curve.x,
        curve.y,
        yerr=(below, above),
        label=curve.label,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_LINES[index // len(_COLOURS) % len(_LINES)] if curve.joined else "none",
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
    )


def _scale(axes: Any, curves: Sequence[Curve], *, logx: bool, logy: bool) -> None:
    if logx:
        ticks = sorted({value for curve in curves for value in curve.x})
        axes.set_xscale("log", base=2)
        if len(ticks) <= 12:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if logy:
        axes.set_yscale("log")
