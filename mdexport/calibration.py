"""What values were along trajectories, and the largest number that int8 shall stand for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mdexport.replay import Arrays, replay
from mdexport.retype import widen

__all__ = ["CALIBRATIONS", "LEVELS", "Histogram", "histograms"]

LEVELS = 127  # steps of a symmetric int8 on either side of zero

_EDGES = np.geomspace(1e-6, 1e6, 4097)
_CENTRES = np.concatenate([[0.0], np.sqrt(_EDGES[1:] * _EDGES[:-1]), [_EDGES[-1]]])
_CANDIDATES = np.linspace(0.05, 1.0, 96)  # parts of the largest magnitude


class Histogram:
    """Magnitudes of a value, counted in bins of equal width in the logarithm (0.7 %)."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(_EDGES) + 1)
        self.largest = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Count the magnitudes of an array of any shape."""
        sizes = np.abs(values, dtype=np.float32).ravel()
        self.largest = max(self.largest, float(sizes.max(initial=0)))
        bins = np.searchsorted(_EDGES, sizes)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """Return a magnitude that this share of all magnitudes does not exceed."""
        index = int(np.searchsorted(np.cumsum(self.counts), share * self.counts.sum()))
        return min(self.largest, float(_EDGES[min(index, len(_EDGES) - 1)]))

    def least_error(self) -> float:
        """Return the bound that makes the mean squared error of int8 smallest."""
        bounds = self.largest * _CANDIDATES[:, None]
        step = bounds / LEVELS
        rounding = np.where(step / 2 > _CENTRES, _CENTRES**2, step**2 / 12)
        errors = np.where(bounds < _CENTRES, (_CENTRES - bounds) ** 2, rounding)
        return float(bounds[np.argmin(errors @ self.counts), 0])


CALIBRATIONS: Mapping[str, Callable[[Histogram], float]] = {
    "largest": lambda histogram: histogram.largest,
    "99.999 %": lambda histogram: histogram.quantile(0.99999),
    "least squares": Histogram.least_error,
}
"""Ways to the bound of a value. Which is best depends on the model, so all are tried."""


def histograms(
    path: Path,
    low: ir.DataType | None,
    passes: Iterable[Arrays],
    names: Sequence[str],
    caches: Sequence[tuple[str, str]],
) -> dict[str, Histogram]:
    """Return what inner values of a graph are along recorded passes, computed in float32.

    Args:
        path: the graph.
        low: the type of its operators; None where that is float32.
        passes: recorded ones.
        names: of the values.
        caches: (input, output) names of the graph's caches.
    """
    model = ir.load(path)
    values: dict[str | None, Any] = {
        value.name: value for node in model.graph for value in node.outputs
    }
    taps = [ir.node("Identity", [values[name]]) for name in names]
    for name, tap in zip(names, taps, strict=True):
        tap.outputs[0].name, tap.outputs[0].dtype = f"tap.{name}", values[name].dtype
        model.graph.append(tap)
        model.graph.outputs.append(tap.outputs[0])
    if low is not None:
        widen(model.graph, low)
    found = {name: Histogram() for name in names}
    fetch = [f"tap.{name}" for name in names]
    for outputs in replay(model, path.with_name("taps.onnx"), passes, fetch, caches):
        for name in names:
            found[name].add(outputs[f"tap.{name}"])
    return found
