"""Halton orders: positions spread evenly over the canvas (Besnier et al. 2025).

An order is an int64 array (length,) that lists every position once, first to last.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["halton_grid", "halton_line"]

_POINTS = 10_000  # as in the original; grids that need more get more


def _radical_inverse(count: int, base: int) -> NDArray[np.float64]:
    """Return numbers 1 to ``count`` of the van der Corput sequence in ``base`` (number 0 is 0)."""
    index = np.arange(1, count + 1)
    result = np.zeros(count)
    scale = 1.0
    while index.any():
        scale /= base
        result += scale * (index % base)
        index //= base
    return result


def _first_occurrences(cells: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    order = cells[np.sort(np.unique(cells, return_index=True)[1])]
    missing = np.setdiff1d(np.arange(length), order)
    return np.concatenate([order, missing])


@lru_cache(maxsize=16)
def halton_grid(height: int, width: int) -> NDArray[np.int64]:
    """Return the Halton order of a grid: base 2 down the rows, base 3 along the columns.

    Positions are row-major. Points that fall into a cell already taken are skipped.
    """
    count = max(_POINTS, 20 * height * width)
    rows = np.floor(_radical_inverse(count, 2) * height).astype(np.int64)
    columns = np.floor(_radical_inverse(count, 3) * width).astype(np.int64)
    return _first_occurrences(rows * width + columns, height * width)


@lru_cache(maxsize=16)
def halton_line(length: int) -> NDArray[np.int64]:
    """Return the base-2 (van der Corput) order of a line of text."""
    count = max(_POINTS, 4 * length)
    cells = np.floor(_radical_inverse(count, 2) * length).astype(np.int64)
    return _first_occurrences(cells, length)
