"""The exponent of a power law, and whether it is the one that was expected."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Expected", "Fit", "fitted"]


@dataclass(frozen=True, slots=True)
class Fit:
    """A straight line through the logarithms of sizes and values."""

    exponent: float
    last: float  # exponent between the two largest sizes, where a sum's steepest part shows
    off: float  # by how much the worst value is off the line, as a share of it


@dataclass(frozen=True, slots=True)
class Expected:
    """Where an exponent should lie, and why."""

    low: float
    high: float
    why: str  # a sentence

    def verdict(self, fit: Fit) -> str:
        """Return whether the exponent lies there; one that is no number does not."""
        return "held" if self.low <= fit.exponent <= self.high else "failed"


def fitted(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Return the line of least squares through the logarithms.

    Args:
        sizes: two or more, rising and positive.
        values: one of each size, positive.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    exponent, start = np.polyfit(x, y, 1)
    off = np.abs(np.expm1(y - (start + exponent * x))).max()
    return Fit(float(exponent), float((y[-1] - y[-2]) / (x[-1] - x[-2])), float(off))
