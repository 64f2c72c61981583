"""From the shapes of a request to the shapes of an engine: which profile, and what is padded.

Padding repeats the last column: what a pass computes twice is the same, and writing it twice to the
same row of a cache is harmless.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.denoiser import VISIBLE
from mdruntime.trt.profiles import Shape

__all__ = ["Fit", "Ranges", "fit", "largest_batch", "padded_to"]

Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""Smallest, usual and largest shape of every input under one profile."""

_SIZES = 8  # numbers of wanted columns between none and all: each is a CUDA graph of its own
_SLOTTED = ("tokens", "uniforms")  # inputs in which a row of the canvas may take several columns


@dataclass(frozen=True, slots=True)
class Fit:
    """A profile, and the shapes of all inputs as an engine gets them."""

    profile: int
    shapes: dict[str, Shape]


def fit(profiles: Sequence[Ranges], shapes: Mapping[str, Shape]) -> Fit | None:
    """Return the first profile that takes inputs of these shapes, once they are padded.

    Args:
        profiles: of the engine, small ones first.
        shapes: of all inputs, caches included.
    """
    for index, ranges in enumerate(profiles):
        given = _padded(ranges, shapes) if "positions" in shapes else dict(shapes)
        if given is not None and all(_within(ranges[name], given[name]) for name in ranges):
            return Fit(index, given)
    return None


def _within(span: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    low, _, high = span
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def _padded(ranges: Ranges, shapes: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """Return the shapes of a denoiser's inputs under a profile, None where there are too many."""
    low, _, high = (shape[1] for shape in ranges["positions"])
    m = shapes["positions"][1]
    wide = high if low == high else m
    if not m <= wide <= high:
        return None
    wanted = shapes["columns"][1]
    columns = _rounded(wanted, wide)
    widths = {
        "positions": wide,
        "columns": columns,
        "tokens": shapes["tokens"][1] // m * wide,
        "uniforms": shapes["uniforms"][1] // wanted * columns,
    }
    if VISIBLE in shapes:
        widths[VISIBLE] = _rounded(shapes[VISIBLE][1], wide)
    return {name: (s[0], widths[name]) if name in widths else s for name, s in shapes.items()}


def _rounded(count: int, most: int) -> int:
    """Return a count, rounded up to eighths of the largest one."""
    step = -(-most // _SIZES)
    return min(most, -(-count // step) * step)


def padded_to(
    target: NDArray[Any], name: str, array: NDArray[Any], shapes: Mapping[str, Shape]
) -> None:
    """Write an input into an array that may have more columns.

    Args:
        target: (rows, at least m) or of the input's shape.
        name: of the input.
        array: (rows, m) or any shape.
        shapes: of all inputs before they were padded.
    """
    if target.shape == array.shape:
        np.copyto(target, array, casting="no")
        return
    slots = 1
    if name in _SLOTTED:
        slots = shapes["tokens"][1] // shapes["positions"][1]
    width = array.shape[1]
    np.copyto(target[:, :width], array, casting="no")
    times = (target.shape[1] - width) // slots
    np.copyto(target[:, width:], np.tile(array[:, -slots:], (1, times)), casting="no")


def largest_batch(profiles: Sequence[Ranges]) -> int:
    """Return the most samples that a denoiser's profiles take; 0 where they have none."""
    return max((p["conditional"][2][0] for p in profiles if "conditional" in p), default=0)
